"""Generation step by step with cached keys gives the original's logits, also after beams have changed places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Case
from numerics import TOLERANCE, assert_close

from ofa_ds.config import KernelConfig

pytestmark = pytest.mark.golden("case_f_*.npz")


def test_steps_with_a_cache_are_the_full_pass(golden_file: Path, dtype: torch.dtype, chosen: KernelConfig) -> None:
    case = Case(golden_file, chosen)
    model = case.model(dtype)
    batch, padded = case.batch(model.config, dtype)
    previous = torch.from_numpy(case.inputs["prev_output_tokens"])
    state = model.start_decoding(batch)
    steps = torch.stack([model.decode_step(tokens, state) for tokens in previous.T], dim=1).flatten(0, 1)[
        padded.decoder
    ]
    full = model.logits(model.decode(batch, model.encode(batch)))
    for name, out in {"step_logits": steps, "full_logits": full}.items():
        expected = torch.from_numpy(case.arrays[f"out/{name}"]).flatten(0, 1)[padded.decoder]
        assert_close(out, expected, TOLERANCE[dtype], name)


def test_beams_may_change_places(golden_file: Path, dtype: torch.dtype, chosen: KernelConfig) -> None:
    case = Case(golden_file, chosen)
    model = case.model(dtype)
    batch, padded = case.batch(model.config, dtype)
    previous, order = (torch.from_numpy(case.arrays[f"reorder/{name}"]) for name in ("prev", "order"))
    state = model.start_decoding(batch, beams=len(previous) // padded.num_examples)
    for tokens in previous.T[:3]:
        model.decode_step(tokens, state)
    state.reorder(order)
    logits = model.decode_step(previous[:, 3], state)
    assert_close(logits, case.arrays["reorder/logits_step3"], TOLERANCE[dtype], "logits after reordering")


def test_rows_may_leave_and_mix(golden_file: Path) -> None:
    """Any selection of rows goes on as those rows would have, whether beams stay together or not."""
    case = Case(golden_file)
    model = case.model(torch.float64)
    batch, padded = case.batch(model.config, torch.float64)
    previous = torch.from_numpy(case.inputs["prev_output_tokens"]).repeat_interleave(2, 0)
    last = 2 * padded.num_examples - 1
    for rows in ([0, 1], [last, 0, 0], [last, last - 1], [1, last, 2]):
        index = torch.tensor(rows)
        whole, part = (model.start_decoding(batch, beams=2) for _ in range(2))
        for tokens in previous.T[:2]:
            model.decode_step(tokens, whole), model.decode_step(tokens, part)
        part.reorder(index)
        expected = model.decode_step(previous[:, 2], whole)[index]
        assert_close(model.decode_step(previous[index, 2], part), expected, 1e-12, f"rows {rows}")

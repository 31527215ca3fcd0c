"""Official sizes with weights by the rule, on long sequences: the far buckets, the real grids, the whole vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter import load, pack_padded, packed
from cases import Case
from numerics import TOLERANCE, assert_close

from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA


@pytest.mark.golden("fullcfg_ofa_*.npz")
@torch.no_grad()
def test_full_size_is_the_original(golden_file: Path) -> None:
    case = Case(golden_file)
    model = OFA(preset(golden_file.stem.removeprefix("fullcfg_ofa_"))).eval()
    load(model, None)
    for dtype in (torch.float32, torch.float64):  # in this order: the rule's weights are float32
        model.to(dtype)
        for kind in ("text", "code"):
            check(case, model, kind, dtype)


def check(case: Case, model: OFA, kind: str, dtype: torch.dtype) -> None:
    inputs = {name: case.inputs[name] for name in ("src_tokens", "patch_images")}
    rows = len(inputs["src_tokens"])
    inputs |= {
        "prev_output_tokens": case.inputs[f"prev_{kind}"],
        "patch_masks": torch.ones(rows, dtype=torch.bool).numpy(),
    }
    inputs["code_masks"] = torch.full((rows,), kind == "code").numpy()
    batch, padded = pack_padded(inputs, model.config, dtype=dtype)
    encoded = model.encode(batch)
    assert_close(
        encoded.memory_ND, packed(case.arrays["out/encoder_out"], padded.encoder), TOLERANCE[dtype], "encoder_out"
    )
    logits = model.logits(model.decode(batch, encoded))
    logsumexp = packed(case.arrays[f"out/logsumexp_{kind}"], padded.decoder)
    assert_close(logits.logsumexp(-1), logsumexp, TOLERANCE[dtype], f"logsumexp of {kind}")
    logits = logits.view(rows, -1, logits.shape[-1])
    steps, columns = (torch.from_numpy(case.arrays[f"idx/{name}"]) for name in (f"rows_{kind}", "vocab_cols"))
    expected = case.arrays[f"out/logits_{kind}"]
    assert_close(logits[:, steps][:, :, columns], expected, TOLERANCE[dtype], f"logits of {kind}")

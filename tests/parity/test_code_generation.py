"""Generation of image codes from a text against the original's generator: searches, samples, scores, logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adapter
import numpy as np
import pytest
import torch
from numerics import assert_close
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.inference.draws import Draw
from ofa_ds.inference.generate import GenerationConfig, Hypothesis, generate
from ofa_ds.model.ofa import OFA

FILE = "t2i/code_generation.npz"
CODES = (205, 269)
NUM_CODES = 16
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def arrays(golden_root: Path) -> Arrays:
    with np.load(golden_root / FILE, allow_pickle=False) as found:
        return {key: found[key] for key in found.files}


@pytest.fixture(scope="module")
def meta(arrays: Arrays) -> dict[str, Any]:
    return json.loads(arrays["meta"].item())


@pytest.fixture(scope="module")
def model(meta: dict[str, Any], golden_dir: Path) -> OFA:
    model = OFA(adapter.MICRO).double().eval().requires_grad_(False)
    adapter.load(model, adapter.stored_weights(golden_dir, "micro_state.npz"))
    for name, factor in meta["state_overrides_multiply"].items():
        model.get_parameter(name).mul_(factor)
    return model


def batch_of(source: np.ndarray, previous: np.ndarray | None = None) -> Batch:
    previous = np.zeros((len(source), 1), np.int64) if previous is None else previous
    inputs = {"src_tokens": source, "prev_output_tokens": previous, "code_masks": np.ones(len(source), bool)}
    return adapter.pack_padded(inputs, adapter.MICRO, dtype=torch.float64)[0]


class Recorded:
    """The original's draws, if the weights are the ones that it drew from."""

    def __init__(self, arrays: Arrays, name: str, beams: int) -> None:
        self.arrays, self.name, self.beams, self.step = arrays, name, beams, 0

    def __call__(self, weights_RK: Tensor, rows: Sequence[int]) -> Tensor:
        key = f"{self.name}/step{self.step}"
        wanted, draws = self.arrays[f"{key}/probs_given_to_multinomial"], self.arrays[f"{key}/draws"]
        one_a_row = weights_RK[:: self.beams] if self.step == 0 else weights_RK  # all beams are the same at first
        shared = min(wanted.shape[1], one_a_row.shape[1])
        assert_close(one_a_row[:, :shared], wanted[:, :shared], 1e-12, key)
        assert not one_a_row[:, shared:].any() and not wanted[:, shared:].any()
        self.step += 1
        return torch.from_numpy(draws.reshape(-1))


def seeded(seed: int, beams: int) -> Draw:
    """The draws of torch's global generator, as the original makes them."""
    torch.manual_seed(seed)
    first = True

    def draw(weights_RK: Tensor, rows: Sequence[int]) -> Tensor:
        nonlocal first
        given, first = (weights_RK[::beams], False) if first else (weights_RK, False)
        count = len(weights_RK) // len(given)
        return torch.multinomial(given, count, replacement=True).reshape(-1)

    return draw


def generated(name: str, arrays: Arrays, meta: dict[str, Any], model: OFA) -> list[list[Hypothesis]]:
    case = meta["configs"][name]
    sampling, beams = isinstance(case["strategy"], dict), case["beam_size"]
    chosen = {key: value for key, value in case["strategy"].items() if value > 0} if sampling else {}
    config = GenerationConfig(
        beams=beams, min_len=NUM_CODES, max_len_b=NUM_CODES, gen_code=True, constraint_range=CODES, sampling=sampling,
        temperature=case.get("temperature", 1.0), top_k=chosen.get("topk", 0), top_p=chosen.get("topp", 0.0),
    )  # fmt: skip
    is_recorded = f"{name}/step0/draws" in arrays
    draw = None if not sampling else Recorded(arrays, name, beams) if is_recorded else seeded(case["seed"], beams)
    return generate(model, batch_of(arrays["in/src_tokens"][: case["batch"]]), config, draw=draw)


@pytest.mark.golden(FILE)
def test_every_recorded_search_and_sample_is_the_original_s(arrays: Arrays, meta: dict[str, Any], model: OFA) -> None:
    assert len(meta["configs"]) == 9
    for name, case in meta["configs"].items():
        found = generated(name, arrays, meta, model)
        assert [len(hypotheses) for hypotheses in found] == case["n_hypos"], name
        for b, hypotheses in enumerate(found):
            for h, hypothesis in enumerate(hypotheses):
                key = f"{name}/b{b}_h{h}"
                assert hypothesis.tokens == arrays[f"{key}/tokens"].tolist(), key
                assert hypothesis.score == pytest.approx(arrays[f"{key}/score"].item(), rel=1e-9), key
                assert_close(torch.tensor(hypothesis.positional_scores), arrays[f"{key}/positional_scores"], 1e-6, key)


@pytest.mark.golden(FILE)
def test_what_is_generated_has_the_logits_of_a_whole_forward(arrays: Arrays, model: OFA) -> None:
    name = "single_topk16_beam6"
    tokens = arrays[f"{name}/b0_h0/tokens"]
    batch = batch_of(arrays["in/src_tokens"][:1], np.concatenate([[0], tokens[:-1]])[None])
    wanted = arrays[f"{name}/teacher_forced_logits_h0"][0]
    whole = model.logits(model.decode(batch, model.encode(batch)))
    assert_close(whole, wanted, 1e-9, "teacher forced")
    state = model.start_decoding(batch)
    for place, token in enumerate([0, *tokens[:-1].tolist()]):
        logits = model.decode_step(torch.tensor([token]), state, CODES)[0]
        assert_close(logits, wanted[place, [*range(4), *range(*CODES)]], 1e-9, f"step {place}")

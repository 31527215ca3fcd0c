"""Beam search against every recorded search of the original's generator, on the micro model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import adapter
import numpy as np
import pytest
import torch

from ofa_ds.batch import Batch
from ofa_ds.inference.generate import GenerationConfig, Trie, generate
from ofa_ds.model.ofa import OFA

DTYPE = torch.float64
FILE = "beam_search.npz"
NAMES = {
    "beam_size": "beams",
    "len_penalty": "len_penalty",
    "normalize_scores": "normalize",
    "no_repeat_ngram_size": "no_repeat_ngram",
}
"""Arguments of the original's constructor that we call otherwise; the rest has its name."""


def config_of(ctor: dict[str, Any]) -> GenerationConfig:
    options = {NAMES.get(name, name): value for name, value in ctor.items()}
    if "constraint_range" in options:
        options["constraint_range"] = tuple(int(part) for part in options["constraint_range"].split(","))
    return GenerationConfig(**options)


@pytest.fixture(scope="module")
def arrays(golden_dir: Path) -> dict[str, np.ndarray]:
    return adapter.stored_arrays(golden_dir / FILE)


@pytest.fixture(scope="module")
def models(arrays: dict[str, np.ndarray], golden_dir: Path) -> list[OFA]:
    """The micro model with the recorded edits of its weights, and the second member of the ensemble."""
    model = OFA(adapter.MICRO).to(DTYPE).eval().requires_grad_(False)
    adapter.load(model, adapter.stored_weights(golden_dir, "micro_state.npz"))
    edits = {name.split("/")[1]: float(value) for name, value in arrays.items() if name.startswith("state_overrides/")}
    model.encoder.embed_tokens.weight[2] *= edits["encoder.embed_tokens.weight_row2_scale"]
    model.decoder.layer_norm.weight *= edits["decoder.layer_norm_scale"]
    model.decoder.layer_norm.bias *= edits["decoder.layer_norm_scale"]
    second = copy.deepcopy(model)
    second.encoder.layer_norm.weight *= edits["model2_encoder.layer_norm.weight_scale"]
    return [model, second]


def batch_of(arrays: dict[str, np.ndarray], kind: str) -> Batch:
    """The packed inputs; what follows bos is not read."""
    prefix = {"image": "in/", "text": "text_only_in/"}[kind]
    inputs = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    inputs["prev_output_tokens"] = np.zeros((len(inputs["src_tokens"]), 1), np.int64)
    return adapter.pack_padded(inputs, adapter.MICRO, dtype=DTYPE)[0]


def search(case: dict[str, Any], arrays: dict[str, np.ndarray], models: list[OFA]) -> list[list[Any]]:
    prefix = case.get("prefix")
    return generate(
        models[: case.get("n_models", 1)],
        batch_of(arrays, case.get("input", "image")),
        config_of(case["ctor"]),
        prefix=None if prefix is None else [[token for token in row if token != adapter.PAD] for row in prefix],
        trie=None if case.get("trie") is None else Trie(case["trie"]),
    )


@pytest.mark.golden(FILE)
def test_every_recorded_search_gives_the_hypotheses_and_scores_of_the_original(
    arrays: dict[str, np.ndarray], models: list[OFA]
) -> None:
    cases = {name: case for name, case in json.loads(arrays["meta"].item()).items() if not case.get("error")}
    assert cases
    for name, case in cases.items():
        found = search(case, arrays, models)
        assert [len(hypotheses) for hypotheses in found] == case["n_hypos"], name
        for b, hypotheses in enumerate(found):
            for h, hypothesis in enumerate(hypotheses):
                key = f"{name}/b{b}_h{h}"
                assert hypothesis.tokens == arrays[f"{key}/tokens"].tolist(), key
                assert hypothesis.score == pytest.approx(arrays[f"{key}/score"].item(), rel=1e-9, abs=1e-9), key
                recorded = arrays[f"{key}/positional_scores"]
                np.testing.assert_allclose(hypothesis.positional_scores, recorded, rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.golden(FILE)
def test_fewer_answers_than_beams_give_fewer_hypotheses_where_the_original_fails(
    arrays: dict[str, np.ndarray], models: list[OFA]
) -> None:
    cases = json.loads(arrays["meta"].item())
    failing = [name for name, case in cases.items() if case.get("error")]
    answers = [[10], [11, 12]]
    for name in failing:
        found = search({**cases[name], "trie": answers}, arrays, models)
        for hypotheses in found:
            assert sorted(hypothesis.tokens for hypothesis in hypotheses) == [[10, 2], [11, 12, 2]], name

"""Generation between two steps of training: weights whole once, ranks free of one another, training none the wiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import launch

pytestmark = pytest.mark.long

CASES = ("fp32 stage 0", "fp32 stage 1", "fp32 stage 2", "fp32 stage 3", "bf16 stage 3")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("gathered_worker.py")
    return {each["case"]: each for each in launch(tmp_path_factory.mktemp("gathered"), 2, worker=worker)}


@pytest.mark.parametrize("case", CASES)
def test_one_rank_alone_generates_what_a_plain_model_with_the_weights_generates(results, case):
    assert results[case]["hypotheses"] == 9
    assert results[case]["same"]


@pytest.mark.parametrize("case", CASES)
def test_the_moving_average_can_be_asked_instead(results, case):
    assert results[case]["off"] == 0


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_if_nothing_had_been_generated(results, case):
    assert results[case]["training"]
    assert results[case]["loss"] == results[case]["without"]

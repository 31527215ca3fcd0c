"""What a plan says a run holds between steps is what the tensors of a real engine take, by stage and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import launch

CASES = (
    "stage 0, fp32",
    "stage 1, fp32",
    "stage 1, bf16, average",
    "stage 2, fp32",
    "stage 2, bf16",
    "stage 3, fp32, average",
    "stage 3, bf16, average",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("state_worker.py")
    return {each["case"]: each for each in launch(tmp_path_factory.mktemp("state"), 2, worker=worker)}


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_of_an_engine_between_steps_take_what_is_planned(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["planned"] == pytest.approx(found["measured"], rel=0.005), found["parts"]


def test_every_case_ran(results: dict[str, Any]) -> None:
    assert sorted(results) == sorted(CASES)

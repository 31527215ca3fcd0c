"""What a plan says is gathered under ZeRO-3 is what DeepSpeed gathers: module by module, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import launch

pytestmark = pytest.mark.long

CASES = (
    "convolutions, as shipped, checkpointed",
    "ResNet, small buckets, checkpointed",
    "ResNet, few at a time",
    "6B's structure, no leaf modules, checkpointed",
    "6B's structure, nothing ahead",
    "6B's structure, some stay, checkpointed",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    worker = Path(__file__).with_name("gathering_worker.py")
    return {each["case"]: each for each in launch(tmp_path_factory.mktemp("gathering"), 2, worker=worker)}


@pytest.mark.parametrize("case", CASES)
def test_after_each_module_as_many_weights_are_whole_as_planned(results: dict[str, Any], case: str) -> None:
    found = results[case]
    assert found["events"] == found["planned"] > 100
    assert found["first difference"] == -1, (found["theirs"], found["ours"])


def test_every_case_ran(results: dict[str, Any]) -> None:
    assert sorted(results) == sorted(CASES)

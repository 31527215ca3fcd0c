"""The numbers kept in the repository are those of the whole recording: parity with that one is parity with both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter import rule_weight, stored_arrays

KEPT = sorted(Path(__file__).parent.glob("golden/*/*.*"))
NOT_A_WEIGHT = ("encoder.version", "decoder.version")
"""Counters of the original's files, which the model does not have."""


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.dtype == theirs.dtype and np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f")


def is_part(ours: Any, theirs: Any) -> bool:
    """Equal, but for entries of dictionaries and of lists that are not kept here; a line that is not is empty."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(name in theirs and is_part(each, theirs[name]) for name, each in ours.items())
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return all(is_part(each, other) for each, other in zip(ours, theirs, strict=True))
    if isinstance(ours, list) and isinstance(theirs, list):
        return all(any(is_part(each, other) for other in theirs) for each in ours)
    return ours in ("", theirs)


def test_what_is_kept_here_is_a_part_of_the_set_that_is_compared_with(golden_dir: Path, golden_manifests: Path) -> None:
    if golden_dir == KEPT[0].parent:
        pytest.skip("the set that is compared with is the one kept here; --golden DIR names another")
    compared = 0
    for file in KEPT:
        folders = {"fixtures": golden_dir, "finetune": golden_dir.parent / "finetune"}
        other = folders.get(file.parent.name, golden_manifests) / file.name
        if not other.is_file():
            continue
        compared += 1
        if file.suffix == ".json":
            assert is_part(json.loads(file.read_text()), json.loads(other.read_text())), file.name
            continue
        ours, theirs = stored_arrays(file), stored_arrays(other)
        assert [name for name in ours if name not in theirs or not same(ours[name], theirs[name])] == [], file.name
    assert compared == len(KEPT)


@pytest.mark.golden("[cm]*.npz")
def test_weights_that_a_set_carries_are_those_of_the_rule(golden_file: Path) -> None:
    stored = stored_arrays(golden_file)
    if not golden_file.stem.endswith("_state"):
        stored = {name[6:]: array for name, array in stored.items() if name.startswith("state/")}
    weights = {name: each for name, each in stored.items() if each.dtype.kind == "f" and name not in NOT_A_WEIGHT}
    assert [name for name, each in weights.items() if not same(rule_weight(name, each.shape).numpy(), each)] == []

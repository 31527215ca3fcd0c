"""A run that moves from 2 ranks to 3, 1 and 4, from stage to stage: the state is the same bits, the path the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from chain_cases import FIRST_STEPS, HOPS, STEPS_A_HOP
from engine_cases import launch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from checkpoints import different, whole

pytestmark = pytest.mark.long

WORKER = Path(__file__).with_name("chain_worker.py")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    return folder, [launch(folder, ranks, str(hop), worker=WORKER) for hop, (ranks, _) in enumerate(HOPS)]


@pytest.mark.parametrize("hop", range(1, len(HOPS)))
def test_what_is_loaded_is_what_was_saved_bit_for_bit(chain, hop):
    folder, _ = chain
    name = f"step_{FIRST_STEPS + (hop - 1) * STEPS_A_HOP:08d}"
    saved, loaded = whole(folder / f"hop_{hop - 1}" / name), whole(folder / f"loaded_{hop}" / name)
    assert len(saved) > 100 and different(saved, loaded) == []


def test_losses_are_those_of_the_run_that_stayed(chain):
    _, results = chain
    moved = [loss for result in results[1:] for loss in result["losses"]]
    stayed = results[0]["stayed"]
    assert len(moved) == len(stayed) == STEPS_A_HOP * (len(HOPS) - 1)
    assert moved == pytest.approx(stayed, rel=1e-6)

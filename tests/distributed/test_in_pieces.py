"""A model that no process can hold: built in pieces, started from a file in pieces, recomputed layer by layer; the 6B
in its full depth (36 + 24 layers, 24 of the ViT) at reduced width, under its own memory layout. Real ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import launch
from pieces_cases import LONG_SAVED, LONG_STEPS, SAVED, START_MODEL, START_VOCAB, STEPS, start_value

from ofa_ds.checkpoint.format import NO_STEPS, Facts, TensorInfo
from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.checkpoint.state import ForeignState
from ofa_ds.config import load_recipe, recipe_to_dict
from ofa_ds.convert.weights import shapes_of
from ofa_ds.model.config import model_config

pytestmark = pytest.mark.long

WORKER = Path(__file__).with_name("pieces_worker.py")
TIMEOUT_S = 3000
"""Twenty steps in full depth are 600 s of a processor, which others may use too."""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pieces")
    official(folder)
    return launch(folder, 2, "started", "built", "recomputed", worker=WORKER)


def official(folder: Path) -> None:
    """folder/official, as OFA-Sys publishes weights."""
    recipe = load_recipe("pretrain-6b", START_MODEL)
    parameters, buffers = shapes_of(model_config(recipe, START_VOCAB))
    state = ForeignState(
        tensors={name: TensorInfo(shape=shape) for name, shape in parameters.items()}, buffers=buffers,
        facts=Facts(state=NO_STEPS, rng_ranks=0, extra={"recipe": recipe_to_dict(recipe), "identity": {}}),
        read=lambda name, kind, start, numel: torch.full((numel,), start_value(name)),
        buffer=lambda name: torch.zeros(buffers[name]),
    )  # fmt: skip
    write_checkpoint(folder / "ours", state, ranks=1, stage=3)
    cli = (sys.executable, "-m", "ofa_ds.cli", "checkpoint", "export", str(folder / "ours"), str(folder / "official"))
    subprocess.run([*cli, "--format", "huggingface"], check=True, capture_output=True)


def test_building_holds_no_more_than_a_ranks_share_and_one_matrix(two_ranks):
    found = two_ranks["built"]
    assert found["share"] < 0.51 * found["whole"] and found["largest"] < 0.1 * found["whole"]
    assert found["most"] <= found["share"] + found["buffers"] + 1.05 * found["largest"]
    assert found["now"] >= found["share"], "all that is held is seen"


def test_a_start_from_official_weights_reads_them_in_pieces(two_ranks):
    found = two_ranks["started"]
    assert found["wrong"] == []
    assert found["whole"] > 250e6
    assert found["grown"] < 0.25 * found["whole"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_each_layer_changes_no_bit_of_losses_gradients_and_weights(two_ranks, precision):
    case = next(case for case in two_ranks["recomputed"] if case["precision"] == precision)
    assert case["losses"] == case["again"] and case["apart"] == []
    assert case["calls"] == [2, 4] and case["tensors"] > 200


def test_a_second_copy_of_the_weights_and_fewer_calls_on_the_host_change_no_bit(tmp_path):
    """On 4 ranks, two of which hold a copy between them; also after a checkpoint was loaded."""
    found = launch(tmp_path, 4, "second_copy", worker=WORKER)["second_copy"]
    for case in found.values():
        assert case["losses"] == found["without"]["losses"] and case["apart"] == []
    assert {name: case["copies"] > 0 for name, case in found.items()} == {
        "without": False, "with": True, "DeepSpeed's own": True,
    }  # fmt: skip


def check_whole_way(folder: Path, jobs: tuple[str, str], steps: int, saved: int) -> None:
    result = launch(folder, 3, jobs[0], worker=WORKER, timeout_s=TIMEOUT_S)[jobs[0]]
    assert result["depth"] == [36, 24, 24]
    assert len(result["losses"]) == steps and result["losses"][-1] < result["losses"][0]
    assert result["again"] == result["losses"][saved:] and result["apart"] == []
    moved = launch(folder, 2, jobs[1], worker=WORKER, timeout_s=TIMEOUT_S)[jobs[1]]
    assert moved["losses"] == pytest.approx(result["losses"][saved:], rel=1e-5)


def test_the_6b_in_full_depth_trains_goes_on_to_the_same_bits_and_moves_from_3_ranks_to_2(tmp_path):
    check_whole_way(tmp_path, ("whole", "moved"), STEPS, SAVED)


@pytest.mark.slow
def test_twenty_steps_of_the_6b_in_full_depth(tmp_path):
    check_whole_way(tmp_path, ("long", "long_moved"), LONG_STEPS, LONG_SAVED)

"""Conversions stream: no process grows by half a gigabyte, though the model is larger than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peak_memory import peak_MiB

from ofa_ds.checkpoint.format import NO_STEPS, Facts, TensorInfo
from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.checkpoint.state import ForeignState
from ofa_ds.config import load_recipe, recipe_to_dict
from ofa_ds.convert.weights import shapes_of
from ofa_ds.model.config import preset

BOUND_MiB = 512
INTERPRETER = "import torch, ofa_ds.convert.commands"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint of base, weights alone: 182 M parameters, 0.73 GB."""
    parameters, buffers = shapes_of(preset("base"))
    extra = {"recipe": recipe_to_dict(load_recipe("pretrain-base")), "identity": {"data": None, "vocab": None}}
    state = ForeignState(
        tensors={name: TensorInfo(shape=shape) for name, shape in parameters.items()},
        buffers=buffers,
        facts=Facts(state=NO_STEPS, rng_ranks=0, extra=extra),
        read=lambda name, kind, start, numel: torch.full((numel,), 0.5),
        buffer=lambda name: torch.zeros(
            buffers[name], dtype=torch.int64 if name.endswith("tracked") else torch.float32
        ),
    )
    return write_checkpoint(tmp_path_factory.mktemp("memory") / "base", state, ranks=2, stage=3)


@pytest.mark.parametrize("kind", ["huggingface", "modelscope", "fairseq", "deepspeed"])
def test_out_and_in_again_takes_less_than_the_model(base, tmp_path, kind):
    idle = peak_MiB("-c", INTERPRETER)
    cli = ("-m", "ofa_ds.cli", "checkpoint")
    out = peak_MiB(*cli, "export", str(base), str(tmp_path / "out"), "--format", kind)
    back = peak_MiB(*cli, "import", str(tmp_path / "out"), str(tmp_path / "back"), "--ranks", "3")
    assert out - idle < BOUND_MiB and back - idle < BOUND_MiB


def test_resharding_takes_less_than_the_model(base, tmp_path):
    cli = ("-m", "ofa_ds.cli", "checkpoint")
    idle = peak_MiB("-c", "import ofa_ds.cli")
    grown = peak_MiB(*cli, "reshard", str(base), str(tmp_path / "cut"), "--ranks", "8") - idle
    assert grown < BOUND_MiB

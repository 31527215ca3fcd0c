"""Building the model: whole, or in pieces, so that no process ever holds more than one matrix of it in full."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from ofa_ds.engine.deepspeed_import import deepspeed as _deepspeed


def construct(make_model: Callable[[], nn.Module], config: Mapping[str, Any], *, in_pieces: bool) -> nn.Module:
    """The model of `make_model`, with the values that it draws; all ranks call it together.

    config: what DeepSpeed gets (`derive_config`). in_pieces: each module's own parameters are cut among the ranks as
    soon as the module is built, in the precision of the training; of a model of n elements a rank then never holds more
    than n / ranks and the largest matrix. Raises ValueError where that is asked for below ZeRO stage 3.
    """
    if in_pieces and config["zero_optimization"].get("stage") != 3:
        raise ValueError("building a model in pieces (zero_init) needs ZeRO stage 3")
    with _deepspeed.zero.Init(config_dict_or_path=config) if in_pieces else nullcontext():
        return make_model()

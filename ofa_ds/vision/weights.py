"""Weights of a network as files give them: read, and held against those that it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError, one line: no such file, or a damaged one."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_file(path)
    except Exception as error:  # the library's own class has no stable place
        raise ValueError(f"{path}: damaged: {' '.join(str(error).split())}; copy or make it again") from error


def check_weights(place: Path | str, model: Any, weights: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError, one line, where they are not finite values of `model`'s names and shapes.

    place: of the weights; what: the model is, for messages.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in weights:
            raise ValueError(f"{place}: {name} is missing; want {what}")
        if (found := tuple(weights[name].shape)) != shape:
            raise ValueError(f"{place}: {name}: want shape {list(shape)} of {what}, got {list(found)}")
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"{place}: {name}: has values that are not finite; copy it again")
    if more := sorted(set(weights) - set(wanted)):
        raise ValueError(f"{place}: {more[0]} is no weight of {what}")

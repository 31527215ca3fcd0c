"""What an engine holds for good, by what it is for: to say what memory is full of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

from ofa_ds.engine import state as engine_state

_DEPTH = 3
"""Lists in lists in lists: DeepSpeed keeps buffers by group and by sub-group."""


def held(wrapped: Any) -> Iterator[tuple[str, Tensor]]:
    """(what for, tensor); one that is held twice comes twice. wrapped: DeepSpeed's engine."""
    for parameter in wrapped.module.parameters():
        yield "weights", parameter.data
        if getattr(parameter, "ds_tensor", None) is not None:  # its part; `data` is the whole, where gathered
            yield "weights", parameter.ds_tensor
        if parameter.grad is not None:
            yield "gradients", parameter.grad
    for buffer in wrapped.module.buffers():
        yield "running statistics", buffer
    for entry in engine_state.base(wrapped).state.values():
        for each in _tensors(entry):
            yield "moments of the optimizer", each
    for each in engine_state.masters(wrapped):
        yield "fp32 weights of the optimizer", each
        if each.grad is not None:
            yield "fp32 gradients", each.grad
    for owner in (wrapped.optimizer, getattr(wrapped.optimizer, "parameter_offload", None), wrapped):
        for name, value in list(vars(owner).items()) if owner is not None else ():
            for each in _tensors(value):
                yield f"DeepSpeed's {name.strip('_').replace('_', ' ')}", each


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors(each, depth - 1)
    elif depth and isinstance(value, dict):
        for each in list(value.values()):
            yield from _tensors(each, depth - 1)
    elif depth and is_dataclass(value):  # a bucket of gradients
        for each in list(vars(value).values()):
            yield from _tensors(each, depth - 1)

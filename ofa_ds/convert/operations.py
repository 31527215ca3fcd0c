"""Changes of a model's tables that are asked for by name: more vocabulary, another grid of picture positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa_ds.checkpoint.format import TensorInfo
from ofa_ds.checkpoint.state import ForeignState, TrainingState
from ofa_ds.model.positions import num_image_rows

_EMBEDDING = "encoder.embed_tokens.weight"
_SEED = 1


def grow_vocabulary(state: TrainingState, rows: int) -> ForeignState:
    """Rows appended to the vocabulary, drawn from N(0, D^-0.5) with a fixed seed, as the original does.

    docs/ofa.md, Foreign files: larger tables.

    Raises ValueError where there are more rows already, or moments that new rows would lack.
    """
    have, dim = state.tensors[_EMBEDDING].shape
    if have > rows:
        raise ValueError(f"--grow-vocab {rows}: the model has {have} vocabulary rows already; rows are never removed")
    _refuse_moments(state, "--grow-vocab")
    drawn = torch.empty(rows - have, dim).normal_(std=dim**-0.5, generator=torch.Generator().manual_seed(_SEED))

    def grown(old: Tensor) -> Tensor:
        return torch.cat([old, drawn])

    return _changed(state, {_EMBEDDING: (grown, (rows, dim))})


def resize_image_positions(state: TrainingState, bucket_size: int) -> ForeignState:
    """Tables for a grid of `bucket_size` x `bucket_size` patches, bicubically interpolated from the present grid.

    The rows of the start token of image codes stay as they are. Raises ValueError where there are moments.
    """
    _refuse_moments(state, "--image-positions")
    changes: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {}
    for name, info in state.tensors.items():
        if name.endswith("embed_image_positions.weight"):
            shape = (bucket_size**2 + 1, info.shape[1])
            changes[name] = (lambda old: torch.cat([old[:1], _resized(old[1:], bucket_size)]), shape)
        elif "image_rel_pos_table_list" in name:
            side = 2 * bucket_size - 1
            shape = (num_image_rows(bucket_size), info.shape[1])
            changes[name] = (lambda old: torch.cat([_resized(old[:-3], side), old[-3:]]), shape)  # noqa: B023
    return _changed(state, changes)


def _resized(table: Tensor, side: int) -> Tensor:
    """[n * n, D] -> [side * side, D]."""
    old = round(len(table) ** 0.5)
    if old == side:
        return table
    grid = table.T.reshape(1, table.shape[1], old, old)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized[0].reshape(table.shape[1], side * side).T.contiguous()


def _changed(
    state: TrainingState, changes: Mapping[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]
) -> ForeignState:
    """The state with some tensors computed from their old values."""
    tables: dict[tuple[str, str], Tensor] = {}
    tensors = dict(state.tensors)
    for name, (change, shape) in changes.items():
        info = state.tensors[name]
        tensors[name] = dataclasses.replace(info, shape=shape)
        for kind in info.kinds:
            old = state.read(name, kind, 0, info.numel).reshape(info.shape)
            tables[name, kind] = change(old).reshape(-1)

    def read(name: str, kind: str, start: int, numel: int) -> Tensor:
        if (name, kind) in tables:
            return tables[name, kind][start : start + numel]
        return state.read(name, kind, start, numel)

    return ForeignState(
        tensors=tensors, buffers=state.buffers, ema_buffers=state.ema_buffers, facts=state.facts,
        read=read, buffer=state.buffer, ema_buffer=state.ema_buffer,
    )  # fmt: skip


def _refuse_moments(state: TrainingState, operation: str) -> None:
    def with_moments(info: TensorInfo) -> bool:
        return any(kind.startswith("exp_avg") for kind in info.kinds)

    if any(with_moments(info) for info in state.tensors.values()):
        raise ValueError(
            f"{operation}: the state has Adam's moments, which the new rows would lack; import weights only"
        )

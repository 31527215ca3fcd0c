"""A packed batch as one run of bytes, to hand it from process to process, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.places import TENSORS, Places, all_count

ALIGNMENT = 64
"""Bytes; every tensor of a packed buffer starts at a multiple."""

Layout = list[tuple[str, torch.dtype, tuple[int, ...], int]]
"""Per tensor: field of Batch or of its places, dtype, shape, first byte."""


def to_buffer(batch: Batch) -> tuple[Tensor, Layout]:
    """All tensors of a batch and its places in one uint8 tensor, and where they are in it."""
    layout, parts, end = [], [], 0
    for name, tensor in _tensors(batch):
        layout.append((name, tensor.dtype, tuple(tensor.shape), end))
        if tensor.numel():  # an empty one may have strides that no view allows
            parts.append((end, tensor.contiguous().reshape(-1).view(torch.uint8)))
        end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8)
    for start, part in parts:
        buffer[start : start + part.numel()] = part
    return buffer, layout


def from_buffer(buffer: Tensor, layout: Layout) -> Batch:
    """The batch again; its tensors are views of `buffer`."""
    fields: dict[str, Tensor | tuple[Tensor, ...]] = dict.fromkeys(_TUPLES, ())
    for name, dtype, shape, start in layout:
        size = torch.Size(shape).numel() * dtype.itemsize
        tensor = buffer[start : start + size].view(dtype).view(shape)
        fields[name] = (*fields[name], tensor) if name in _TUPLES else tensor
    places = {name: fields.pop(name) for name in TENSORS}
    batch = Batch(**fields)
    return batch.with_places(Places(all_images_count=all_count(batch.image_weight), **places))


_TUPLES = frozenset({"images", "image_holes", "image_weight"})


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for each in dataclasses.fields(batch):
        value = getattr(batch, each.name)
        for tensor in value if isinstance(value, tuple) else (value,):
            yield each.name, tensor
    for name in TENSORS:
        yield name, getattr(batch.places, name)

"""A packed batch as one run of bytes, to hand it from process to process, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.places import TENSORS, Places, all_count

ALIGNMENT = 64
"""Bytes; every tensor of a packed buffer starts at a multiple."""

Layout = list[tuple[str, torch.dtype, tuple[int, ...], int]]
"""Per tensor: field of Batch or of its places, dtype, shape, first byte."""


class Packing(NamedTuple):
    """Where the tensors of a batch go, before there is room for them."""

    layout: Layout
    size: int
    """Bytes of all."""
    tensors: list[Tensor]

    def write(self, buffer: Tensor) -> None:
        """Into `buffer` [size] uint8; the only copy on a batch's way to another process."""
        target = buffer.numpy()  # by numpy, which takes a quarter of torch's time for the many small ones
        for (_, _, _, start), tensor in zip(self.layout, self.tensors, strict=True):
            if tensor.numel():
                part = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
                target[start : start + len(part)] = part


def packing(batch: Batch) -> Packing:
    """Of all tensors of a batch and its places."""
    layout, tensors, end = [], [], 0
    for name, tensor in _tensors(batch):
        layout.append((name, tensor.dtype, tuple(tensor.shape), end))
        tensors.append(tensor)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return Packing(layout, end, tensors)


def to_buffer(batch: Batch) -> tuple[Tensor, Layout]:
    """All tensors of a batch and its places in one uint8 tensor, and where they are in it."""
    packed = packing(batch)
    buffer = torch.empty(packed.size, dtype=torch.uint8)
    packed.write(buffer)
    return buffer, packed.layout


def from_buffer(buffer: Tensor, layout: Layout) -> Batch:
    """The batch again; its tensors are views of `buffer`, whose length is a multiple of ALIGNMENT."""
    fields: dict[str, Tensor | tuple[Tensor, ...]] = dict.fromkeys(_TUPLES, ())
    whole = {dtype: buffer.view(dtype) for dtype in {dtype for _, dtype, _, _ in layout}}
    for name, dtype, shape, start in layout:
        first = start // dtype.itemsize
        tensor = whole[dtype][first : first + math.prod(shape)]
        tensor = tensor if len(shape) == 1 else tensor.view(shape)
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

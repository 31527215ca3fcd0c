"""A micro-batch without padding: the tokens of all examples stand one after another, with offsets.

Legend: E examples, I images, G image sizes, P image tokens (patches), T source text tokens, N = P + T encoder tokens,
M decoder tokens. On the encoder axis an example is laid out [its patches | its text]; on the decoder axis it is a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofa_ds.data.example import Example
from ofa_ds.terms import GROUP_OF, GROUPS, TASKS

STAND_IN_VALUE = 128
"""Mid-grey, close to 0 after normalisation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tensors of one micro-batch. Index tensors are int64, offsets int32.

    Images come in G groups, one per image size, so that every rank calls the backbone once per size. The patches of
    all images are numbered through: group after group, image after image, row-major in the feature map.
    """

    images: tuple[Tensor, ...]
    """G x [I_g, 3, h, w]: uint8 pixels, or floats that are already normalised."""
    image_holes: tuple[Tensor, ...]
    """G x [I_g, 4] int32 (y0, x0, y1, x1): set to 0 after normalisation; all zero for none."""
    image_weight: tuple[Tensor, ...]
    """G x [I_g] float32: 1, or 0 for a stand-in that must not count in BatchNorm statistics."""

    patch_index: Tensor
    """[P] row of the numbered-through patches that this image token shows."""
    patch_position: Tensor
    """[P] image position id r * image_bucket_size + c + 1."""
    patch_slot: Tensor
    """[P] place on the encoder axis."""
    source_tokens: Tensor
    """[T] vocabulary ids."""
    source_position: Tensor
    """[T] index within the example's text, from 0."""
    source_slot: Tensor
    """[T] place on the encoder axis."""
    encoder_offsets: Tensor
    """[E + 1] int32: example e owns encoder tokens encoder_offsets[e] : encoder_offsets[e + 1]."""
    num_patches: Tensor
    """[E] int32: how many of them are image tokens; they come first."""

    decoder_tokens: Tensor
    """[M] previous output tokens, bos first."""
    decoder_position: Tensor
    """[M] index within the example's target, from 0."""
    decoder_offsets: Tensor
    """[E + 1] int32."""
    targets: Tensor
    """[M] ids to predict; the pad id (1) where there is no loss."""
    loss_weight: Tensor
    """[M] float32: the example's confidence."""
    code_mask: Tensor
    """[E] bool: the target is a run of image codes (other positions, other norm)."""
    task: Tensor
    """[E] int64, index into `terms.TASKS`."""
    group: Tensor
    """[E] int64, index into `terms.GROUPS`: whose token count divides this example's loss."""

    @property
    def num_examples(self) -> int:
        return self.code_mask.shape[0]

    @property
    def num_tokens(self) -> int:
        """Encoder and decoder tokens together."""
        return self.patch_index.shape[0] + self.source_tokens.shape[0] + self.decoder_tokens.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with every tensor on `device`."""

        def move(value: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            if isinstance(value, tuple):
                return tuple(tensor.to(device, non_blocking=non_blocking) for tensor in value)
            return value.to(device, non_blocking=non_blocking)

        return Batch(**{field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)})


def pack(
    examples: Sequence[Example], image_sizes: Sequence[tuple[int, int]], patch_size: int, image_bucket_size: int
) -> Batch:
    """The examples of one micro-batch as one `Batch`.

    image_sizes: (h, w) of each image group; repeated sizes are one group. An image object that several examples share
    is packed once; a size with no image gets a stand-in of weight 0, so that every rank calls the backbone alike.
    Raises ValueError: an image of another size, one that does not divide into patches, or a feature map larger than the
    position table.
    """
    sizes = list(dict.fromkeys(image_sizes))
    for height, width in sizes:
        if height % patch_size or width % patch_size:
            side = max(height // patch_size, 1) * patch_size
            raise ValueError(
                f"a picture of {height} x {width} does not divide into patches of {patch_size} x {patch_size}; "
                f"use a size such as {side} for data.image_size and data.infill_image_size"
            )
        if max(height, width) // patch_size > image_bucket_size:
            raise ValueError(
                f"a picture of {height} x {width} has more than {image_bucket_size} rows or columns of {patch_size} x "
                f"{patch_size} patches; the position table ends there; use a smaller data.image_size"
            )
    images, first_patch = _collect_images(examples, sizes, patch_size)
    return Batch(
        **images, **_encoder_axis(examples, first_patch, patch_size, image_bucket_size), **_decoder_axis(examples)
    )


def _collect_images(
    examples: Sequence[Example], sizes: list[tuple[int, int]], patch_size: int
) -> tuple[dict[str, tuple[Tensor, ...]], list[int]]:
    """The image fields of a batch, and the number of the first patch of each example's picture (-1: none)."""
    groups: list[list[Example]] = [[] for _ in sizes]
    place_of: dict[tuple[int, object], tuple[int, int]] = {}
    places: list[tuple[int, int] | None] = []
    for example in examples:
        if example.image is None:
            places.append(None)
            continue
        key = (id(example.image), example.hole)
        if key not in place_of:
            size = example.image.shape[:2]
            if size not in sizes:
                raise ValueError(
                    f"{example.task} row {example.row_id}: picture of {size[0]} x {size[1]}, want one of {sizes}"
                )
            group = sizes.index(size)
            place_of[key] = group, len(groups[group])
            groups[group].append(example)
        places.append(place_of[key])

    patches_per_image = [(height // patch_size) * (width // patch_size) for height, width in sizes]
    counts = [max(len(group), 1) * patches for group, patches in zip(groups, patches_per_image, strict=True)]
    starts = np.cumsum([0, *counts])
    fields = {
        "images": tuple(_stack(group, size) for group, size in zip(groups, sizes, strict=True)),
        "image_holes": tuple(
            torch.tensor([example.hole or (0, 0, 0, 0) for example in group] or [(0, 0, 0, 0)], dtype=torch.int32)
            for group in groups
        ),
        "image_weight": tuple(torch.ones(len(group)) if group else torch.zeros(1) for group in groups),
    }
    return fields, [-1 if p is None else int(starts[p[0]]) + p[1] * patches_per_image[p[0]] for p in places]


def _stack(group: list[Example], size: tuple[int, int]) -> Tensor:
    """uint8 [I, 3, h, w]."""
    if not group:
        return torch.full((1, 3, *size), STAND_IN_VALUE, dtype=torch.uint8)
    out = np.empty((len(group), 3, *size), np.uint8)
    for i, example in enumerate(group):
        out[i] = example.image.transpose(2, 0, 1)
    return torch.from_numpy(out)


def _encoder_axis(
    examples: Sequence[Example], first_patch: list[int], patch_size: int, image_bucket_size: int
) -> dict[str, Tensor]:
    """Image and text tokens of the encoder: each example is [its patches | its text]."""
    index, position, patch_slot, source_slot, num_patches, offsets = [], [], [], [], [], [0]
    for example, first in zip(examples, first_patch, strict=True):
        patches = _NO_IDS if example.image is None else example.patches
        if patches is None:
            patches = np.arange((example.image.shape[0] // patch_size) * (example.image.shape[1] // patch_size))
        columns = 1 if example.image is None else example.image.shape[1] // patch_size
        start, text_start, end = (
            offsets[-1],
            offsets[-1] + len(patches),
            offsets[-1] + len(patches) + len(example.source),
        )
        index.append(patches + first)
        position.append(patches // columns * image_bucket_size + patches % columns + 1)
        patch_slot.append(np.arange(start, text_start))
        source_slot.append(np.arange(text_start, end))
        num_patches.append(len(patches))
        offsets.append(end)
    return {
        "patch_index": _join(index),
        "patch_position": _join(position),
        "patch_slot": _join(patch_slot),
        "source_tokens": _join([example.source for example in examples]),
        "source_position": _join([np.arange(len(example.source)) for example in examples]),
        "source_slot": _join(source_slot),
        "encoder_offsets": torch.tensor(offsets, dtype=torch.int32),
        "num_patches": torch.tensor(num_patches, dtype=torch.int32),
    }


def _decoder_axis(examples: Sequence[Example]) -> dict[str, Tensor]:
    lengths = np.array([len(example.target) for example in examples], np.int64)
    weights = np.array([example.conf for example in examples], np.float32)
    groups = [GROUP_OF[example.task] for example in examples]
    return {
        "decoder_tokens": _join([example.prev for example in examples]),
        "decoder_position": _join([np.arange(length) for length in lengths]),
        "decoder_offsets": torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
        "targets": _join([example.target for example in examples]),
        "loss_weight": torch.from_numpy(np.repeat(weights, lengths)),
        "code_mask": torch.tensor([example.code for example in examples], dtype=torch.bool),
        "task": torch.tensor([TASKS.index(example.task) for example in examples], dtype=torch.int64),
        "group": torch.tensor([GROUPS.index(group) for group in groups], dtype=torch.int64),
    }


_NO_IDS = np.empty(0, np.int64)


def _join(arrays: list[np.ndarray]) -> Tensor:
    """int64, one run."""
    return torch.from_numpy(np.concatenate([_NO_IDS, *arrays]))

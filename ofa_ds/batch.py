"""A micro-batch without padding: the tokens of all examples stand one after another, with offsets.

Legend: E examples, I images, G image sizes, P image tokens (patches), T source text tokens, N = P + T encoder tokens,
M decoder tokens. On the encoder axis an example is laid out [its patches | its text]; on the decoder axis it is a run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ofa_ds.data.example import Example
from ofa_ds.places import Places, places_of
from ofa_ds.terms import GROUP_OF, GROUPS, TASKS

STAND_IN_VALUE = 128
"""Mid-grey, close to 0 after normalisation."""


class _Placed:
    """Room for the places of a batch. No field: what `dataclasses.replace` changes has places of its own."""

    __slots__ = ("_places",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(_Placed):
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
    allowed_ids: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[A] the ids that may come, position after position; empty where nothing is constrained."""
    allowed_offsets: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[M + 1] position m may have allowed_ids[allowed_offsets[m] : allowed_offsets[m + 1]], any id where that is
    empty; [0] where nothing is constrained."""

    encoder_of: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[E] which example of the encoder axis each run of the decoder reads, where several read one (the hypotheses of
    SCST): code_mask, task, group and decoder_offsets are then of runs. Empty: each reads its own."""
    reference_bytes: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """UTF-8 of the examples' references, one after another; empty where none were packed."""
    reference_offsets: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[R + 1] where each reference begins and the last ends."""
    num_references: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[E] how many each example has."""

    @property
    def num_examples(self) -> int:
        return self.code_mask.shape[0]

    @property
    def num_tokens(self) -> int:
        """Encoder and decoder tokens together."""
        return self.patch_index.shape[0] + self.source_tokens.shape[0] + self.decoder_tokens.shape[0]

    @property
    def places(self) -> Places:
        """What the contents alone tell. `pack` finds it; else found when first asked for, which waits for a GPU."""
        known = getattr(self, "_places", None)
        return known if known is not None else self.with_places(places_of(self)).places

    def with_places(self, places: Places) -> Batch:
        """This very batch, whose places are now known."""
        object.__setattr__(self, "_places", places)  # the one thing that is found after the batch is made
        return self

    def to(self, device: torch.device | str) -> Batch:
        """The same batch and its places with every tensor on `device`; the host does not wait for that."""
        target = torch.device(device)
        if target == self.targets.device:
            return self

        def move(tensor: Tensor) -> Tensor:
            if target.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
                tensor = tensor.pin_memory()  # else the copy would be waited for
            return tensor.to(target, non_blocking=target.type != "cpu")

        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: tuple(map(move, x)) if isinstance(x, tuple) else move(x) for name, x in values.items()}
        return Batch(**moved).with_places(self.places.map(move))


def pack(
    examples: Sequence[Example],
    image_sizes: Sequence[tuple[int, int]],
    patch_size: int,
    image_bucket_size: int,
    *,
    references: bool = False,
) -> Batch:
    """The examples of one micro-batch as one `Batch`.

    references: pack those too, for `references_of`.
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
    batch = Batch(
        **images, **_encoder_axis(examples, first_patch, patch_size, image_bucket_size), **_decoder_axis(examples),
        **(pack_references([[text for text, _ in each.references] for each in examples]) if references else {}),
    )  # fmt: skip
    return batch.with_places(places_of(batch))


def references_of(batch: Batch) -> list[list[str]]:
    """The texts of each example's references, of a batch packed with them."""
    data, ends = batch.reference_bytes.cpu().numpy().tobytes(), batch.reference_offsets.tolist()
    texts = (data[start:end].decode() for start, end in zip(ends, ends[1:], strict=False))
    return [list(itertools.islice(texts, count)) for count in batch.num_references.tolist()]


def pack_references(references: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """The fields of a batch that hold the references of its examples."""
    encoded = [text.encode() for texts in references for text in texts]
    return {
        "reference_bytes": torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8)),
        "reference_offsets": torch.from_numpy(np.cumsum([0, *map(len, encoded)], dtype=np.int64)),
        "num_references": torch.tensor([len(texts) for texts in references], dtype=torch.int64),
    }


def repeated(batch: Batch, times: int) -> Batch:
    """The examples of a batch `times` times, one copy of all after the other; pictures are held, and seen, once."""
    num_encoder, num_decoder = int(batch.encoder_offsets[-1]), int(batch.decoder_offsets[-1])

    def shifted(tensor: Tensor, by: int) -> Tensor:
        return torch.cat([tensor + by * copy for copy in range(times)])

    def offsets(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:1], shifted(tensor[1:], int(tensor[-1]))])

    changed = {
        "patch_slot": shifted(batch.patch_slot, num_encoder),
        "source_slot": shifted(batch.source_slot, num_encoder),
        "encoder_offsets": offsets(batch.encoder_offsets),
        "decoder_offsets": offsets(batch.decoder_offsets),
    }
    if len(batch.allowed_offsets) == num_decoder + 1:
        changed["allowed_offsets"] = offsets(batch.allowed_offsets)
    for field in dataclasses.fields(batch):
        tensor = getattr(batch, field.name)
        if field.name not in changed and not isinstance(tensor, tuple):
            changed[field.name] = tensor.repeat(times)
    return dataclasses.replace(batch, **changed)


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
        **_allowed(examples),
        "code_mask": torch.tensor([example.code for example in examples], dtype=torch.bool),
        "task": torch.tensor([TASKS.index(example.task) for example in examples], dtype=torch.int64),
        "group": torch.tensor([GROUPS.index(group) for group in groups], dtype=torch.int64),
    }


def _allowed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """What may come at each decoder position; empty where no example says."""
    if not any(example.allowed for example in examples):
        return {}
    ids = [ids for example in examples for ids in example.allowed or [_NO_IDS] * len(example.target)]
    ends = np.cumsum([0, *(len(each) for each in ids)], dtype=np.int64)
    return {"allowed_ids": _join(ids), "allowed_offsets": torch.from_numpy(ends)}


_NO_IDS = np.empty(0, np.int64)


def _join(arrays: list[np.ndarray]) -> Tensor:
    """int64, one run."""
    return torch.from_numpy(np.concatenate([_NO_IDS, *arrays]))

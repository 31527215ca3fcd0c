"""What of a batch has a size or a value that only its contents tell: found where batches are packed, in the workers.

Found on a GPU, each of these would make the host wait for it: for a `unique`, a `nonzero`, a look at one number. Legend
as in `ofa_ds.batch`; R runs of the decoder, U and W distinct positions of pictures and of source texts, X and Y of
target texts and of image codes, C decoder tokens that have a loss, L encoder tokens that the runs read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ofa_ds.terms import PAD_ID


class PackedIds(Protocol):
    """What is read of a `Batch`: shapes and dtypes are told at `ofa_ds.batch.Batch`."""

    image_weight: tuple[Tensor, ...]
    patch_position: Tensor
    patch_slot: Tensor
    source_position: Tensor
    source_slot: Tensor
    encoder_offsets: Tensor
    num_patches: Tensor
    decoder_position: Tensor
    decoder_offsets: Tensor
    targets: Tensor
    code_mask: Tensor
    encoder_of: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Index tensors are int64. A function of the batch alone, whatever model reads it."""

    all_images_count: tuple[bool, ...]
    """Of each image group, known on the host: whether no weight is 0."""
    image_positions: Tensor
    """[U] distinct image position ids, ascending."""
    image_position: Tensor
    """[P] which of the U each image token has."""
    text_positions: Tensor
    """[W] distinct text positions, ascending."""
    text_position: Tensor
    """[T] which of the W each source token has."""
    encoder_row: Tensor
    """[N] row of [image tokens | source tokens] that stands at each place of the encoder axis."""
    encoder_position: Tensor
    """[N] which of [image_positions | text_positions] each encoder token has."""
    encoder_example: Tensor
    """[N]"""
    decoder_texts: Tensor
    """[X] distinct positions of tokens in text targets, ascending."""
    decoder_codes: Tensor
    """[Y] distinct positions of tokens in targets of image codes, ascending."""
    decoder_index: Tensor
    """[M] which of [decoder_texts | decoder_codes] each decoder token has."""
    decoder_example: Tensor
    """[M]"""
    counted: Tensor
    """[C] decoder tokens whose target is not pad, ascending."""
    memory_index: Tensor
    """[L] encoder token of each token that the runs read, run after run; empty where each run reads its own example."""
    memory_offsets: Tensor
    """[R + 1] int32: run r reads memory tokens memory_offsets[r] : memory_offsets[r + 1]; [0] where that is empty."""
    memory_patches: Tensor
    """[R] int32: how many of them are image tokens; empty where that is."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Places:
        """The same with every tensor changed."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Places(**{name: change(x) if isinstance(x, Tensor) else x for name, x in values.items()})


TENSORS = tuple(field.name for field in dataclasses.fields(Places) if field.name != "all_images_count")
"""Names of the fields that are tensors."""


def all_count(image_weight: tuple[Tensor, ...]) -> tuple[bool, ...]:
    """Of each image group, whether no weight is 0; waits for the device where they are on one."""
    return tuple(bool((weight > 0).all()) for weight in image_weight)


def places_of(batch: PackedIds) -> Places:
    """On the batch's device; waits for that where it is not the CPU."""
    device = batch.targets.device
    image_positions, image_P = _distinct(_numpy(batch.patch_position))
    text_positions, text_T = _distinct(_numpy(batch.source_position))
    slot_N = np.concatenate([_numpy(batch.patch_slot), _numpy(batch.source_slot)])
    row_N, position_N = np.empty_like(slot_N), np.empty_like(slot_N)
    row_N[slot_N] = np.arange(len(slot_N))
    position_N[slot_N] = np.concatenate([image_P, text_T + len(image_positions)])
    example_M, code_R = _owners(_numpy(batch.decoder_offsets)), _numpy(batch.code_mask)
    position_M, is_code_M = _numpy(batch.decoder_position), code_R[example_M]
    texts, text_M = _distinct(position_M[~is_code_M])
    codes, code_M = _distinct(position_M[is_code_M])
    index_M = np.empty_like(position_M)
    index_M[~is_code_M], index_M[is_code_M] = text_M, code_M + len(texts)
    index_L, offsets, patches_R = _memory(batch)
    found = {
        "image_positions": image_positions, "image_position": image_P, "text_positions": text_positions,
        "text_position": text_T, "encoder_row": row_N, "encoder_position": position_N,
        "encoder_example": _owners(_numpy(batch.encoder_offsets)), "decoder_texts": texts, "decoder_codes": codes,
        "decoder_index": index_M, "decoder_example": example_M,
        "counted": np.flatnonzero(_numpy(batch.targets) != PAD_ID), "memory_index": index_L,
        "memory_offsets": offsets.astype(np.int32), "memory_patches": patches_R.astype(np.int32),
    }  # fmt: skip
    tensors = {name: torch.tensor(array, device=device) for name, array in found.items()}
    return Places(all_images_count=all_count(batch.image_weight), **tensors)


def _memory(batch: PackedIds) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, offsets and patches of what the runs read; [], [0], [] where each reads its own example."""
    example_R, offsets = _numpy(batch.encoder_of), _numpy(batch.encoder_offsets).astype(np.int64)
    lengths_R = np.diff(offsets)[example_R]
    ends_R = lengths_R.cumsum()
    first_L = np.repeat(offsets[:-1][example_R] - ends_R + lengths_R, lengths_R)
    return first_L + np.arange(len(first_L)), np.concatenate([[0], ends_R]), _numpy(batch.num_patches)[example_R]


def _owners(offsets: np.ndarray) -> np.ndarray:
    """The example of each token."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct values, which of them each is)."""
    distinct, index = np.unique(values, return_inverse=True)
    return distinct, index.reshape(-1)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()

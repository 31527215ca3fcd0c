"""What the model reads of a packed batch: attributes of `ofa_ds.batch.Batch`, which it does not import."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ofa_ds.places import Places


class PackedInput(Protocol):
    """Shapes and dtypes are told at `ofa_ds.batch.Batch`."""

    images: tuple[Tensor, ...]
    image_holes: tuple[Tensor, ...]
    image_weight: tuple[Tensor, ...]
    patch_index: Tensor
    patch_position: Tensor
    patch_slot: Tensor
    source_tokens: Tensor
    source_position: Tensor
    source_slot: Tensor
    encoder_offsets: Tensor
    num_patches: Tensor
    decoder_tokens: Tensor
    decoder_position: Tensor
    decoder_offsets: Tensor
    targets: Tensor
    code_mask: Tensor
    allowed_ids: Tensor
    allowed_offsets: Tensor
    encoder_of: Tensor

    @property
    def places(self) -> Places: ...

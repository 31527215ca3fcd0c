"""A micro-batch without padding: the tokens of all examples stand one after another, with offsets.

Legend: E examples, I images, G image sizes, P image tokens (patches), T source text tokens, N = P + T encoder tokens,
M decoder tokens. On the encoder axis each example is laid out [its patches | its text]; on the decoder axis it is one run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """[E] int64, index into `config.TASKS`."""
    group: Tensor
    """[E] int64, index into `config.GROUPS`: whose token count divides this example's loss."""

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

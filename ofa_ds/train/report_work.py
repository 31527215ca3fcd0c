"""Useful operations of a micro-batch on the host: what TFLOP/s and MFU of a run's records are made of.

Forward and backward of the rows' own tokens and pictures (`ofa_ds.plan.flops`). Nothing that is computed twice counts,
under activation checkpointing or in a kernel, and neither do stand-ins: pictures of weight 0, which make every rank
call the backbone alike. Tokens have no padding here, by construction; the edges of a kernel's tiles are in no figure.
"""

from __future__ import annotations

import numpy as np

from ofa_ds.batch import Batch
from ofa_ds.config import Recipe
from ofa_ds.model.config import ModelConfig
from ofa_ds.plan.flops import Sums, UsefulFlops
from ofa_ds.train.metrics import Flops


class WorkCounter:
    """`counter(batch)` -> Flops of a micro-batch whose tensors are on the host; tens of microseconds."""

    def __init__(self, config: ModelConfig, *, copies: int = 1, frozen_embedding: bool = False) -> None:
        """copies: how often each example is computed (R-Drop: 2); its picture goes through the backbone once."""
        self._useful = UsefulFlops(config, frozen_embedding=frozen_embedding)
        self._copies, self._patch_size = copies, config.patch_size
        self._whole_grids = config.interpolate_position

    def __call__(self, batch: Batch) -> Flops:
        shown, stand_ins = [], []
        for pictures, weight, all_count in zip(
            batch.images, batch.image_weight, batch.places.all_images_count, strict=True
        ):
            count, (height, width) = len(weight), pictures.shape[2:]
            own = count if all_count else int(np.count_nonzero(weight.numpy()))
            shown.append((own, height, width))
            if own < count:
                stand_ins.append((count - own, height, width))
        padding = self._useful((0.0,) * len(Sums._fields), stand_ins) if stand_ins else 0.0
        return Flops(self._useful(self._sums(batch), shown), padding)

    def _sums(self, batch: Batch) -> Sums:
        """As `plan.flops.sums_of` has them of a plan's work."""
        places, copies = batch.places, self._copies
        encoder_E = np.diff(batch.encoder_offsets.numpy()).astype(np.float64)
        decoder_R = np.diff(batch.decoder_offsets.numpy()).astype(np.float64)
        memory_R = encoder_E[batch.encoder_of.numpy()] if len(batch.encoder_of) else encoder_E
        decoder = float(decoder_R.sum())
        positions = len(places.image_positions)
        if self._whole_grids:  # every group has the rows of its whole grid
            positions = sum(int(np.prod(each.shape[2:])) // self._patch_size**2 for each in batch.images)
        own = float(positions + len(places.text_positions))
        other = float(len(places.decoder_texts) + len(places.decoder_codes))
        return Sums(
            copies * float(len(batch.patch_index)), copies * float(encoder_E.sum()), copies * decoder,
            copies * float(memory_R.sum()), copies * float(len(places.counted)),
            copies * float(encoder_E @ encoder_E), copies * float(decoder_R @ (decoder_R + 1)) / 2,
            copies * float(decoder_R @ memory_R), own, other, own * own, other * other, own * other,
        )  # fmt: skip


def work_counter(recipe: Recipe, config: ModelConfig, copies: int) -> WorkCounter | None:
    """Of a run; None where an objective does work that is not counted: captions that SCST searches (copies 0)."""
    if not copies:
        return None
    return WorkCounter(config, copies=copies, frozen_embedding="token_embedding" in recipe.optim.freeze)

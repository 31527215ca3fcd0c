"""A model's image codes as pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ofa_ds.data.vocab import Vocab
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.tasks.context import PIXELS_PER_CODE, PaintCodes
from ofa_ds.vision.coder import Coder, load_coder
from ofa_ds.vision.scenes_coder import ScenesCoder, names_scenes


def that_paints(model: LoadedModel, vqgan: Path | None) -> LoadedModel:
    """The model with a VQGAN, on its device, for what people look at; itself without one.

    Raises ValueError as `painter`.
    """
    if vqgan is None:
        return model
    paint = painter(vqgan, model.vocab, model.recipe.data.code_image_size, model.device)
    return dataclasses.replace(model, paint=paint)


def painter(vqgan: Path, vocab: Vocab, code_image_size: int, device: str | torch.device) -> PaintCodes:
    """Raises ValueError as `load_vqgan`, and for one with other codes than the vocabulary has."""
    coder = coder_of(vqgan, code_image_size, device)
    check_codes(coder, vocab, str(vqgan))

    def paint(answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return coder.paint([np.array(ids, np.int64) - vocab.code_start for ids in answers])

    return paint


def coder_of(vqgan: Path, code_image_size: int, device: str | torch.device) -> Coder | ScenesCoder:
    """vqgan: a directory, or "scenes" for the rule of scenes. Raises ValueError."""
    if names_scenes(vqgan):
        return ScenesCoder()
    return load_coder(vqgan, device=device, code_image_size=code_image_size)


def check_codes(coder: Coder | ScenesCoder, vocab: Vocab, name: str) -> None:
    """Raises ValueError where the VQGAN cannot be the one whose codes the vocabulary has."""
    if (coder.pixels_per_code, coder.num_codes) != (PIXELS_PER_CODE, vocab.num_codes):
        raise ValueError(
            f"{name}: {coder.num_codes} codes of {coder.pixels_per_code} pixels each, want {vocab.num_codes}, which "
            f"the vocabulary has, of {PIXELS_PER_CODE}"
        )

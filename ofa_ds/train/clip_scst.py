"""Self-critical training of text to image: what the model paints is rewarded by CLIP, beside what else it paints.

Of each caption B samples (5 of OFA's, top-k) are painted by the VQGAN; the reward of one is 2.5 times CLIP's cosine of
picture and caption less the mean of the other B - 1. The rest is `ofa_ds.train.scst` (docs/ofa.md, Fine-tuning: SCST).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.config import Recipe
from ofa_ds.data.vocab import Vocab
from ofa_ds.inference.draws import SeededDraw
from ofa_ds.inference.generate import GenerationConfig, Hypothesis, generate
from ofa_ds.inference.painting import check_codes, coder_of
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.context import PIXELS_PER_CODE
from ofa_ds.tasks.downstream.text_to_image import caption_of
from ofa_ds.train.scst import SelfCritical, Tokens
from ofa_ds.vision.clip import load_clip, without_slashes

WEIGHT = 2.5
"""Of the cosine (Hessel et al. 2021)."""


class Coder(Protocol):
    def paint(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]: ...


class Clip(Protocol):
    def scores(self, images: Sequence[np.ndarray], text: str) -> Tensor: ...


class PaintingCritical(SelfCritical):
    """Learns from its own pictures. Its log has `reward`: the mean of all samples, before the baseline is taken off."""

    def __init__(self, coder: Coder, clip: Clip, vocab: Vocab, recipe: Recipe) -> None:
        criterion, num_codes = recipe.criterion, (recipe.data.code_image_size // PIXELS_PER_CODE) ** 2
        search = GenerationConfig(
            beams=criterion.scst_beams, min_len=num_codes, max_len_b=num_codes, gen_code=True, sampling=True,
            constraint_range=(vocab.code_start, vocab.bin_start), top_k=criterion.scst_top_k,
        )  # fmt: skip
        super().__init__(vocab, criterion, search)
        self._coder, self._clip, self._seed = coder, clip, recipe.train.seed

    def found(self, model: OFA, batch: Batch, step: int) -> list[list[Hypothesis]]:
        """Seeds follow from the step and the caption, so that ranks and accumulation change no sample."""
        captions = [zlib.crc32(caption.encode()) for caption in self.captions(batch)]
        seeds = [(self._seed, step, caption, k) for caption in captions for k in range(self._search.beams)]
        return generate(model, batch, self._search, draw=SeededDraw(seeds))

    def scored(self, batch: Batch, hypotheses: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        """Each picture beside its caption."""
        start = self._vocab.code_start
        painted = iter(self._coder.paint([np.array(run[:-1], np.int64) - start for each in hypotheses for run in each]))
        return [
            [WEIGHT * score for score in self._clip.scores([next(painted) for _ in each], caption).tolist()]
            for each, caption in zip(hypotheses, self.captions(batch), strict=True)
        ]

    def captions(self, batch: Batch) -> list[str]:
        """What CLIP reads of each example's source."""
        lengths = (batch.encoder_offsets.diff() - batch.num_patches).tolist()
        sources = torch.split(batch.source_tokens.cpu(), lengths)
        return [without_slashes(caption_of(self._vocab.decode(source[1:-1].tolist()))) for source in sources]


def painting_critical(recipe: Recipe, vocab: Vocab, device: torch.device) -> PaintingCritical:
    """As the recipe says; VQGAN and CLIP are on this rank's `device`.

    Raises ValueError where they are none, or the VQGAN is of other codes than the vocabulary.
    """
    path = recipe.criterion.scst_vqgan
    coder = coder_of(Path(path), recipe.data.code_image_size, device)
    check_codes(coder, vocab, f"criterion.scst_vqgan {path}")
    return PaintingCritical(coder, load_clip(recipe.criterion.scst_clip, device), vocab, recipe)

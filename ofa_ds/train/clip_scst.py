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
from ofa_ds.inference.painting import check_codes
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.context import PIXELS_PER_CODE
from ofa_ds.train.criteria import Criterion
from ofa_ds.train.objective import TaskLoss
from ofa_ds.train.scst import SelfCritical, Tokens
from ofa_ds.vision.clip import caption_of_source, load_clip
from ofa_ds.vision.coder import load_coder, this_device

KIND = "clip_scst"
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
        TaskLoss.__init__(self, Criterion(constraint_range=criterion.constraint_range or None))
        self.copies = 0
        self._coder, self._clip, self._vocab, self._seed = coder, clip, vocab, recipe.train.seed
        self._search = GenerationConfig(
            beams=criterion.scst_beams, min_len=num_codes, max_len_b=num_codes, gen_code=True, sampling=True,
            constraint_range=(vocab.code_start, vocab.bin_start), top_k=criterion.scst_top_k,
        )  # fmt: skip

    def found(self, model: OFA, batch: Batch, step: int) -> list[list[Hypothesis]]:
        """Seeds follow from the step and the caption, so that ranks and accumulation change no sample."""
        captions = [zlib.crc32(caption.encode()) for caption in self.captions(batch)]
        seeds = [(self._seed, step, caption, k) for caption in captions for k in range(self._search.beams)]
        return generate(model, batch, self._search, draw=SeededDraw(seeds))

    def scored(self, batch: Batch, hypotheses: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        """Each picture beside its caption."""
        return [
            [WEIGHT * score for score in self._clip.scores(self._painted(each), caption).tolist()]
            for each, caption in zip(hypotheses, self.captions(batch), strict=True)
        ]

    def _painted(self, hypotheses: Sequence[Tokens]) -> list[np.ndarray]:
        return self._coder.paint([np.array(tokens[:-1], np.int64) - self._vocab.code_start for tokens in hypotheses])

    def captions(self, batch: Batch) -> list[str]:
        """What CLIP reads of each example's source."""
        lengths = (batch.encoder_offsets.diff() - batch.num_patches).tolist()
        sources = torch.split(batch.source_tokens.cpu(), lengths)
        return [caption_of_source(self._vocab.decode(source[1:-1].tolist())) for source in sources]


def painting_critical(recipe: Recipe, vocab: Vocab) -> PaintingCritical:
    """As the recipe says. Raises ValueError where VQGAN or CLIP are not named, are none, or are of other codes."""
    check_paths(recipe)
    path, device = Path(recipe.criterion.scst_vqgan), this_device()
    coder = load_coder(path, device=device, code_image_size=recipe.data.code_image_size)
    check_codes(coder, vocab, f"criterion.scst_vqgan {path}")
    return PaintingCritical(coder, load_clip(recipe.criterion.scst_clip, device), vocab, recipe)


def check_paths(recipe: Recipe) -> None:
    """Raises ValueError."""
    for key, what in (
        ("scst_vqgan", "the VQGAN that the codes are of"),
        ("scst_clip", "weights of CLIP, which reward"),
    ):
        if not getattr(recipe.criterion, key):
            raise ValueError(f"criterion.{key}: want {what}, got none; add criterion.{key}=PATH")

"""Answers of tasks that paint, judged as pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ofa_ds.data.example import Example
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.tasks import judges
from ofa_ds.tasks.downstream.text_to_image import caption_of
from ofa_ds.vision.clip import without_slashes
from ofa_ds.vision.picture_scores import PictureJudge, ScoreFiles


class PaintedScores:
    """(examples, generated ids) -> CLIP score, FID and Inception score of what the model's VQGAN makes of them."""

    def __init__(self, model: LoadedModel, files: ScoreFiles) -> None:
        """model: one that paints. Says on stderr what is left out. Raises ValueError: a file is wrong."""
        self._paint = model.paint
        self._judge = PictureJudge(files, device=model.device, say=lambda line: print(line, file=sys.stderr))

    def __call__(self, asked: Sequence[Example], answers: judges.Answers, *, all_scores: bool) -> judges.Scores:
        """all_scores: not that of captions and pictures alone."""
        captions = [without_slashes(caption_of(example.source_text)) for example in asked]
        pictures = [self._paint(ids) for ids in answers]
        if not all_scores:
            return self._judge.clip_scores(pictures, captions)
        return self._judge.scores([[picture] for picture in pictures], captions)

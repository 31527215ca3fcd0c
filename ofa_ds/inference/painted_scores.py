"""Answers of tasks that paint, judged as pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from ofa_ds.data import scenes_judge
from ofa_ds.data.example import Example
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.tasks import judges
from ofa_ds.tasks.downstream.text_to_image import caption_of, said_of, scene_scores
from ofa_ds.vision.clip import without_slashes
from ofa_ds.vision.picture_scores import PictureJudge, ScoreFiles


class PaintedScores:
    """(examples, samples of each) -> scores of what the model's VQGAN makes of them: scenes, CLIP, FID, Inception."""

    def __init__(self, model: LoadedModel, files: ScoreFiles) -> None:
        """model: one that paints. Says on stderr what is left out. Raises ValueError: a file is wrong."""
        self._paint = model.paint
        self._judge = PictureJudge(files, device=model.device, say=lambda line: print(line, file=sys.stderr))

    def __call__(
        self, asked: Sequence[Example], samples: Sequence[judges.Answers], *, all_scores: bool
    ) -> judges.Scores:
        """samples: generated ids of each example, once or several times; each is painted once.

        all_scores: not that of captions and pictures alone.
        """
        said, seen = said_of(asked), []

        def paint(part: Sequence[Sequence[int]]) -> list[np.ndarray]:
            pictures = self._paint(part)
            if said is not None:
                seen.extend(map(scenes_judge.look_at, pictures))
            return pictures

        captions = [without_slashes(caption_of(example.source_text)) for example in asked]
        scores = self._judge.scores(samples, captions, paint=paint, clip_alone=not all_scores)
        if said is None:
            return scores
        found = iter(seen)
        return scene_scores(said, [[next(found) for _ in each] for each in samples]) | scores

"""What painted pictures are worth: CLIP score, FID and Inception score, each where its weights are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ofa_ds.progress import Progress
from ofa_ds.terms import CLIP_SCORE, FID, INCEPTION_SCORE, PICTURE_SCORES
from ofa_ds.vision import inception
from ofa_ds.vision.clip import Clip, load_clip

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class ScoreFiles:
    """What the user has; without a file the scores that need it are left out, and that is said."""

    clip: Path | None = None
    """OpenAI's ViT-B-16.pt, or another form that `load_clip` takes."""
    inception: Path | None = None
    """torch-fidelity's InceptionV3."""
    reference: Path | None = None
    """Pictures, or an .npz with mu and sigma, that FID compares with."""


NO_FILES = ScoreFiles()


class PictureJudge:
    """Everything that is named is loaded at once, so that a wrong file is told before pictures are painted."""

    def __init__(self, files: ScoreFiles, *, device: str | torch.device = "cpu", say: Say = print) -> None:
        """say: is told what is left out and which file it wants, a line each. Raises ValueError: a file is wrong."""
        self._say = say
        self._clip = self._network = self._reference = None
        if files.clip is None:
            say(f"no {CLIP_SCORE}: name CLIP's weights, OpenAI's ViT-B-16.pt or another form of them")
        else:
            self._clip = load_clip(files.clip, device)
        if files.inception is None:
            say(f"no {FID}, no {INCEPTION_SCORE}: name torch-fidelity's {inception.WEIGHTS}")
            return
        self._network = inception.Inception(files.inception, device)
        if files.reference is None:
            say(f"no {FID}: name what to compare with: pictures, or an .npz with mu and sigma")
        else:
            self._reference = inception.reference_statistics(files.reference, self._network)

    def scores(self, samples: Sequence[Sequence[np.ndarray]], captions: Sequence[str]) -> dict[str, float | None]:
        """{name: score} under PICTURE_SCORES; None without its file, and where pictures are too few, which is said.

        samples: of each caption, one picture uint8 RGB [H, W, 3] or several. Of several the one nearest to its caption
        counts, as in the original: the CLIP score is the mean of the largest cosines x 100, and the others look at that
        picture alone; without CLIP at the first.
        """
        if not samples or len(samples) != len(captions) or not all(map(len, samples)):
            raise ValueError(f"pictures to judge: {len(samples)} of {len(captions)} captions; want some of each")
        scores: dict[str, float | None] = dict.fromkeys(PICTURE_SCORES)
        chosen = [pictures[0] for pictures in samples]
        if self._clip is not None:
            scores[CLIP_SCORE], chosen = clip_score(self._clip, samples, captions)
        if self._network is None:
            return scores
        features, logits = self._network.features(chosen)
        if len(chosen) < inception.SPLITS:
            self._say(f"no {INCEPTION_SCORE}: want at least {inception.SPLITS} pictures, got {len(chosen)}")
        else:
            scores[INCEPTION_SCORE] = inception.inception_score(logits)[0]
        if self._reference is not None:
            scores[FID] = self._fid(features)
        return scores

    def _fid(self, features_ND: Tensor) -> float | None:
        if len(features_ND) < 2:
            self._say(f"no {FID}: want at least 2 pictures, got {len(features_ND)}")
            return None
        if len(features_ND) < inception.MIN_PICTURES:
            self._say(
                f"{FID} of {len(features_ND)} pictures is too large: {inception.MIN_PICTURES} features want as many; "
                "compare it with that of the same number alone"
            )
        return inception.fid(inception.statistics(features_ND), self._reference)

    def clip_scores(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, float | None]:
        """The CLIP score alone, of one picture of each caption; nothing without its file."""
        if self._clip is None:
            return {}
        return {CLIP_SCORE: clip_score(self._clip, [[picture] for picture in pictures], captions)[0]}


def clip_score(
    clip: Clip, samples: Sequence[Sequence[np.ndarray]], captions: Sequence[str]
) -> tuple[float, list[np.ndarray]]:
    """(mean over captions of the largest cosine x 100, the picture of each that has it)."""
    texts_BD = clip.text_features(captions)
    best, chosen = [], []
    progress = Progress(len(captions), "scoring by CLIP", "captions")
    try:
        for pictures, text_D in zip(samples, texts_BD, strict=True):
            cosines = clip.image_features(pictures) @ text_D
            place = int(cosines.argmax())
            best.append(float(cosines[place]))
            chosen.append(pictures[place])
            progress.add(1)
    finally:
        progress.close()
    return 100 * float(np.mean(best)), chosen

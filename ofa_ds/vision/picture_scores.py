"""What painted pictures are worth: CLIP score, FID and Inception score, each where its weights are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ofa_ds.progress import Progress
from ofa_ds.terms import BEST_OF, CLIP_SCORE, FID, INCEPTION_SCORE, PICTURE_SCORES
from ofa_ds.vision import inception
from ofa_ds.vision.clip import load_clip

Say = Callable[[str], object]
T = TypeVar("T")

TOGETHER = 64
"""Pictures that are held at once, unless a caption has more."""


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
            self._reference = inception.Reference(files.reference)

    def scores(
        self, samples: Sequence[Sequence[T]], captions: Sequence[str], *,
        paint: Callable[[Sequence[T]], Sequence[np.ndarray]] = list, clip_alone: bool = False,
    ) -> dict[str, float | None]:  # fmt: skip
        """{name: score} under PICTURE_SCORES; None without its file, and where pictures are too few, which is said.

        samples: of each caption, one picture uint8 RGB [H, W, 3] or several, or what `paint` makes pictures of, about
        TOGETHER at once. The CLIP score is the mean cosine of the first x 100. Of several there is that of the one
        nearest to its caption too, as in the original, with BEST_OF behind the name; FID and Inception score are then
        of that one. Without CLIP they are of the first. clip_alone: without these two.
        """
        if not samples or len(samples) != len(captions) or not all(map(len, samples)):
            raise ValueError(f"pictures to judge: {len(samples)} of {len(captions)} captions; want some of each")
        cosines: list[Tensor] = []
        seen: list[tuple[Tensor, Tensor]] = []
        with closing(Progress(len(captions), "judging pictures", "captions")) as progress:
            step = max(TOGETHER // max(map(len, samples)), 1)
            for start in range(0, len(samples), step):
                part = samples[start : start + step]
                counts = [len(each) for each in part]
                pictures = paint([one for each in part for one in each])
                firsts = best = np.cumsum([0, *counts[:-1]])
                if self._clip is not None:
                    texts_BD = self._clip.text_features(captions[start : start + step])
                    images_BD = torch.split(self._clip.image_features(pictures), counts)
                    cosines += [each_BD @ text_D for each_BD, text_D in zip(images_BD, texts_BD, strict=True)]
                    best = firsts + [int(each.argmax()) for each in cosines[-len(part) :]]
                if self._network is not None and not clip_alone:
                    seen.append(self._network.features([pictures[place] for place in best]))
                progress.add(len(part))
        number = max(map(len, samples)) if cosines else 1
        of_best = {name: f"{name}{BEST_OF}{number}" if number > 1 else name for name in PICTURE_SCORES}
        scores: dict[str, float | None] = dict.fromkeys((CLIP_SCORE, *of_best.values()))
        if cosines:
            scores[CLIP_SCORE] = 100 * float(np.mean([float(each[0]) for each in cosines]))
            scores[of_best[CLIP_SCORE]] = 100 * float(np.mean([float(each.max()) for each in cosines]))
        if seen:
            features, logits = (torch.cat(each) for each in zip(*seen, strict=True))
            scores[of_best[FID]], scores[of_best[INCEPTION_SCORE]] = self._fid(features), self._inception(logits)
        return scores

    def _inception(self, logits_NK: Tensor) -> float | None:
        if len(logits_NK) < inception.SPLITS:
            self._say(f"no {INCEPTION_SCORE}: want at least {inception.SPLITS} pictures, got {len(logits_NK)}")
            return None
        return inception.inception_score(logits_NK)[0]

    def _fid(self, features_ND: Tensor) -> float | None:
        if self._reference is None:
            return None
        if len(features_ND) < 2:
            self._say(f"no {FID}: want at least 2 pictures, got {len(features_ND)}")
            return None
        if len(features_ND) < inception.MIN_PICTURES:
            self._say(
                f"{FID} of {len(features_ND)} pictures is too large: {inception.MIN_PICTURES} features want as many; "
                "compare it with that of the same number alone"
            )
        return inception.fid(inception.statistics(features_ND), self._reference.statistics(self._network))

"""What painted pictures are worth: CLIP score, FID and Inception score, each where its weights are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ofa_ds.progress import Progress
from ofa_ds.vision import inception
from ofa_ds.vision.clip import Clip, load_clip

CLIP_SCORE, FID, INCEPTION_SCORE = "CLIP score", "FID", "Inception score"
NAMES = (CLIP_SCORE, FID, INCEPTION_SCORE)

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


def picture_scores(
    samples: Sequence[Sequence[np.ndarray]], captions: Sequence[str], files: ScoreFiles, *,
    device: str | torch.device = "cpu", say: Say = print,
) -> dict[str, float | None]:  # fmt: skip
    """{name: score} under NAMES; None where a file is not named or the pictures are too few. say: is told why, a line.

    samples: of each caption, one picture uint8 RGB [H, W, 3] or several. Of several the one nearest to its caption
    counts, as in the original: the CLIP score is the mean of the largest cosines x 100, and the others look at that
    picture alone; without CLIP at the first. Raises ValueError where a file that is named is wrong.
    """
    if not samples or len(samples) != len(captions) or not all(samples):
        raise ValueError(f"pictures to judge: want one or more of each caption, got {len(samples)} and {len(captions)}")
    scores: dict[str, float | None] = dict.fromkeys(NAMES)
    chosen = [pictures[0] for pictures in samples]
    if files.clip is None:
        say(f"no {CLIP_SCORE}: name CLIP's weights, OpenAI's ViT-B-16.pt or another form of them")
    else:
        scores[CLIP_SCORE], chosen = clip_score(load_clip(files.clip, device), samples, captions)
    if files.inception is None:
        say(f"no {FID}, no {INCEPTION_SCORE}: name torch-fidelity's {inception.WEIGHTS}")
        return scores
    network = inception.Inception(files.inception, device)
    features, logits = network.features(chosen)
    if len(chosen) < inception.SPLITS:
        say(f"no {INCEPTION_SCORE}: want at least {inception.SPLITS} pictures, got {len(chosen)}")
    else:
        scores[INCEPTION_SCORE] = inception.inception_score(logits)[0]
    if files.reference is None:
        say(f"no {FID}: name what to compare with: pictures, or an .npz with mu and sigma")
    elif len(chosen) < 2:
        say(f"no {FID}: want at least 2 pictures, got {len(chosen)}")
    else:
        scores[FID] = inception.fid(
            inception.statistics(features), inception.reference_statistics(files.reference, network)
        )
        if len(chosen) < inception.MIN_PICTURES:
            say(
                f"{FID} of {len(chosen)} pictures is too large, as {inception.MIN_PICTURES} features want as many; "
                "compare it with that of the same number alone"
            )
    return scores


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

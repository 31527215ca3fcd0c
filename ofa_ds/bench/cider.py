"""Time to reward captions by CIDEr-D: our scorer beside the library's, on the same captions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ofa_ds.data.document_frequency import DocumentFrequency, caption_words, count_ngrams
from ofa_ds.tasks.cider import CiderD

PICTURES = 64
REFERENCES = 5
HYPOTHESES = 5
"""Of each picture, as COCO has them and SCST samples them."""
WORDS = 2000
"""In use, the k-th with frequency 1 / k."""


def bench_cider(repeats: int = 7) -> dict[str, Any]:
    """{"pictures", "hypotheses", "references", "ours_ms", "library_ms": medians, "ratio", "largest_difference"}."""
    rng = np.random.default_rng(1)
    references = [drawn_captions(rng, REFERENCES) for _ in range(PICTURES)]
    hypotheses = [altered_captions(rng, each[:HYPOTHESES]) for each in references]
    # The library takes the number of pairs that it is given for the number of pictures.
    counts = count_ngrams(references).counts
    frequency = DocumentFrequency(images=PICTURES * HYPOTHESES, counts=counts)
    ours: list[list[float]] = []
    theirs: list[float] = []

    def with_ours() -> None:
        scorer = CiderD(frequency)
        ours[:] = [scorer.scores(*pair) for pair in zip(hypotheses, references, strict=True)]

    def with_library() -> None:
        theirs[:] = library_scores(hypotheses, references, frequency)

    times = {"ours": [], "library": []}
    for _ in range(repeats):  # in turn, so that what else the machine does meets both
        times["ours"].append(_seconds(with_ours))
        times["library"].append(_seconds(with_library))
    ours_s, library_s = (statistics.median(times[name]) for name in ("ours", "library"))
    return {
        "pictures": PICTURES, "hypotheses": HYPOTHESES, "references": REFERENCES, "ours_ms": 1e3 * ours_s,
        "library_ms": 1e3 * library_s, "ratio": library_s / ours_s,
        "largest_difference": float(np.abs(np.concatenate(ours) - np.array(theirs)).max()),
    }  # fmt: skip


def library_scores(
    hypotheses: list[list[str]], references: list[list[str]], frequency: DocumentFrequency
) -> list[float]:
    """Of every hypothesis, by pycocoevalcap; `frequency.images` must be the number of hypotheses."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for found, right in zip(hypotheses, references, strict=True):
        for text in found:
            scorer += (_joined(text), [_joined(each) for each in right])
    scorer.document_frequency.update(frequency.counts)
    return [float(score) for score in scorer.compute_cider()]


def table(result: dict[str, Any]) -> str:
    return (
        f"CIDEr-D of {result['pictures']} pictures x {result['hypotheses']} hypotheses, {result['references']} "
        f"references each\nofa-ds        {result['ours_ms']:9.1f} ms\npycocoevalcap {result['library_ms']:9.1f} ms   "
        f"x {result['ratio']:.1f}\nlargest difference {result['largest_difference']:.1e}"
    )


def drawn_captions(rng: np.random.Generator, count: int) -> list[str]:
    """Captions of about ten words."""
    chances = 1 / np.arange(1, WORDS + 1)
    words = rng.choice(WORDS, (count, 14), p=chances / chances.sum())
    return [" ".join(f"w{word}" for word in row[: rng.integers(8, 14)]) for row in words]


def altered_captions(rng: np.random.Generator, texts: list[str]) -> list[str]:
    """References of which about a third of the words are others."""

    def altered(words: list[str]) -> str:
        return " ".join(np.where(rng.random(len(words)) < 1 / 3, rng.permutation(words), words))

    return [altered(text.split()) for text in texts]


def _joined(text: str) -> str:
    return " ".join(caption_words(text))


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

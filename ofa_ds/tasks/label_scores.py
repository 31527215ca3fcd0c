"""What an answer out of a few is worth: accuracy, Matthews' correlation, F1, and the soft accuracy of VQA.

docs/downstream.md, Scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

POSITIVE = "yes"
"""The answer whose F1 and correlation are told."""


def share(expected: Sequence[str], given: Sequence[str]) -> float | None:
    """Of answers that are letter by letter the expected ones; None without any."""
    hits = [float(a == b) for a, b in zip(expected, given, strict=True)]
    return sum(hits) / len(hits) if hits else None


def matthews(expected: Sequence[str], given: Sequence[str], positive: str = POSITIVE) -> float:
    """Matthews' correlation of one label against the rest, -1 ... 1; 0 where either never varies."""
    true_pos, false_pos, true_neg, false_neg = _counts(expected, given, positive)
    around = (true_pos + false_pos) * (true_pos + false_neg) * (true_neg + false_pos) * (true_neg + false_neg)
    return (true_pos * true_neg - false_pos * false_neg) / math.sqrt(around) if around else 0.0


def f1(expected: Sequence[str], given: Sequence[str], positive: str = POSITIVE) -> float:
    """Harmonic mean of precision and recall of one label, 0 ... 1; 0 where it never comes."""
    true_pos, false_pos, _, false_neg = _counts(expected, given, positive)
    total = 2 * true_pos + false_pos + false_neg
    return 2 * true_pos / total if total else 0.0


def _counts(expected: Sequence[str], given: Sequence[str], positive: str) -> tuple[int, int, int, int]:
    """True positives, false positives, true negatives, false negatives."""
    pairs = [(a == positive, b == positive) for a, b in zip(expected, given, strict=True)]
    return tuple(pairs.count(kind) for kind in ((True, True), (False, True), (False, False), (True, False)))


def soft(references: Sequence[Mapping[str, float]], given: Sequence[str]) -> list[float]:
    """The confidence of each answer in its question's references, letter by letter; 0 where it is none of them."""
    return [float(right.get(answer, 0.0)) for right, answer in zip(references, given, strict=True)]

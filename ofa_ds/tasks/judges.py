"""What a generated answer is worth, and what can be had without looking. Pure functions of texts, boxes and ids."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ofa_ds.terms import BEST_OF, PICTURE_SCORES

if TYPE_CHECKING:
    from ofa_ds.data.example import Example
    from ofa_ds.tasks.context import Context

IOU_THRESHOLD = 0.5
"""A box that covers this much of the union with the expected one counts as found."""

RARE_TYPE = 10
"""Questions of a type with fewer are judged as one type: a constant answer would otherwise be right by being alone."""

Box = tuple[float, float, float, float]
Objects = list[tuple[Box, str]]
Answers = Sequence[Sequence[int]]
"""Generated ids, without bos and eos."""
Scores = dict[str, float | None]

TOKEN_ACCURACY = "token accuracy"
"""The score of every task; the only one of those without a judge."""

CIDER = "CIDEr"
NOT_SHARES = frozenset({CIDER, *PICTURE_SCORES})
"""Scores that are not 0 ... 1."""


def is_share(score: str) -> bool:
    """Whether it is 0 ... 1, also of the best of several samples."""
    return score.partition(BEST_OF)[0] not in NOT_SHARES


def plain(text: str) -> str:
    """Lower case, single spaces: how texts are compared."""
    return " ".join(text.lower().split())


def exact(expected: Sequence[str], generated: Sequence[str]) -> list[float]:
    """1 where the texts read the same, else 0."""
    return [float(plain(e) == plain(g)) for e, g in zip(expected, generated, strict=True)]


def texts_of(ctx: Context, answers: Answers) -> list[str]:
    return [ctx.vocab.decode(ids) for ids in answers]


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def judge_text(ctx: Context, asked: Sequence[Example], answers: Answers) -> Scores:
    """Exact match and CIDEr of descriptions."""
    return _text_scores([example.target_text for example in asked], texts_of(ctx, answers))


def constant_text(asked: Sequence[Example]) -> Scores:
    """The most frequent description."""
    expected = [plain(example.target_text) for example in asked]
    return _text_scores(expected, [max(expected, key=expected.count)] * len(expected))


def _text_scores(expected: Sequence[str], texts: Sequence[str]) -> Scores:
    return {"exact match": mean(exact(expected, texts)), CIDER: cider(expected, texts)}


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x0, y0, x1, y1; float [..., 4] broadcast. Inverted boxes have 0."""
    corner, far = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = (far - corner).clip(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).clip(min=0).prod(-1) + (b[..., 2:] - b[..., :2]).clip(min=0).prod(-1) - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)


def found(expected: Sequence[Box], generated: Sequence[Box | None]) -> list[float]:
    """1 where the generated box overlaps the expected one by IOU_THRESHOLD; None is no box."""
    return [
        0.0 if g is None else float(iou(np.array(e), np.array(g)) >= IOU_THRESHOLD)
        for e, g in zip(expected, generated, strict=True)
    ]


def f_measure(expected: Sequence[Objects], generated: Sequence[Objects], *, named: bool) -> float:
    """2 found / (expected + generated) over all pictures; each expected box is found once, best overlaps first."""
    hits = sum(_matches(e, g, named=named) for e, g in zip(expected, generated, strict=True))
    total = sum(len(objects) for objects in (*expected, *generated))
    return 2 * hits / total if total else 1.0


def _matches(expected: Objects, generated: Objects, *, named: bool) -> int:
    if not expected or not generated:
        return 0
    overlap = iou(np.array([box for box, _ in expected])[:, None], np.array([box for box, _ in generated])[None])
    if named:
        same = np.array([[plain(a) == plain(b) for _, b in generated] for _, a in expected])
        overlap = np.where(same, overlap, 0)
    hits = 0
    while overlap.max() >= IOU_THRESHOLD:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        hits += 1
    return hits


def cider(expected: Sequence[str], generated: Sequence[str]) -> float | None:
    """CIDEr of the COCO evaluation code over words without punctuation; 0 ... 10. None without `pycocoevalcap`.

    Document frequencies are those of `expected`, so scores of different sets do not compare.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return None
    if len(expected) < 2:
        return None
    references = {i: [" ".join(re.findall(r"\w+", text.lower()))] for i, text in enumerate(expected)}
    candidates = {i: [" ".join(re.findall(r"\w+", text.lower()))] for i, text in enumerate(generated)}
    return float(Cider().compute_score(references, candidates)[0])


def question_type(question: str) -> str:
    """The first two words, as VQA's own evaluation groups questions."""
    return " ".join(plain(question).split()[:2])


def merged_types(types: Sequence[str]) -> list[str]:
    """The types, those with fewer than RARE_TYPE questions called `other`."""
    counts = Counter(types)
    return [kind if counts[kind] >= RARE_TYPE else "other" for kind in types]


def constant_share(answers: Sequence[Hashable], types: Sequence[str] | None = None) -> float:
    """Share of answers that the best constant answer of each type (of all, without types) gets right, in hindsight."""
    groups: dict[str, Counter[Hashable]] = defaultdict(Counter)
    for answer, kind in zip(answers, types or [""] * len(answers), strict=True):
        groups[kind][answer] += 1
    return sum(max(counts.values()) for counts in groups.values()) / max(len(answers), 1)


def constant_box_share(boxes: Sequence[Box]) -> float:
    """Share of the boxes that the best of them, given as constant answer, overlaps by IOU_THRESHOLD."""
    every = np.array(boxes, np.float32).reshape(-1, 4)
    return float((iou(every[:, None], every[None]) >= IOU_THRESHOLD).mean(0).max()) if len(every) else 0.0


def constant_sequence_share(sequences: Sequence[Sequence[int]]) -> float:
    """Share of tokens that the best constant token per position gets right."""
    places: dict[int, Counter[int]] = defaultdict(Counter)
    for sequence in sequences:
        for place, token in enumerate(sequence):
            places[place][token] += 1
    right = sum(max(counts.values()) for counts in places.values())
    return right / max(sum(len(sequence) for sequence in sequences), 1)

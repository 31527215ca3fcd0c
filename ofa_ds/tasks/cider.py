"""CIDEr-D of captions against references: the reward of SCST (docs/ofa.md, Fine-tuning: SCST).

Of an n-gram g in a text: weight[g] = count * ln(pictures / document frequency). Per size n of 1 to 4: the sum over g
of min(hypothesis[g], reference[g]) * reference[g], divided by both norms, times exp(-(difference in length)^2 / 72);
then the mean over sizes and references, times 10. Lengths count bigrams, as in the published code. Scores of a whole
set against itself, for tables, are `judges.cider`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ofa_ds.data.document_frequency import MAX_WORDS, DocumentFrequency, Ngram, caption_words, ngrams

SIGMA = 6.0
SCALE = 10.0


class _Vector(NamedTuple):
    """A text, per size of n-grams."""

    weights: tuple[dict[Ngram, float], ...]
    norms: tuple[float, ...]
    length: int


class _Weights(dict[Ngram, float]):
    """ln(pictures / document frequency) of the n-grams met so far."""

    def __init__(self, frequency: DocumentFrequency) -> None:
        super().__init__()
        self._frequency = frequency

    def __missing__(self, ngram: Ngram) -> float:
        self[ngram] = weight = self._frequency.weight(ngram)
        return weight


class CiderD:
    """Rewards with given document frequencies.

    The library's scorer (pycocoevalcap) gives the same values and takes four times as long for five hypotheses a
    picture (`python -m ofa_ds.bench cider`): it weighs the references anew for each, and every logarithm is numpy's.
    """

    def __init__(self, frequency: DocumentFrequency) -> None:
        self._weights = _Weights(frequency)

    def scores(self, hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
        """0 ... 10 for each hypothesis about one picture. Raises ValueError without references."""
        return self.word_scores([caption_words(text) for text in hypotheses], [caption_words(t) for t in references])

    def word_scores(self, hypotheses: Sequence[Ngram], references: Sequence[Ngram]) -> list[float]:
        """The same of words as they are."""
        if not references:
            raise ValueError("a caption without references has no CIDEr-D; give the training rows their captions")
        against = [self._vector(words) for words in references]
        known: dict[Ngram, float] = {}
        for words in hypotheses:
            if words not in known:
                own = self._vector(words)
                known[words] = SCALE * sum(_similarity(own, other) for other in against) / (MAX_WORDS * len(against))
        return [known[words] for words in hypotheses]

    def _vector(self, words: Ngram) -> _Vector:
        found, weigh = [], self._weights
        for size in range(1, MAX_WORDS + 1):
            counts = Counter(ngrams(words, size))
            found.append({ngram: count * weigh[ngram] for ngram, count in counts.items()})
        norms = (math.sqrt(sum(weight * weight for weight in weights.values())) for weights in found)
        return _Vector(tuple(found), tuple(norms), max(len(words) - 1, 0))


def _similarity(own: _Vector, other: _Vector) -> float:
    """Sum over sizes of the clipped cosine, under the penalty of a difference in length."""
    total = 0.0
    for weights, others, own_norm, other_norm in zip(own.weights, other.weights, own.norms, other.norms, strict=True):
        if own_norm and other_norm:
            shared = ((weight, others[ngram]) for ngram, weight in weights.items() if ngram in others)  # in one order
            total += sum(min(pair) * pair[1] for pair in shared) / (own_norm * other_norm)
    return total * math.exp(-((own.length - other.length) ** 2) / (2 * SIGMA**2))

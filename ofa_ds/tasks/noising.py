"""Whole-word span masking of BART, as OFA's text infilling uses it (docs/ofa.md, Tasks: noising).

Each span of Poisson(3) words is replaced by one <mask>; spans of length 0 insert a <mask> and take nothing away.
Legend: N tokens, W words.
"""

from __future__ import annotations

import math

import numpy as np

MASK_RATIO = 0.3
"""Share of the words that spans may take, rounded up."""

POISSON_MEAN_WORDS = 3.0

_MIN_PROBABILITY = 1e-7
_MAX_SPAN_WORDS = 127


def _span_length_cdf() -> np.ndarray:
    """Cumulative Poisson probabilities, cut after the first below 1e-7 and scaled to end in 1."""
    probabilities = []
    for words in range(_MAX_SPAN_WORDS + 1):
        probabilities.append(math.exp(-POISSON_MEAN_WORDS) * POISSON_MEAN_WORDS**words / math.factorial(words))
        if probabilities[-1] < _MIN_PROBABILITY:
            break
    totals = np.cumsum(probabilities)
    return totals / totals[-1]


_SPAN_LENGTH_CDF = _span_length_cdf()


def mask_spans(tokens_N: np.ndarray, starts_word_N: np.ndarray, mask: int, rng: np.random.Generator) -> np.ndarray:
    """The tokens with about three tenths of the words masked.

    tokens_N: int64, bos first and eos last, neither of which is ever touched. starts_word_N: bool, whether each token
    begins a word. Returns a new int64 array, usually shorter.
    """
    word_starts_W = np.flatnonzero(starts_word_N[1:-1]) + 1
    num_words = math.ceil(len(word_starts_W) * MASK_RATIO)
    if num_words == 0:
        return tokens_N.copy()
    lengths = span_lengths(num_words, rng)
    num_inserts = int((lengths == 0).sum())
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return insert_masks(tokens_N, num_inserts, mask, rng)
    out_N, keep_N = tokens_N.copy(), np.ones(len(tokens_N), bool)
    first_words = rng.permutation(len(word_starts_W))[: len(lengths)]
    ends_W = np.append(word_starts_W, len(tokens_N) - 1)  # no span swallows eos
    for first_word, length in zip(first_words, lengths, strict=True):
        start = word_starts_W[first_word]
        out_N[start] = mask
        keep_N[start + 1 : ends_W[min(first_word + length, len(word_starts_W))]] = False
    out_N = out_N[keep_N]
    if num_inserts:
        out_N = insert_masks(out_N, num_inserts, mask, rng)
    return out_N


def span_lengths(num_words: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths in words that add up to exactly `num_words`; the last one is cut, zeros stand for insertions."""
    lengths = np.empty(0, np.int64)
    while lengths.sum() < num_words:
        drawn = np.searchsorted(_SPAN_LENGTH_CDF, rng.random(num_words), side="right")
        lengths = np.concatenate([lengths, np.minimum(drawn, len(_SPAN_LENGTH_CDF) - 1)])
    totals = lengths.cumsum()
    last = int(np.argmax(totals >= num_words))
    lengths[last] -= totals[last] - num_words
    return lengths[: last + 1]


def insert_masks(tokens_N: np.ndarray, num_masks: int, mask: int, rng: np.random.Generator) -> np.ndarray:
    """`num_masks` more tokens at random places strictly between the first and the last one."""
    out = np.full(len(tokens_N) + num_masks, mask, np.int64)
    is_token = np.ones(len(out), bool)
    is_token[rng.permutation(len(out) - 2)[:num_masks] + 1] = False
    out[is_token] = tokens_N
    return out

"""Span masking: what is taken, what stays, and how often."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.tasks.noising import _SPAN_LENGTH_CDF, insert_masks, mask_spans, span_lengths

BOS, EOS, MASK = 0, 2, 9999


def sequence(starts: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct tokens between bos and eos, so that what is left can be told apart."""
    tokens = np.array([BOS, *range(100, 100 + len(starts)), EOS])
    return tokens, np.array([True, *starts, True])


@given(st.lists(st.booleans(), max_size=120), st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_bos_eos_and_order_stay_and_everything_new_is_a_mask(starts, seed):
    tokens, starts_word = sequence(starts)
    before = tokens.copy()
    out = mask_spans(tokens, starts_word, MASK, np.random.default_rng(seed))
    np.testing.assert_array_equal(tokens, before)
    assert out[0] == BOS and out[-1] == EOS and out.dtype == np.int64
    kept = out[out != MASK]
    assert (np.diff(np.searchsorted(np.append(tokens[:-1], 10**6), kept[:-1])) > 0).all()
    assert set(kept) <= set(tokens)


@given(st.lists(st.booleans(), min_size=1, max_size=120), st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_at_most_three_tenths_of_the_words_go_and_only_whole_ones(starts, seed):
    tokens, starts_word = sequence(starts)
    out = mask_spans(tokens, starts_word, MASK, np.random.default_rng(seed))
    gone = np.isin(tokens, out, invert=True)
    word = np.cumsum(starts_word[1:-1])  # 0: before the first word start
    words_gone = set(word[gone[1:-1]])
    assert 0 not in words_gone
    assert len(words_gone) <= math.ceil(sum(starts) * 0.3)
    for number in words_gone:
        assert gone[1:-1][word == number].all(), "a word is taken whole"
    num_words = math.ceil(sum(starts) * 0.3)
    assert (out == MASK).sum() >= (1 if num_words else 0)


def test_nothing_to_mask_leaves_the_text_alone():
    tokens, starts = sequence([False] * 5)
    np.testing.assert_array_equal(mask_spans(tokens, starts, MASK, np.random.default_rng(0)), tokens)


def test_one_word_is_masked_or_gets_a_mask_beside_it():
    tokens, starts = sequence([True])
    seen = {tuple(mask_spans(tokens, starts, MASK, np.random.default_rng(seed))) for seed in range(50)}
    assert (BOS, MASK, EOS) in seen
    assert seen <= {(BOS, MASK, EOS), (BOS, 100, MASK, EOS), (BOS, MASK, 100, EOS), (BOS, MASK, MASK, EOS)} | {
        out for out in seen if out[1:-1].count(MASK) >= 1
    }


def token_by_token(tokens: np.ndarray, starts_word: np.ndarray, first: list[int], lengths: list[int]) -> list[int]:
    """The original's way: all spans step on together, and count down at each word that begins."""
    out, keep = tokens.copy(), np.ones(len(tokens), bool)
    barrier = np.where(starts_word, 1, 0)
    barrier[0], barrier[-1] = 0, 255
    at = np.flatnonzero(starts_word[1:-1])[first] + 1
    out[at] = MASK
    left = np.array(lengths) - 1
    while len(at):
        left = left - barrier[at + 1]
        at, left = at[left >= 0] + 1, left[left >= 0]
        keep[at] = False
    return out[keep].tolist()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
@settings(max_examples=300, deadline=None)
def test_given_spans_take_what_the_original_takes(starts, data):
    tokens, starts_word = sequence([True, *starts])
    num_words = 1 + sum(starts)
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=num_words))
    first = data.draw(st.permutations(range(num_words)))
    rng = SimpleNamespace(permutation=lambda n: np.array(first))
    with patch("ofa_ds.tasks.noising.span_lengths", lambda num_words, rng: np.array(lengths)):
        out = mask_spans(tokens, starts_word, MASK, rng)
    assert out.tolist() == token_by_token(tokens, starts_word, first[: len(lengths)], lengths)


def test_a_span_of_n_words_takes_n_words_with_all_their_pieces(monkeypatch):
    tokens, starts = sequence([True, False, True, True, False, False, True])
    monkeypatch.setattr("ofa_ds.tasks.noising.span_lengths", lambda num_words, rng: np.array([2]))

    class Third:
        def permutation(self, n):
            return np.array([2, 0, 1, 3])

    np.testing.assert_array_equal(mask_spans(tokens, starts, MASK, Third()), [BOS, 100, 101, 102, MASK, EOS])


def test_overlapping_spans_leave_one_mask(monkeypatch):
    tokens, starts = sequence([True] * 6)
    monkeypatch.setattr("ofa_ds.tasks.noising.span_lengths", lambda num_words, rng: np.array([3, 2]))

    class Fixed:
        def permutation(self, n):
            return np.array([1, 2, 0, 3, 4, 5])

    np.testing.assert_array_equal(mask_spans(tokens, starts, MASK, Fixed()), [BOS, 100, MASK, 104, 105, EOS])


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_span_lengths_add_up_to_the_words_asked_for(num_words, seed):
    lengths = span_lengths(num_words, np.random.default_rng(seed))
    assert lengths.sum() == num_words and (lengths >= 0).all() and lengths[-1] > 0


def test_span_lengths_are_poisson_of_mean_three():
    pmf = np.diff(_SPAN_LENGTH_CDF, prepend=0)
    want = [math.exp(-3) * 3**k / math.factorial(k) for k in range(len(pmf))]
    np.testing.assert_allclose(pmf, want, atol=1e-7)
    assert want[-1] < 1e-7 < want[-2] and _SPAN_LENGTH_CDF[-1] == 1
    lengths = span_lengths(200_000, np.random.default_rng(0))
    assert abs(lengths.mean() - 3) < 0.02 and abs((lengths == 0).mean() - math.exp(-3)) < 0.004


@given(st.integers(0, 30), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_insertions_never_come_before_bos_or_after_eos(length, num_masks, seed):
    tokens, _ = sequence([True] * length)
    out = insert_masks(tokens, num_masks, MASK, np.random.default_rng(seed))
    assert out[0] == BOS and out[-1] == EOS and (out == MASK).sum() == num_masks
    np.testing.assert_array_equal(out[out != MASK], tokens)


def test_about_three_tenths_of_a_long_text_go():
    rng = np.random.default_rng(0)
    tokens, starts = sequence([True, False] * 100)
    gone = [np.isin(tokens, mask_spans(tokens, starts, MASK, rng), invert=True).sum() / 200 for _ in range(300)]
    assert 0.2 < np.mean(gone) < 0.3  # below 0.3: spans overlap, and cut at the end

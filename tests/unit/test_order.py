"""The order of rows: a bijection each epoch, of any size, with nothing to tell it from chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.data.order import BLOCK, Permutation, permutation


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
def test_every_row_comes_once_an_epoch(n: int, seed: int, epoch: int) -> None:
    rows = permutation(n, seed, epoch).at(np.arange(n))
    assert np.array_equal(np.sort(rows), np.arange(n))


@pytest.mark.parametrize("n", [BLOCK, BLOCK + 1, 2**17 + 1])
def test_blocks_and_powers_of_two_are_bijections_too(n: int) -> None:
    rows = permutation(n, 1, 0).at(np.arange(n))
    assert np.bincount(rows, minlength=n).tolist() == [1] * n


@given(n=st.integers(2**31, 2**62), start=st.integers(0, 2**31 - 1000))
@settings(max_examples=30)
def test_huge_data_sets_stay_inside_and_distinct(n: int, start: int) -> None:
    rows = permutation(n, 3, 1).at(np.arange(start, start + 1000))
    assert rows.min() >= 0 and rows.max() < n and len(np.unique(rows)) == 1000


def test_one_index_is_as_many() -> None:
    order = permutation(1000, 5, 2)
    assert [order[i] for i in range(50)] == order.at(np.arange(50)).tolist()
    assert len(order) == 1000


def test_the_order_is_pinned() -> None:
    """A change here makes every old run go on in another order."""
    assert permutation(10, 0, 0).at(np.arange(10)).tolist() == [6, 8, 3, 4, 1, 9, 0, 5, 2, 7]
    assert permutation(10**12, 7, 3).at(np.arange(3)).tolist() == [585809390658, 848812069351, 927862263641]


def test_epochs_seeds_and_families_have_unrelated_orders() -> None:
    base = permutation(5000, 1, 1, 0).at(np.arange(5000))
    for other in (permutation(5000, 1, 2, 0), permutation(5000, 2, 1, 0), permutation(5000, 1, 1, 1)):
        assert (other.at(np.arange(5000)) == base).mean() < 0.005


def test_neighbours_in_the_file_are_not_neighbours_in_the_order() -> None:
    rows = permutation(200_000, 0, 0).at(np.arange(200_000)).astype(np.float64)
    assert all(abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 0.012 for lag in (1, 2, 4, 64, 256))
    cells = np.histogram2d(rows[:-1], rows[1:], bins=20)[0]
    assert ((cells - cells.mean()) ** 2 / cells.mean()).sum() / 399 < 1.3


def test_a_row_is_as_likely_at_every_place() -> None:
    at = np.zeros((12, 12))
    for epoch in range(1200):
        at[np.arange(12), Permutation(12, 0, epoch).at(np.arange(12))] += 1
    assert ((at - 100) ** 2 / 100).sum() / 121 < 1.5


@pytest.mark.parametrize("n, seed, epoch", [(0, 0, 0), (5, -1, 0), (5, 0, -1)])
def test_numbers_that_cannot_be_are_refused(n: int, seed: int, epoch: int) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        permutation(n, seed, epoch)


@pytest.mark.parametrize("i", [-1, 5])
def test_an_index_outside_is_refused(i: int) -> None:
    with pytest.raises(IndexError, match=r"range\(5\)"):
        permutation(5, 0, 0)[i]

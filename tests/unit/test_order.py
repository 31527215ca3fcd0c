"""Order and mixture: bijections, exact counts over any prefix, and no dependence on how a step is cut."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.data.order import BLOCK, Mixture, Permutation, pattern, permutation

COUNTS = {"vision_language": 1709, "text": 3655, "image": 332, "detection": 246}
WEIGHTS = {"vision_language": 8, "text": 2, "image": 1, "detection": 1}


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


@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_no_family_runs_ahead_or_behind_by_a_row(weights: list[int]) -> None:
    order = pattern(tuple(weights))
    drawn = np.cumsum(order[:, None] == np.arange(len(weights)), 0)
    due = np.arange(1, len(order) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(drawn - due).max() <= 1
    assert drawn[-1].tolist() == weights


def test_default_micro_batch_is_eight_two_one_one() -> None:
    mixture = Mixture(COUNTS, WEIGHTS, seed=1)
    for start in range(0, 1200, 12):
        families = Counter(family for family, _, _ in mixture.rows(start, start + 12))
        assert families == {"vision_language": 8, "text": 2, "image": 1, "detection": 1}


@given(data=st.data())
@settings(max_examples=25)
def test_the_stream_does_not_depend_on_how_it_is_cut(data: st.DataObject) -> None:
    mixture = Mixture({"vision_language": 7, "text": 3, "image": 5}, {"vision_language": 3, "text": 2, "image": 1}, 9)
    start = data.draw(st.integers(0, 10**9))
    cuts = sorted(data.draw(st.lists(st.integers(start, start + 60), max_size=6)))
    whole = mixture.rows(start, start + 60)
    edges = [start, *cuts, start + 60]
    assert [row for a, b in zip(edges, edges[1:], strict=False) for row in mixture.rows(a, b)] == whole


def test_any_world_size_and_micro_batch_sees_the_rows_of_the_step() -> None:
    mixture = Mixture(COUNTS, WEIGHTS, seed=3)
    step, global_rows = 17, 72
    whole = mixture.rows(step * global_rows, (step + 1) * global_rows)
    for world, micro in ((1, 72), (2, 12), (3, 24), (6, 12), (1, 1)):
        starts = range(step * global_rows, (step + 1) * global_rows, micro)
        by_rank = [[mixture.rows(s, s + micro) for s in starts[rank::world]] for rank in range(world)]
        again = [by_rank[j % world][j // world] for j in range(len(starts))]
        assert [row for rows in again for row in rows] == whole


def test_each_family_goes_through_its_rows_by_epochs_of_its_own() -> None:
    mixture = Mixture({"vision_language": 6, "text": 5}, {"vision_language": 3, "text": 1}, 2)
    seen: dict[str, list[tuple[int, int]]] = {"vision_language": [], "text": []}
    for family, epoch, row in mixture.rows(0, 80):
        seen[family].append((epoch, row))
    for family, count in (("vision_language", 6), ("text", 5)):
        for k, (epoch, _) in enumerate(seen[family]):
            assert epoch == k // count
        for start in range(0, len(seen[family]) - count + 1, count):
            assert sorted(row for _, row in seen[family][start : start + count]) == list(range(count))


def test_absent_and_unweighted_families_are_left_out() -> None:
    assert Mixture({"text": 4}, WEIGHTS, 0).families == ("text",)
    assert {family for family, _, _ in Mixture({"text": 4}, WEIGHTS, 0).rows(0, 9)} == {"text"}
    assert Mixture(COUNTS, {**WEIGHTS, "image": 0}, 0).families == ("vision_language", "text", "detection")


def test_a_family_keeps_its_order_whatever_else_is_mixed_in() -> None:
    alone = Mixture({"image": 50}, WEIGHTS, 4).rows(0, 50)
    mixed = [row for row in Mixture(COUNTS | {"image": 50}, WEIGHTS, 4).rows(0, 600) if row[0] == "image"]
    assert alone == mixed


def test_nothing_to_draw_is_an_error_with_both_sides() -> None:
    with pytest.raises(ValueError, match="data.mix .*'text': 0.* draws nothing .*'text': 9"):
        Mixture({"text": 9}, {"vision_language": 8, "text": 0}, 0)


def test_stream_positions_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        Mixture(COUNTS, WEIGHTS, 0).rows(-1, 3)


def test_it_travels_to_worker_processes() -> None:
    mixture = Mixture(COUNTS, WEIGHTS, 8)
    assert pickle.loads(pickle.dumps(mixture)).rows(100, 200) == mixture.rows(100, 200)

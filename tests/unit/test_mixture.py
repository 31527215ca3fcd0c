"""What a run draws: exact shares over any prefix, also where they change, and no dependence on how a step is cut."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.data.mixture import Drawn, Mixture, Part
from ofa_ds.data.order import Permutation
from ofa_ds.data.turns import MAX_ROUND, Phase, Turns

COUNTS = {"vision_language": 1709, "text": 3655, "image": 332, "detection": 246}
WEIGHTS = {"vision_language": 8, "text": 2, "image": 1, "detection": 1}


def worst(turns: Turns, stop: int) -> float:
    """Largest |drawn - due| of anyone over any prefix up to `stop`."""
    num = len(turns.phases[0].weights)
    due = np.empty((stop, num))
    for phase in turns.phases:
        due[phase.start :] = np.array(phase.weights) / sum(phase.weights)
    drawn = np.cumsum(turns.at(0, stop)[0][:, None] == np.arange(num), 0)
    return float(np.abs(drawn - np.cumsum(due, 0)).max())


@st.composite
def schedules(draw: st.DrawFn) -> list[Phase]:
    num = draw(st.integers(1, 5))
    weights = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), min_size=num, max_size=num).filter(any)
    phases, start = [], 0
    for _ in range(draw(st.integers(1, 6))):
        phases.append(Phase(start, tuple(draw(weights))))
        start += draw(st.one_of(st.integers(1, 5), st.integers(1, 300)))
    return phases


@given(phases=schedules())
@settings(max_examples=300)
def test_nobody_is_a_whole_row_early_or_late_over_any_prefix_also_where_weights_change(phases):
    turns = Turns(phases)
    assert worst(turns, phases[-1].start + 300) <= 1 + 1e-9


@given(phases=schedules(), data=st.data())
@settings(max_examples=100)
def test_any_part_of_the_turns_is_computed_alone(phases, data):
    turns, stop = Turns(phases), phases[-1].start + 200
    who, count = turns.at(0, stop)
    start = data.draw(st.integers(0, stop))
    end = data.draw(st.integers(start, stop))
    some, of_it = turns.at(start, end)
    assert np.array_equal(some, who[start:end]) and np.array_equal(of_it, count[start:end])
    drawn = np.bincount(who[:start], minlength=turns.num)
    assert np.array_equal(turns.drawn(start), drawn)
    for k in range(turns.num):
        assert count[who == k].tolist() == list(range((who == k).sum()))


@given(phases=schedules(), data=st.data())
@settings(max_examples=100)
def test_a_change_added_later_shows_only_close_before_it(phases, data):
    """And `same_until` says from where: it compares what two schedules draw, without drawing all of it."""
    num = len(phases[0].weights)
    weights = data.draw(st.lists(st.integers(0, 9), min_size=num, max_size=num).filter(any))
    at = phases[-1].start + data.draw(st.integers(1, 400))
    one, other = Turns(phases), Turns([*phases, Phase(at, tuple(weights))])
    here, there = one.at(0, at + 50)[0], other.at(0, at + 50)[0]
    differ = np.flatnonzero(here != there)
    first = differ[0] if len(differ) else at + 50
    assert one.same_until(other, first) and other.same_until(one, first)
    assert not len(differ) or not one.same_until(other, first + 1)


def test_a_change_that_begins_a_round_later_leaves_the_past_alone():
    one = Turns([Phase(0, (8, 2, 1, 0))])
    other = Turns([Phase(0, (8, 2, 1, 0)), Phase(10**12, (1, 1, 1, 5))])
    assert one.same_until(other, 10**12 - 22) and not one.same_until(other, 10**12 + 50)
    assert worst(Turns([Phase(0, (8, 2, 1, 0)), Phase(500, (1, 1, 1, 5)), Phase(505, (0, 0, 1, 1))]), 2000) < 1


def test_the_turns_are_pinned():
    """A change here makes every old run go on in another order."""
    assert Turns([Phase(0, (8, 2, 1, 1))]).at(0, 12)[0].tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 1, 0]
    assert Turns([Phase(0, (3, 0, 2))]).at(0, 10)[0].tolist() == [0, 2, 0, 2, 0, 0, 2, 0, 2, 0]


def test_weights_that_never_repeat_in_time_are_refused():
    with pytest.raises(ValueError, match=f"data.mix: weights .* want numbers whose sum is at most {MAX_ROUND}"):
        Mixture(COUNTS, {**WEIGHTS, "text": 10**9 + 7}, 0)
    Mixture(COUNTS, {name: weight * 10**9 for name, weight in WEIGHTS.items()}, 0)


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


def test_a_mixture_changes_at_its_row_and_every_family_goes_on_where_it_was():
    change = {"vision_language": 1, "text": 6, "image": 0, "detection": 5}
    mixture = Mixture(COUNTS, WEIGHTS, 3, changes=[(1200, change)])
    before = Counter(family for family, _, _ in mixture.rows(0, 1200))
    after = Counter(family for family, _, _ in mixture.rows(1200, 2400))
    assert before == {"vision_language": 800, "text": 200, "image": 100, "detection": 100}
    assert after == {"vision_language": 100, "text": 600, "detection": 500}
    plain = Mixture(COUNTS, WEIGHTS, 3)
    assert plain.rows(0, 1100) == mixture.rows(0, 1100) and plain.same_until(mixture, 1100)
    texts = [row for family, epoch, row in mixture.rows(0, 12000) if family == "text" and epoch == 0]
    assert sorted(texts) == list(range(COUNTS["text"])), "no row is missed or seen twice on the way"


def test_a_family_that_joins_later_changes_nothing_before():
    late = {**WEIGHTS, "detection": 0}
    one, other = Mixture(COUNTS, late, 1), Mixture(COUNTS, late, 1, changes=[(2400, WEIGHTS)])
    assert one.families == ("vision_language", "text", "image") and other.families == tuple(WEIGHTS)
    assert one.rows(0, 2300) == other.rows(0, 2300) and one.same_until(other, 2300)
    assert "detection" in {family for family, _, _ in other.rows(2400, 2424)}


def test_a_change_that_draws_nothing_is_refused_with_its_place():
    with pytest.raises(ValueError, match="draws nothing from row 24 of the stream on"):
        Mixture({"text": 9}, WEIGHTS, 0, changes=[(24, {**WEIGHTS, "text": 0})])


@given(
    parts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=6).filter(
        lambda parts: any(rows and weight for rows, weight in parts)
    )
)
@settings(max_examples=60)
def test_sets_share_the_rows_of_their_family_exactly_and_have_epochs_of_their_own(parts):
    given_parts = [Part(rows, weight) for rows, weight in parts]
    mixture = Mixture({"text": given_parts, "image": 5}, {"text": 3, "image": 1}, 7)
    texts = [(epoch, row) for family, epoch, row in mixture.rows(0, 1200) if family == "text"]
    weights = np.array([weight if rows else 0 for rows, weight in parts])
    ends = np.cumsum([rows for rows, _ in parts])
    which = np.searchsorted(ends, [row for _, row in texts], "right")
    drawn = np.cumsum(which[:, None] == np.arange(len(parts)), 0)
    due = np.arange(1, len(texts) + 1)[:, None] * weights / weights.sum()
    assert np.abs(drawn - due).max() <= 1
    for k, (rows, _) in enumerate(parts):
        mine = [(epoch, row) for (epoch, row), of in zip(texts, which, strict=True) if of == k]
        for turn in range(len(mine) // rows if rows else 0):
            epoch = mine[turn * rows : (turn + 1) * rows]
            assert {number for number, _ in epoch} == {turn}
            assert sorted(row for _, row in epoch) == list(range(ends[k] - rows, ends[k]))


def test_one_set_is_drawn_as_the_family_without_sets_is():
    assert Mixture({"text": [Part(50, 3)]}, WEIGHTS, 4).rows(0, 99) == Mixture({"text": 50}, WEIGHTS, 4).rows(0, 99)


def test_how_far_each_set_has_come_is_known_at_any_position_without_drawing():
    mixture = Mixture({"text": [Part(6, 2), Part(50, 1), Part(0, 1)], "image": 5}, {"text": 3, "image": 1}, 7)
    assert mixture.progress(80) == [
        Drawn("text", 0, 6, 40), Drawn("text", 1, 50, 20), Drawn("image", 0, 5, 20),
    ]  # fmt: skip
    assert mixture.progress(0) == [Drawn("text", 0, 6, 0), Drawn("text", 1, 50, 0), Drawn("image", 0, 5, 0)]
    assert mixture.part_of("text", 5) == (0, range(0, 6)) and mixture.part_of("text", 6) == (1, range(6, 56))
    assert mixture.progress(4 * 10**15)[2].drawn == 10**15


def test_the_billionth_step_costs_what_the_first_does():
    """Counted, not timed: array elements that are computed, and what the stream keeps, at either end of a run."""
    sets = [Part(10**8, 3), Part(7, 1)]
    mixture = Mixture({"vision_language": 10**9, "text": sets}, {"vision_language": 8, "text": 1}, 1)
    first, last = elements_computed(mixture, 0), elements_computed(mixture, 10**9 * 3072)
    assert last <= 2 * first + 1000 and first < 100_000
    assert len(pickle.dumps(mixture)) < 8192


def elements_computed(mixture: Mixture, position: int) -> int:
    """By one micro-batch of 12 rows."""
    count = 0
    at, draw = Turns.at, Permutation.at

    def counted_turns(self, start, stop):
        nonlocal count
        count += stop - start
        return at(self, start, stop)

    def counted_order(self, index_K):
        nonlocal count
        count += len(index_K)
        return draw(self, index_K)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Turns, "at", counted_turns)
        patch.setattr(Permutation, "at", counted_order)
        assert len(mixture.rows(position, position + 12)) == 12
    return count

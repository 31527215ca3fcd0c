"""Whose turn it is: several take turns by weights that may change, and nobody is ever a whole turn early or late.

Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980), which holds for weights that
change too: of those who may be drawn without running ahead, the one who would first fall behind. With n of them
|drawn - due| <= 1 - 1 / (2n - 2) over every prefix. What falls due is looked up in the weights to come, so the places
just before a change may depend on it; `same_until` says from where.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MAX_ROUND = 1 << 16
"""Turns after which a pattern may repeat: the sum of the weights, divided by what they have in common."""


@dataclass(frozen=True)
class Phase:
    """Weights from position `start` on."""

    start: int
    weights: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Stretch:
    """Positions `start` ... `stop` - 1 (None: no end) repeat `pattern` [L]."""

    start: int
    stop: int | None
    pattern: np.ndarray
    before: np.ndarray
    """int64 [L]: how often the one at each place has come in the pattern before it."""
    base: np.ndarray
    """int64 [N]: how often each has come before `start`."""
    a_round: np.ndarray
    """int64 [N]: how often each comes in the pattern."""


class Turns:
    """`turns.at(start, stop)` -> who, and how often before; endless, computed from the weights alone. Picklable."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        """phases: the first from position 0, in order. Raises ValueError where one has only zeros, or is too fine."""
        self.phases = _merged(phases)
        self.num = len(phases[0].weights)
        self._stretches = _stretches(self.phases)
        self._starts = np.array([stretch.start for stretch in self._stretches])

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions start ... stop - 1: whose turn, int64 [K]; which of its own turns, from 0 on, int64 [K]."""
        if not 0 <= start <= stop:
            raise ValueError(f"want positions 0 <= start <= stop, got {start} and {stop}")
        who, count = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        k = int(np.searchsorted(self._starts, start, "right")) - 1
        while start < stop:
            stretch = self._stretches[k]
            end = stop if stretch.stop is None else min(stop, stretch.stop)
            turn_K, place_K = np.divmod(np.arange(start, end) - stretch.start, len(stretch.pattern))
            who_K = stretch.pattern[place_K]
            who.append(who_K)
            count.append(stretch.base[who_K] + turn_K * stretch.a_round[who_K] + stretch.before[place_K])
            start, k = max(start, end), k + 1
        return np.concatenate(who), np.concatenate(count)

    def drawn(self, position: int) -> np.ndarray:
        """How often each has come before `position`, int64 [N]."""
        stretch = self._stretches[int(np.searchsorted(self._starts, position, "right")) - 1]
        rounds, rest = divmod(position - stretch.start, len(stretch.pattern))
        of_rest = np.bincount(stretch.pattern[:rest], minlength=self.num)
        return stretch.base + rounds * stretch.a_round + of_rest

    def same_until(self, other: Turns, position: int) -> bool:
        """Whether both draw the same at all positions before this one. Looks at no more than a few rounds a stretch."""
        edges = sorted({int(edge) for edge in (*self._starts, *other._starts) if edge < position} | {0, position})
        for start, stop in zip(edges, edges[1:], strict=False):
            rounds = [len(turns._stretch_of(start).pattern) for turns in (self, other)]
            looked_at = min(stop, start + math.lcm(*rounds))  # from there on both repeat
            if not np.array_equal(self.at(start, looked_at)[0], other.at(start, looked_at)[0]):
                return False
        return True

    def _stretch_of(self, position: int) -> _Stretch:
        return self._stretches[int(np.searchsorted(self._starts, position, "right")) - 1]


def _merged(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    """In lowest terms; a phase that changes nothing, or is over at once, is none."""
    found: list[Phase] = []
    for phase in phases:
        divisor = math.gcd(*phase.weights)
        if not divisor or min(phase.weights) < 0:
            raise ValueError(f"want weights of which one is more than zero and none is less, got {phase.weights}")
        weights = tuple(weight // divisor for weight in phase.weights)
        if sum(weights) > MAX_ROUND:
            raise ValueError(
                f"weights {list(weights)} repeat after {sum(weights)} turns; want numbers whose sum is at most "
                f"{MAX_ROUND}, once divided by what they have in common"
            )
        while found and phase.start <= found[-1].start:
            found.pop()
        if not found or found[-1].weights != weights:
            found.append(Phase(phase.start, weights))
    return tuple(found)


def _stretches(phases: tuple[Phase, ...]) -> list[_Stretch]:
    """How many there are by then decides how the first phases are drawn, so that one who joins later changes nothing
    before; only where that would break the bound, which no case is known to, all who ever come count from the start."""
    joined = _Schedule(phases, all_along=False)
    found = joined.stretches()
    return found if joined.within_bound else _Schedule(phases, all_along=True).stretches()


class _Schedule:
    """Draws one turn after the other until it repeats. Debts, turns due less turns drawn, are whole numbers of 1 /
    `unit`; none is ever rounded."""

    def __init__(self, phases: tuple[Phase, ...], *, all_along: bool) -> None:
        """all_along: count those who join later from the start."""
        self.phases = phases
        every = range(len(phases[0].weights))
        so_far = [sum(any(phase.weights[k] for phase in phases[: p + 1]) for k in every) for p in range(len(phases))]
        self.parts = [max(2 * num - 2, 1) for num in (so_far[-1:] * len(phases) if all_along else so_far)]
        self.unit = math.lcm(*(sum(phase.weights) for phase in phases)) * math.lcm(*self.parts)
        self.debts = [0 for _ in every]
        self.drawn = [0 for _ in every]
        self.number = self.position = 0
        self.due: list[Fraction | float] = []
        self.within_bound = True

    def stretches(self) -> list[_Stretch]:
        found: list[_Stretch] = []
        for number, phase in enumerate(self.phases):
            self.number = number
            self.due = [self._falls_due(k) for k in range(len(self.debts))]
            last = number + 1 == len(self.phases)
            self._add_phase(found, sum(phase.weights), None if last else self.phases[number + 1].start)
        return found

    def _add_phase(self, found: list[_Stretch], round_size: int, stop: int | None) -> None:
        """Rounds until the debts are as they were after an earlier one; these repeat; the last two are drawn again,
        as what comes next may change them."""
        seen: dict[tuple[int, ...], int] = {}
        while stop is None or self.position < stop:
            known = seen.setdefault(tuple(self.debts), len(found))
            if known < len(found):
                length = self.position - found[known].start
                rounds = None if stop is None else (stop - self.position) // length - 2
                if rounds is None or rounds > 0:
                    self._repeat(found, np.concatenate([each.pattern for each in found[known:]]), rounds)
                if rounds is None:
                    return
            found.append(self._draw(round_size if stop is None else min(round_size, stop - self.position)))

    def _draw(self, count: int) -> _Stretch:
        base, who, start = list(self.drawn), [], self.position
        weights = self.phases[self.number].weights
        steps = [weight * (self.unit // sum(weights)) for weight in weights]
        slack = self.unit // self.parts[self.number]
        for _ in range(count):
            self.position += 1
            self.debts = [debt + step for debt, step in zip(self.debts, steps, strict=True)]
            ready = [k for k, debt in enumerate(self.debts) if debt >= slack]
            chosen = min(ready, key=lambda k: self.due[k])
            self.debts[chosen] -= self.unit
            self.drawn[chosen] += 1
            self.due[chosen] = self._falls_due(chosen)
            who.append(chosen)
            self.within_bound &= max(self.debts) <= self.unit and min(self.debts) >= -self.unit
        return _stretch(start, self.position, np.array(who, np.int64), np.array(base, np.int64))

    def _repeat(self, found: list[_Stretch], pattern: np.ndarray, rounds: int | None) -> None:
        """The same debts at its end; where the weights go on as they are, the same draws again."""
        length = len(pattern)
        stop = None if rounds is None else self.position + rounds * length
        found.append(_stretch(self.position, stop, pattern, np.array(self.drawn, np.int64)))
        if rounds is not None:
            a_round = np.bincount(pattern, minlength=len(self.drawn)).tolist()
            self.drawn = [count + rounds * more for count, more in zip(self.drawn, a_round, strict=True)]
            self.position += rounds * length
            self.due = [self._falls_due(k) for k in range(len(self.debts))]

    def _falls_due(self, k: int) -> Fraction | float:
        """When its debt, if it is not drawn, has grown to the most that is allowed."""
        debt, here = self.debts[k], self.position
        for number in range(self.number, len(self.phases)):
            phase = self.phases[number]
            step = phase.weights[k] * (self.unit // sum(phase.weights))
            stop = self.phases[number + 1].start if number + 1 < len(self.phases) else None
            room = self.unit - self.unit // self.parts[number] - debt
            if step and (stop is None or room <= step * (stop - here)):
                return here + Fraction(room, step)
            if stop is not None:
                debt, here = debt + step * (stop - here), stop
        return math.inf


def _stretch(start: int, stop: int | None, pattern: np.ndarray, base: np.ndarray) -> _Stretch:
    drawn = pattern[:, None] == np.arange(len(base))
    before = (np.cumsum(drawn, 0) - drawn)[np.arange(len(pattern)), pattern]
    return _Stretch(start, stop, pattern, before.astype(np.int64), base, np.bincount(pattern, minlength=len(base)))

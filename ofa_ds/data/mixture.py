"""The endless stream of rows that a run draws: which family, which of its sets, which epoch, which row.

All of it is computed from (rows, weights, seed, position): there is nothing to save and nothing to resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ofa_ds.data.order import permutation
from ofa_ds.data.turns import Phase, Turns

_SETS_APART = 1000
"""Number of a family's second set among the seeds of orders, less that of its first, which is the family's own."""


class Part(NamedTuple):
    """A set's share of a family, whose rows are numbered through all of its sets."""

    rows: int
    weight: int = 1


class Drawn(NamedTuple):
    """How far a set has come."""

    family: str
    part: int
    """Which of the family's sets."""
    rows: int
    """It has."""
    drawn: int
    """Rows drawn of it, over all epochs."""


class Mixture:
    """The stream of rows of all families. Picklable; depends on its arguments alone.

    Over any prefix each family has what its weights make due, give or take one row, also where they change on the way;
    and each set of a family likewise, of the family's rows. A set's rows go by in epochs of its own, each a
    permutation of all of them.
    """

    def __init__(
        self, counts: Mapping[str, int | Sequence[Part]], weights: Mapping[str, int], seed: int,
        *, changes: Sequence[tuple[int, Mapping[str, int]]] = (),
    ) -> None:  # fmt: skip
        """counts: rows of each family that is there, or of each of its sets. weights: rows drawn of each family,
        relative to each other; of weight 0 all the time, or not in counts, it is left out. changes: (position of the
        stream, weights from there on), in order.

        Raises ValueError where nothing is left to draw.
        """
        parts = {family: _parts(found) for family, found in counts.items()}
        schedule = [(0, weights), *changes]
        self.families = tuple(
            family
            for family in weights
            if any(each[family] for _, each in schedule) and any(part.weight for part in parts.get(family, ()))
        )
        for position, each in schedule:
            if not any(each[family] for family in self.families):
                when = f" from row {position} of the stream on" if position else ""
                raise ValueError(
                    f"data.mix {dict(each)} draws nothing{when} from shards that have "
                    f"{ {family: sum(part.rows for part in found) for family, found in parts.items()} } rows; "
                    "give a family that is there a positive weight"
                )
        self.seed = seed
        self._names = tuple(weights)
        self._parts = {family: parts[family] for family in self.families}
        self._turns = _turns(
            "data.mix",
            [Phase(at, tuple(each[name] * (name in self.families) for name in self._names)) for at, each in schedule],
        )
        self._set_turns = {
            family: _turns(f"data.sets of {family}", [Phase(0, tuple(part.weight for part in found))])
            for family, found in self._parts.items()
        }

    def rows(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """(family, epoch of its set, row of the family) at stream positions start ... stop - 1."""
        number_K, epoch_K, row_K = self.draw(start, stop)
        names = [self._names[number] for number in number_K]
        return list(zip(names, epoch_K.tolist(), row_K.tolist(), strict=True))

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `rows`, in blocks: place in the weights int64 [K], epoch int64 [K], row int64 [K]."""
        number_K, count_K = self._turns.at(start, stop)
        epoch_K, row_K = np.empty_like(count_K), np.empty_like(count_K)
        for number in np.unique(number_K).tolist():
            mine = number_K == number
            epoch_K[mine], row_K[mine] = self._draw_family(number, count_K[mine])
        return number_K, epoch_K, row_K

    def _draw_family(self, number: int, count_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and row of the draws `count_K`, which follow on one another, of family `number`."""
        family = self._names[number]
        part_K, of_part_K = self._set_turns[family].at(int(count_K[0]), int(count_K[-1]) + 1)
        epoch_K, row_K = np.empty_like(count_K), np.empty_like(count_K)
        first = 0
        for k, part in enumerate(self._parts[family]):
            at = np.flatnonzero(part_K == k)
            if len(at):
                epoch_K[at], row_K[at] = np.divmod(of_part_K[at], part.rows)
                for epoch in np.unique(epoch_K[at]).tolist():
                    now = at[epoch_K[at] == epoch]
                    order = permutation(part.rows, self.seed, epoch, number + _SETS_APART * k)
                    row_K[now] = first + order.at(row_K[now])
            first += part.rows
        return epoch_K, row_K

    def progress(self, position: int) -> list[Drawn]:
        """How far each set has come before a position of the stream."""
        total = dict(zip(self._names, self._turns.drawn(position).tolist(), strict=True))
        return [
            Drawn(family, k, part.rows, count)
            for family, parts in self._parts.items()
            for k, (part, count) in enumerate(
                zip(parts, self._set_turns[family].drawn(total[family]).tolist(), strict=True)
            )
            if part.weight
        ]

    def part_of(self, family: str, row: int) -> tuple[int, range]:
        """Which set of a family a row is of, and the numbers of all of its rows."""
        first = 0
        for k, part in enumerate(self._parts[family]):
            if row < first + part.rows:
                return k, range(first, first + part.rows)
            first += part.rows
        raise IndexError(f"{family} has {first} rows, no row {row}")

    def same_until(self, other: Mixture, position: int) -> bool:
        """Whether both draw the same families up to a position; of equal sets and seeds that is the same rows."""
        return self._names == other._names and self._turns.same_until(other._turns, position)


def _parts(found: int | Sequence[Part]) -> tuple[Part, ...]:
    """A set without rows of the family has no part in it."""
    given = (Part(found),) if isinstance(found, int) else tuple(found)
    return tuple(part if part.rows else Part(0, 0) for part in given)


def _turns(key: str, phases: Sequence[Phase]) -> Turns:
    try:
        return Turns(phases)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error

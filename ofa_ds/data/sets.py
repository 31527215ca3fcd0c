"""Several directories of shards that a run draws from as if they were one: `data.sets` of a recipe."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from ofa_ds.config import DataConfig
from ofa_ds.data.mixture import Mixture, Part
from ofa_ds.data.negative_files import Negatives
from ofa_ds.data.shards import Shards
from ofa_ds.terms import FAMILIES


class DataSets(Shards):
    """Shards whose rows of a family are those of one set after the other, in the order of the recipe.

    Candidates for false statements are those of all sets together; the list of answers of a downstream task is one.
    """

    def __init__(self, sets: Mapping[str, Shards]) -> None:
        """Raises ValueError where there is none, or their lists of answers differ."""
        if not sets:
            raise ValueError("data.sets: want one at least")
        self.sets = dict(sets)
        self.path = Path("data.sets")
        self._ends = {
            family: list(itertools.accumulate(shards.families.get(family, 0) for shards in sets.values()))
            for family in FAMILIES
            if any(family in shards.families for shards in sets.values())
        }
        self.families = {family: ends[-1] for family, ends in self._ends.items()}
        self.types = dict(sum((Counter(shards.types) for shards in sets.values()), Counter()))
        self.fingerprint = _fingerprint([shards.fingerprint for shards in sets.values()])
        self._check_answers()

    def __reduce__(self) -> tuple:
        return DataSets, (self.sets,)

    def _check_answers(self) -> None:
        lists = {shards.answers: name for name, shards in self.sets.items()}
        if len(lists) > 1:
            raise ValueError(
                f"data.sets: the lists of answers of {' and '.join(lists.values())} are not the same; build their "
                "shards with one --answers FILE"
            )

    def _set_of(self, family: str, i: int) -> tuple[str, Shards, int]:
        """Name and shards of the set that row `i` of a family is of, and its number there."""
        ends = self._ends.get(family)
        if ends is None:
            raise ValueError(f"data.sets have no {family} rows, only {', '.join(self.families)}")
        if not 0 <= i < ends[-1]:
            raise IndexError(f"{family} row {i} is outside data.sets, which have {ends[-1]}")
        k = bisect_right(ends, i)
        name = list(self.sets)[k]
        return name, self.sets[name], i - (ends[k - 1] if k else 0)

    def row(self, family: str, i: int) -> dict[str, Any]:
        _, shards, j = self._set_of(family, i)
        return shards.row(family, j)

    def fields(self, family: str, i: int, columns: Collection[str]) -> dict[str, Any]:
        _, shards, j = self._set_of(family, i)
        return shards.fields(family, j, columns)

    def announce(self, rows: Iterable[tuple[str, int]]) -> None:
        own: dict[str, list[tuple[str, int]]] = {}
        for family, i in rows:
            name, _, j = self._set_of(family, i)
            own.setdefault(name, []).append((family, j))
        for name, of_set in own.items():
            self.sets[name].announce(of_set)

    def where(self, family: str, i: int) -> str:
        name, shards, j = self._set_of(family, i)
        return f"{name}: {shards.where(family, j)}"

    def named(self, family: str, i: int, row: Mapping[str, Any] | None = None) -> str:
        name, shards, j = self._set_of(family, i)
        return f"set {name}: {shards.named(family, j, row)}"

    def lines_before(self, family: str, i: int) -> int:
        _, shards, j = self._set_of(family, i)
        return shards.lines_before(family, j)

    def rows_of_types(
        self, family: str, types: Collection[str], *, start: int = 0, max_rows: int | None = None
    ) -> Iterator[int]:
        end = self.families.get(family, 0) if max_rows is None else start + max_rows
        first = 0
        for shards in self.sets.values():
            count = shards.families.get(family, 0)
            if count and first < end and start < first + count:
                skipped = max(start - first, 0)
                rows = shards.rows_of_types(family, types, start=skipped, max_rows=min(end - first, count) - skipped)
                yield from map(first.__add__, rows)
            first += count

    @cached_property
    def answers(self) -> tuple[str, ...]:
        return next(iter(self.sets.values())).answers

    @cached_property
    def negatives(self) -> Negatives:
        every = [shards.negatives for shards in self.sets.values()]
        kinds = dict.fromkeys(kind for each in every for kind in each.type2ans)
        return Negatives(
            _Joined([each.captions for each in every]),
            list(dict.fromkeys(itertools.chain(*(each.objects for each in every)))),
            {kind: list(dict.fromkeys(itertools.chain(*(each.type2ans.get(kind, ()) for each in every))))
             for kind in kinds},
        )  # fmt: skip


class _Joined(Sequence[str]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(f"want a number of range({len(self)}), got {i}")
        k = bisect_right(self._ends, i)
        return self._parts[k][i - (self._ends[k - 1] if k else 0)]


def _fingerprint(fingerprints: Sequence[str]) -> str:
    """Of one set its own: a name alone changes nothing."""
    return fingerprints[0] if len(fingerprints) == 1 else xxhash.xxh3_128_hexdigest("\n".join(fingerprints).encode())


def open_data(config: DataConfig) -> Shards:
    """What a recipe draws from. Raises ValueError, one line, where one of its directories is not what it should be."""
    task = config.task.name
    if not config.sets:
        return Shards(config.shards, task=task)
    found = {}
    for name, each in config.sets.items():
        try:
            found[name] = Shards(each.shards, task=task)
        except ValueError as error:
            raise ValueError(f"data.sets.{name}: {error}") from error
    return DataSets(found)


def sets_of(shards: Shards) -> dict[str, Shards]:
    """Each directory by the name of its set; of data.shards that is empty."""
    return shards.sets if isinstance(shards, DataSets) else {"": shards}


def mixture_of(shards: Shards, config: DataConfig, *, global_rows: int, seed: int) -> Mixture:
    """The stream of rows of a run. Raises ValueError where nothing is left to draw."""
    counts = {
        family: [
            Part(each.families.get(family, 0), config.sets[name].weight if name in config.sets else 1)
            for name, each in sets_of(shards).items()
        ]
        for family in shards.families
    }
    return Mixture(counts, config.weights(), seed, changes=config.changes(global_rows))

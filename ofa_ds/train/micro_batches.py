"""Which rows a micro-batch holds and what becomes of them: a function of (seed, step, number) alone, without state.

Ranks, workers and restarts cannot change it; whoever calls it gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ofa_ds.batch import Batch, pack
from ofa_ds.config import BatchConfig
from ofa_ds.data.corrupt import CorruptRecord
from ofa_ds.data.example import Example
from ofa_ds.data.image import decode
from ofa_ds.data.mixture import Mixture
from ofa_ds.data.shards import Shards
from ofa_ds.tasks.context import Context, row_generator, substitute_generator
from ofa_ds.tasks.task import examples, sides_of

MAX_TRIES = 64
"""Rows that are drawn in place of a damaged one, until one is whole."""


class Substituted(NamedTuple):
    """A damaged row, and the one that was learnt from in its place."""

    family: str
    row: int
    substitute: int
    problem: str
    """One line that names file, row in it, id, and what is wrong."""


class Notes(NamedTuple):
    """What is to be told of a micro-batch; equal for whoever prepares it."""

    cut: tuple[str, ...] = ()
    """Examples that were cut to the model's positions."""
    substituted: tuple[Substituted, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """`micro_batches.build(step, number)` -> Batch; no state, picklable."""

    shards: Shards
    ctx: Context
    mixture: Mixture
    batch: BatchConfig
    seed: int
    image_bucket_size: int
    references: bool = False
    """Pack those of the examples too."""

    def build(self, step: int, number: int) -> Batch:
        """Micro-batch number `number` of optimizer step `step`.

        Raises ValueError or RuntimeError that names the row that is at fault: family, number, file, row in it, id.
        """
        return self.prepare(step, number)[0]

    def prepare(self, step: int, number: int, begin: Callable[[str, int], None] | None = None) -> tuple[Batch, Notes]:
        """The same, and what is to be told of it. begin(family, row): is called before each row."""
        found: list[Example] = []
        substituted: list[Substituted] = []
        start = step * self.batch.global_rows + number * self.batch.micro_rows
        for family, epoch, index in self.mixture.rows(start, start + self.batch.micro_rows):
            rng = row_generator(self.seed, family, epoch, index)
            if begin is not None:
                begin(family, index)
            try:
                found += self._examples(family, index, rng)
            except CorruptRecord as error:
                examples, note = self._instead(family, epoch, index, str(error))
                found += examples
                substituted.append(note)
        sizes = [(side, side) for side in sides_of(self.ctx.config)]
        cut = tuple(f"{example.task} of row {example.row_id}" for example in found if example.cut)
        batch = pack(found, sizes, self.ctx.patch_size, self.image_bucket_size, references=self.references)
        return batch, Notes(cut, tuple(substituted))

    def _examples(self, family: str, index: int, rng: np.random.Generator) -> list[Example]:
        """Raises CorruptRecord where the row itself is at fault, else as `build` does."""
        row = None
        try:
            row = self.shards.row(family, index)
            return examples(family, row, rng, self.ctx)
        except Exception as error:
            if reason := _damage(row, error):
                raise CorruptRecord(f"{self.shards.named(family, index, row)}: {reason}") from error
            raise self.shards.at_row(family, index, row, error) from error

    def _instead(self, family: str, epoch: int, index: int, problem: str) -> tuple[list[Example], Substituted]:
        """Examples of another row of the same set, drawn by a generator that the damaged row alone has."""
        _, rows = self.mixture.part_of(family, index)
        rng = substitute_generator(self.seed, family, epoch, index)
        for _ in range(MAX_TRIES):
            other = int(rng.integers(rows.start, rows.stop))
            try:
                found = self._examples(family, other, rng)
            except CorruptRecord:
                continue
            return found, Substituted(family, index, other, problem)
        raise RuntimeError(
            f"{problem}; {MAX_TRIES} rows drawn in its place are damaged as well; verify the shards (ofa-ds shards "
            "verify), and copy or build them again"
        )

    def rows(self, step: int, numbers: Collection[int] | None = None) -> list[tuple[str, int]]:
        """(family, row of the family) of these micro-batches of a step; None: of all of them."""
        start, size = step * self.batch.global_rows, self.batch.micro_rows
        wanted = range(self.batch.global_rows // size) if numbers is None else sorted(numbers)
        rows = [row for k in wanted for row in self.mixture.rows(start + k * size, start + (k + 1) * size)]
        return [(family, index) for family, _, index in rows]


def _damage(row: Mapping[str, Any] | None, error: Exception) -> str:
    """Why a row that `error` came of is damaged by itself; empty where the fault is not the record's.

    row: as `Shards.row` gives it, None where it could not be read.
    """
    if row is None:
        return str(error) if isinstance(error, CorruptRecord) else ""
    if row.get("image"):  # of a downstream row without a picture it is empty
        try:
            decode(row["image"])
        except ValueError as problem:
            return str(problem)
    return ""

"""Which rows a micro-batch holds and what becomes of them: a function of (seed, step, number) alone, without state.

Ranks, workers and restarts cannot change it; whoever calls it gets the same bits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ofa_ds.batch import Batch, pack
from ofa_ds.config import BatchConfig
from ofa_ds.data.order import Mixture
from ofa_ds.data.shards import Shards
from ofa_ds.tasks.context import Context, row_generator
from ofa_ds.tasks.task import examples, sides_of


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
        """Micro-batch `number` of optimizer step `step`.

        Raises ValueError or RuntimeError that names the row that is at fault: family, number, file, row in it, id.
        """
        return self.prepare(step, number)[0]

    def prepare(self, step: int, number: int) -> tuple[Batch, list[str]]:
        """The same, and which examples were cut to the model's positions."""
        config = self.ctx.config
        found = []
        start = step * self.batch.global_rows + number * self.batch.micro_rows
        for family, epoch, index in self.mixture.rows(start, start + self.batch.micro_rows):
            row = None
            try:
                rng = row_generator(self.seed, family, epoch, index)
                row = self.shards.row(family, index)
                found += examples(family, row, rng, self.ctx)
            except Exception as error:
                raise self.shards.at_row(family, index, row, error) from error
        sizes = [(side, side) for side in sides_of(config)]
        cut = [f"{example.task} of row {example.row_id}" for example in found if example.cut]
        batch = pack(found, sizes, self.ctx.patch_size, self.image_bucket_size, references=self.references)
        return batch, cut

    def rows(self, step: int, numbers: Collection[int] | None = None) -> list[tuple[str, int]]:
        """(family, row of the family) of these micro-batches of a step; None: of all of them."""
        start, size = step * self.batch.global_rows, self.batch.micro_rows
        wanted = range(self.batch.global_rows // size) if numbers is None else sorted(numbers)
        rows = [row for k in wanted for row in self.mixture.rows(start + k * size, start + (k + 1) * size)]
        return [(family, index) for family, _, index in rows]

"""Shards in a random order: one permutation of all rows of a family, a function of the seed and of their number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ofa_ds.data.manifest import Manifest
from ofa_ds.data.order import Permutation
from ofa_ds.data.pool import need_one_process
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import need_checksums
from ofa_ds.data.tools import rewrite
from ofa_ds.storage.atomic import new_directory, refuse_inside
from ofa_ds.terms import FAMILIES, SHARD_BYTES


@dataclass(frozen=True)
class Shuffled:
    """Places `start` ... `stop` - 1 of the new order."""

    total: int
    seed: int
    family: int
    start: int
    stop: int

    def blocks(self) -> Iterator[np.ndarray]:
        permutation = Permutation(self.total, self.seed, 0, self.family)
        for start in range(self.start, self.stop, rewrite.BLOCK):
            yield permutation.at(np.arange(start, min(start + rewrite.BLOCK, self.stop)))


def shuffle_shards(
    path: Path, out: Path, *, seed: int = 1, shard_bytes: int = SHARD_BYTES, workers: int = 2
) -> Manifest:
    """Write the rows of shards, each once, in a random order to `out`, which must not be there yet.

    The same seed gives the same bytes with any number of workers. Raises ValueError for a wrong place, RuntimeError
    where the shards are damaged, OSError.
    """
    need_one_process("shards shuffle")
    refuse_inside(out, path)
    source = Shards(path)
    with new_directory(out) as folder:
        rewrite.need_space(folder, [source])
        need_checksums(path, workers)
        run = rewrite.new_run()
        jobs = []
        for family, total in source.families.items():
            each = rewrite.rows_per_file(source.manifest, family, total, shard_bytes)
            starts = range(0, total, each)
            which = [Shuffled(total, seed, FAMILIES.index(family), k, min(k + each, total)) for k in starts]
            numbers = [(part, part.stop - part.start) for part in which]
            jobs += rewrite.jobs_of(source, folder, family, numbers, run)
        made = rewrite.write_files(jobs, workers, "shuffling shards")
        by_family = {
            family: [done for job, done in zip(jobs, made, strict=True) if job.family == family]
            for family in source.families
        }
        return rewrite.finish(folder, source, by_family)

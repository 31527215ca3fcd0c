"""Rows of shards in another order, or some of them, as new shards. Memory: a record batch a process."""

from __future__ import annotations

import mmap
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from ofa_ds.data import answer_list, task_rows
from ofa_ds.data.batch_index import write_index
from ofa_ds.data.manifest import NEGATIVES, Family, Manifest, Source, fingerprint
from ofa_ds.data.pool import run_jobs
from ofa_ds.data.shard_writer import ShardWriter, Written, chained, row_bytes
from ofa_ds.data.shards import Shards
from ofa_ds.data.tsv import TYPES
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import check_space, sync_tree

BLOCK = 1 << 16
"""Row numbers that are made at a time."""

MAPPED_BYTES = 128 << 20
"""Of the source that a process has in memory at most."""
_AROUND_BYTES = 1 << 16


class Numbers(Protocol):
    """Which rows a file gets, in order; picklable, and small however many they are."""

    def blocks(self) -> Iterator[np.ndarray]:
        """int64 [N] each."""


@dataclass(frozen=True)
class FileJob:
    """One Arrow file to write."""

    source: Path
    answers: str
    """Checksum of the list of answers of the source; empty where there is none."""
    family: str
    numbers: Numbers
    count: int
    target: Path
    run: str
    """Of one command: what a process keeps open is of it alone."""


@dataclass
class FileMade:
    written: Written
    types: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    unlisted: int = 0


def rows_per_file(manifest: Manifest, family: str, count: int, shard_bytes: int) -> int:
    """Of `count` rows of a family, cut into files of about `shard_bytes`, all as long as each other but the last."""
    part = manifest.families[family]
    num_bytes = count * sum(shard.num_bytes for shard in part.shards) // part.rows
    return -(-count // max(1, round(num_bytes / shard_bytes)))


def jobs_of(
    source: Shards, folder: Path, family: str, numbers: Sequence[tuple[Numbers, int]], run: str
) -> list[FileJob]:
    """numbers: of each file, and how many they are."""
    answers = source.manifest.answers
    targets = [folder / f"{family}-{number:05d}.arrow" for number in range(len(numbers))]
    pairs = zip(numbers, targets, strict=True)
    return [FileJob(source.path, answers, family, which, count, target, run) for (which, count), target in pairs]


def new_run() -> str:
    return secrets.token_hex(8)


def write_files(jobs: Sequence[FileJob], workers: int, what: str) -> list[FileMade]:
    """Raises RuntimeError, OSError with the name of a file."""
    progress = Progress(sum(job.count for job in jobs), what, "rows")
    made = []
    try:
        for job, done in zip(jobs, run_jobs(write_file, jobs, workers), strict=True):
            made.append(done)
            progress.add(job.count)
    finally:
        progress.close()
    return made


def write_file(job: FileJob) -> FileMade:
    """Runs in a worker."""
    shards = _opened(job.source, job.run)
    listed = answer_list.listed(job.source, job.answers) if job.answers else frozenset()
    writer = ShardWriter(job.target, job.family)
    types: Counter[str] = Counter()
    pages = _Pages(shards)
    unanswered = unlisted = rows = 0
    for block in job.numbers.blocks():
        for i in block.tolist():
            row = shards.row(job.family, i)
            writer.add(row, size := row_bytes(row))
            pages.touched(size)
            rows += 1
            if "type" in row:
                types[row["type"]] += 1
            if job.family == "downstream":
                unanswered += not task_rows.is_answered(row)
                unlisted += bool(listed and row["answers"]) and answer_list.best_answer(row["answers"]) not in listed
    written = writer.close()
    assert written is not None and rows == job.count
    return FileMade(written, types, unanswered, unlisted)


class _Pages:
    """Those of mapped files: let go of before there are too many, since rows at random touch files as wholes."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._least = self._mapped()
        self._touched = 0

    def touched(self, num_bytes: int) -> None:
        """By a row of that size; the system maps some pages around it too."""
        self._touched += num_bytes + _AROUND_BYTES
        if self._touched > MAPPED_BYTES // 64:  # of 2 MiB a row, as some systems map, still in time
            self._touched = 0
            if not (mapped := self._mapped()) or mapped > self._least + MAPPED_BYTES // 2:
                self._shards.forget_pages()

    @staticmethod
    def _mapped() -> int:
        """Bytes of files, its own program's too, that this process has in memory; 0 where the system does not say."""
        try:
            return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE
        except OSError:
            return 0


@lru_cache(maxsize=4)
def _opened(path: Path, run: str) -> Shards:
    return Shards(path)


def finish(folder: Path, source: Shards, made: Mapping[str, Sequence[FileMade]]) -> Manifest:
    """Everything but the Arrow files, the manifest last; all of it durable."""
    families = {}
    for family, files in made.items():
        families[family] = _family(source, family, files)
        write_index(folder, family, [done.written.entries for done in files])
    before = source.manifest
    if before.negatives:
        shutil.copytree(source.path / NEGATIVES, folder / NEGATIVES)
    if before.answers:
        shutil.copyfile(source.path / answer_list.FILE, folder / answer_list.FILE)
    name = fingerprint(families, before.negatives, before.answers)
    manifest = Manifest(families=families, negatives=before.negatives, fingerprint=name, answers=before.answers)
    manifest.write(folder)
    sync_tree(folder)
    return manifest


def _family(source: Shards, family: str, made: Sequence[FileMade]) -> Family:
    shards = tuple(done.written.shard for done in made)
    types = sum((done.types for done in made), Counter())
    rows = sum(shard.rows for shard in shards)
    own_ids = source.manifest.families[family].own_ids
    return Family(
        rows=rows,
        types={kind: types[kind] for kind in (*TYPES, *types) if types[kind]},
        quarantined=0,
        digest=chained(shards),
        sources=(Source(source.path.resolve().name, rows, 0),),
        shards=shards,
        unanswered=sum(done.unanswered for done in made),
        unlisted=sum(done.unlisted for done in made),
        own_ids=True if own_ids is False else own_ids,  # a line's number is a name now, no longer a place
    )


def need_space(folder: Path, sources: Sequence[Shards]) -> None:
    """Raises OSError before anything is written where the rows of all do not fit."""
    parts = [part for source in sources for part in source.manifest.families.values()]
    shards = [shard for part in parts for shard in part.shards]
    check_space(folder, sum(shard.num_bytes for shard in shards), len(shards))

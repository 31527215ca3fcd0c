"""Shards divided into parts that share no row, or no picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ofa_ds.data.manifest import Manifest
from ofa_ds.data.order import Permutation
from ofa_ds.data.pool import need_one_process, run_jobs
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import need_checksums
from ofa_ds.data.tools import rewrite
from ofa_ds.data.tools.chunks import Chunk, chunks_of
from ofa_ds.data.tools.sweep import record_batches
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import new_directory, refuse_inside
from ofa_ds.terms import FAMILIES, SHARD_BYTES

MAX_PARTS = 255
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HASHES = 1 << 64


@dataclass(frozen=True)
class Share:
    """What one part gets: a fraction, or a number of rows of each family, or (neither) what the others leave."""

    name: str
    fraction: Fraction | None = None
    rows: int | None = None

    @property
    def is_rest(self) -> bool:
        return self.fraction is None and self.rows is None


def parse_shares(given: Sequence[tuple[str, str]], *, by_image: bool = False) -> tuple[Share, ...]:
    """(name, "0.02" | "5000" | "rest") each. Raises ValueError of one line."""
    shares = tuple(_share(name, text, by_image) for name, text in given)
    names = [share.name for share in shares]
    if len(set(names)) < len(names) or not 1 <= len(names) <= MAX_PARTS:
        raise ValueError(f"want 1 ... {MAX_PARTS} parts of different names, got {', '.join(names)}")
    if sum(share.is_rest for share in shares) > 1:
        raise ValueError("one part alone can be the rest")
    if (total := sum(share.fraction or 0 for share in shares)) > 1:
        raise ValueError(f"the fractions add up to {float(total):g}, which is more than 1")
    return shares


def _share(name: str, text: str, by_image: bool) -> Share:
    if not _NAME.fullmatch(name):
        raise ValueError(f"part {name!r}: want a name of letters, digits, _ . and -, which becomes a directory")
    if text == "rest":
        return Share(name)
    if re.fullmatch(r"[0-9]{1,18}", text) and int(text) > 0:
        if by_image:
            raise ValueError(
                f"part {name}={text}: with --by-image pictures are drawn, not rows; give a fraction or rest"
            )
        return Share(name, rows=int(text))
    if re.fullmatch(r"0?\.[0-9]{1,18}", text) and Fraction(text) > 0:
        return Share(name, Fraction(text))
    raise ValueError(f"part {name}={text}: want a fraction such as 0.02, a number of rows, or rest")


def split_shards(
    path: Path, out: Path, shares: Sequence[Share], *, seed: int = 1, by_image: bool = False,
    shard_bytes: int = SHARD_BYTES, workers: int = 2,
) -> dict[str, Manifest]:  # fmt: skip
    """Write a directory of shards for each part into `out`, which must not be there yet. -> its manifest by name.

    Rows keep their order. Of each family a part has exactly its share, drawn at random; by_image: all rows of one
    picture (of one text, where there is none) are in the same part, in all families, and fractions hold about. The
    same seed gives the same parts. Raises ValueError for a part without rows, RuntimeError for damage, OSError.
    """
    need_one_process("shards split")
    refuse_inside(out, path)
    source = Shards(path)
    with new_directory(out) as folder:
        rewrite.need_space(folder, [source])
        need_checksums(path, workers)
        assigned = _by_image(source, folder, shares, seed, workers) if by_image else _by_row(
            source, folder, shares, seed)  # fmt: skip
        made = {}
        for number, share in enumerate(shares, 1):
            (folder / share.name).mkdir()
            made[share.name] = _write(source, folder / share.name, assigned, (number, share.name), shard_bytes, workers)
        for file in assigned.values():
            file.unlink()
    return made


def counts(shares: Sequence[Share], total: int, what: str) -> list[int]:
    """Rows of each part. Raises ValueError where there are not so many."""
    found, fraction = [], Fraction(0)
    for share in shares:
        if share.fraction is not None:
            before, fraction = round(fraction * total), fraction + share.fraction
            found.append(round(fraction * total) - before)
        else:
            found.append(share.rows or 0)
    if (left := total - sum(found)) < 0:
        raise ValueError(f"{what} has {total} rows, the parts want {sum(found)}")
    return [left if share.is_rest else count for share, count in zip(shares, found, strict=True)]


def _by_row(source: Shards, folder: Path, shares: Sequence[Share], seed: int) -> dict[str, Path]:
    assigned = {}
    for family, total in source.families.items():
        ends = np.cumsum(counts(shares, total, f"{source.path}: {family}"))
        permutation = Permutation(total, seed, 0, FAMILIES.index(family))
        assigned[family] = folder / f"{family}.parts"
        with assigned[family].open("wb") as file:
            for start in range(0, total, rewrite.BLOCK):
                place = permutation.at(np.arange(start, min(start + rewrite.BLOCK, total)))
                file.write(_part_of(place, ends).tobytes())
    return assigned


def _part_of(place: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint8: which of the stretches up to `ends` each place is in, from 1; 0: in none."""
    part = np.searchsorted(ends, place, side="right")
    return np.where(part < len(ends), part + 1, 0).astype(np.uint8)


def _by_image(source: Shards, folder: Path, shares: Sequence[Share], seed: int, workers: int) -> dict[str, Path]:
    ends = np.array(_hash_ends(shares), np.uint64)
    chunks = []
    for chunk in chunks_of(source.path, source.manifest):
        if not isinstance(chunk, Chunk):
            raise chunk
        chunks.append(chunk)
    progress = Progress(sum(chunk.num_bytes for chunk in chunks) >> 20, "reading pictures", "MB")
    assigned = {family: folder / f"{family}.parts" for family in source.families}
    try:
        job = partial(_parts_in, ends=ends, seed=seed)
        for chunk, parts in zip(chunks, run_jobs(job, chunks, workers), strict=True):
            with assigned[chunk.family].open("ab") as file:
                file.write(parts)
            progress.add(chunk.num_bytes / (1 << 20))
    finally:
        progress.close()
    return assigned


def _hash_ends(shares: Sequence[Share]) -> list[int]:
    """The last hash of each part."""
    rest = 1 - sum((share.fraction or Fraction(0) for share in shares), Fraction(0))
    found, total = [], Fraction(0)
    for share in shares:
        total += rest if share.is_rest else share.fraction or Fraction(0)
        found.append(max(int(total * _HASHES) - 1, 0))
    return found


def _parts_in(chunk: Chunk, ends: np.ndarray, seed: int) -> bytes:
    """Runs in a worker: the part of each row, a byte each."""
    hashes = [hash_of(file.row(i), seed) for file, batch in record_batches(chunk) for i in file.rows_of(batch)]
    part = np.searchsorted(ends, np.array(hashes, np.uint64), side="left")
    return np.where(part < len(ends), part + 1, 0).astype(np.uint8).tobytes()


def hash_of(row: Mapping[str, Any], seed: int = 0) -> int:
    """Of the row's picture as it is stored; of its text where it has none."""
    content = row.get("image") or "\0".join((row["text"], row.get("text_pair", ""))).encode()
    return xxhash.xxh3_64_intdigest(content, seed & (_HASHES - 1))


@dataclass(frozen=True)
class Assigned:
    """Of the rows that `file` gives to `part`, from row `first` on, `count`."""

    file: Path
    part: int
    first: int
    count: int

    def blocks(self) -> Iterator[np.ndarray]:
        left = self.count
        for start, rows in _rows_of(self.file, self.part, self.first):
            yield start + rows[:left]
            left -= len(rows[:left])
            if not left:
                return


def _rows_of(file: Path, part: int, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(row, rows from there on) of a part, block by block."""
    parts = np.memmap(file, np.uint8, "r")
    for start in range(first, len(parts), rewrite.BLOCK):
        yield start, np.flatnonzero(parts[start : start + rewrite.BLOCK] == part)


def _cut(file: Path, part: int, each: int) -> list[tuple[Assigned, int]]:
    """Files of `each` rows: those of a part, cut."""
    found: list[tuple[Assigned, int]] = []
    begin, count = 0, 0
    for start, rows in _rows_of(file, part, 0):
        while len(rows):
            taken = rows[: each - count]
            if not count:
                begin = start + int(taken[0])
            count, rows = count + len(taken), rows[len(taken) :]
            if count == each:
                found.append((Assigned(file, part, begin, count), count))
                count = 0
    return [*found, (Assigned(file, part, begin, count), count)] if count else found


def _write(
    source: Shards, folder: Path, assigned: Mapping[str, Path], part: tuple[int, str], shard_bytes: int, workers: int
) -> Manifest:
    number, name = part
    run, jobs = rewrite.new_run(), []
    for family, file in assigned.items():
        count = sum(len(rows) for _, rows in _rows_of(file, number, 0))
        if count:
            each = rewrite.rows_per_file(source.manifest, family, count, shard_bytes)
            jobs += rewrite.jobs_of(source, folder, family, _cut(file, number, each), run)
    if not jobs:
        raise ValueError(f"{source.path}: part {name} would have no rows; give it a larger share")
    made = rewrite.write_files(jobs, workers, f"writing {name}")
    families = dict.fromkeys(job.family for job in jobs)
    pairs = list(zip(jobs, made, strict=True))
    return rewrite.finish(
        folder, source, {each: [done for job, done in pairs if job.family == each] for each in families}
    )

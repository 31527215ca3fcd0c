"""Verifying shards: every checksum, every row, every picture. All problems are listed, not just the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from ofa_ds.data.answer_list import read_answer_list
from ofa_ds.data.manifest import MANIFEST, NEGATIVES, TYPED, Manifest, fingerprint, read_manifest
from ofa_ds.data.negative_files import checksums, read_negatives
from ofa_ds.data.pool import run_jobs, serve_if_worker
from ofa_ds.data.shard_file import ShardFile
from ofa_ds.data.shard_writer import chain, chained, row_digest
from ofa_ds.data.tools.chunks import Chunk, chunks_of
from ofa_ds.data.tools.row_check import row_problems
from ofa_ds.data.tools.sweep import sweep
from ofa_ds.progress import Progress

MAX_PROBLEMS_A_CHUNK = 1000
"""That are listed, of rows; beyond that their count tells enough."""


@dataclass
class Found:
    """What was seen in a chunk."""

    problems: list[str] = field(default_factory=list)
    digest: int = 0
    """Of its rows."""
    rows: int = 0
    types: Counter[str] = field(default_factory=Counter)
    sides: dict[int, int] = field(default_factory=dict)
    """Image family: number of codes -> the first row that has so many."""


def verify_shards(path: Path | str, *, workers: int = 2, decode: bool = True) -> list[str]:
    """Compare every checksum and count; with `decode` look at every row and decode its picture too.

    -> what is wrong, one line each. The record batches of one file are divided among the workers as well.
    """
    serve_if_worker()
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return [str(error)]
    return _chunk_problems(path, manifest, workers, decode) + _manifest_problems(path, manifest)


def need_checksums(path: Path, workers: int) -> None:
    """Raises RuntimeError, with the first problem, where a checksum of shards is wrong. Reads all of them once."""
    if problems := verify_shards(path, workers=workers, decode=False):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RuntimeError(f"{problems[0]}{more}; see all with: ofa-ds shards verify {path} --no-decode")


def _chunk_problems(path: Path, manifest: Manifest, workers: int, decode: bool) -> list[str]:
    found = list(chunks_of(path, manifest))
    problems = [str(error) for error in found if not isinstance(error, Chunk)]
    chunks = [chunk for chunk in found if isinstance(chunk, Chunk)]
    progress = Progress(sum(chunk.num_bytes for chunk in chunks) >> 20, "verifying shards", "MB")
    results = []
    try:
        seen = run_jobs(partial(verify_chunk, decode=decode), chunks, workers, threads=not decode)
        for chunk, result in zip(chunks, seen, strict=True):
            results.append(result)
            problems += result.problems
            progress.note = f"problems so far: {len(problems)}" if problems else ""
            progress.add(chunk.num_bytes / (1 << 20))
    finally:
        progress.close()
    if not problems:
        problems += _type_problems(path, manifest, chunks, results)
        problems += _digest_problems(path, manifest, chunks, results) if decode else []
    return list(dict.fromkeys(problems))  # a file that is not there is told once, not by each of its chunks


def _digest_problems(path: Path, manifest: Manifest, chunks: Sequence[Chunk], results: Sequence[Found]) -> list[str]:
    """Of files as wholes, from what was seen in their chunks."""
    problems = []
    sides: dict[int, str] = {}
    pairs = zip(chunks, results, strict=True)
    for (family, number), mine in groupby(pairs, lambda pair: (pair[0].family, pair[0].number)):
        shard, digest, rows = manifest.families[family].shards[number], 0, 0
        for _, seen in mine:
            digest, rows = chain(digest, seen.digest, seen.rows), rows + seen.rows
            for side, row in seen.sides.items():
                sides.setdefault(side, f"{path / shard.file}: row {row}")
        if (digest, rows) != (shard.digest, shard.rows):
            problems.append(f"{path / shard.file}: the rows are not those that {MANIFEST} describes")
    if len(sides) > 1:
        one, other = list(sides.values())[:2]
        problems.append(f"{other}: image: is of another size than that of {one}; want all of one size")
    return problems


def _manifest_problems(path: Path, manifest: Manifest) -> list[str]:
    problems = []
    for family, part in manifest.families.items():
        if chained(part.shards) != part.digest or part.rows != sum(shard.rows for shard in part.shards):
            problems.append(f"{path / MANIFEST}: what it says of {family} as a whole is not what it says of its files")
    if fingerprint(manifest.families, manifest.negatives, manifest.answers) != manifest.fingerprint:
        problems.append(f"{path / MANIFEST}: its fingerprint is not that of its rows")
    return problems + _answer_problems(path, manifest) + _negative_problems(path, manifest)


def _answer_problems(path: Path, manifest: Manifest) -> list[str]:
    try:
        read_answer_list(path, manifest.answers)
    except (OSError, RuntimeError) as error:
        return [str(error)]
    return []


def _type_problems(path: Path, manifest: Manifest, chunks: Sequence[Chunk], results: Sequence[Found]) -> list[str]:
    """Rows of a type that the manifest does not count are neither shown nor judged, and not said to be there."""
    problems = []
    for family in (family for family in TYPED if family in manifest.families):
        found: Counter[str] = Counter()
        for chunk, seen in zip(chunks, results, strict=True):
            found.update(seen.types if chunk.family == family else {})
        if found != Counter(types := manifest.families[family].types):
            problems.append(f"{path / MANIFEST}: families.{family}.types is {types}, its files hold {dict(found)}")
    return problems


def _negative_problems(path: Path, manifest: Manifest) -> list[str]:
    found = checksums(path) if (path / NEGATIVES).is_dir() else {}
    differ = [name for name in sorted(found | manifest.negatives) if found.get(name) != manifest.negatives.get(name)]
    if differ:
        reason = f"its checksum is not the one in {MANIFEST}, or it is missing"
        return [f"{path / NEGATIVES / name}: {reason}" for name in differ]
    try:
        read_negatives(path)
    except (OSError, ValueError, RuntimeError) as error:
        return [str(error)]
    return []


def verify_chunk(chunk: Chunk, *, decode: bool) -> Found:
    """Runs in a worker. Rows of a damaged batch are not looked at further."""
    found = Found()
    try:
        for file, batch in sweep(chunk):
            if problem := file.checksum_problem(batch):
                found.problems.append(problem)
            elif batch < file.num_batches:
                if chunk.family in TYPED:
                    found.types.update(kind.decode(errors="replace") for kind in file.types_in(batch))
                if decode:
                    _verify_rows(chunk, file, file.rows_of(batch), found)
    except (OSError, RuntimeError, ValueError) as error:
        found.problems.append(str(error))
    return found


def _verify_rows(chunk: Chunk, file: ShardFile, rows: range, found: Found) -> None:
    for i in rows:
        row = file.row(i)
        found.digest = chain(found.digest, row_digest(row), 1)
        found.rows += 1
        if "codes" in row:
            found.sides.setdefault(len(row["codes"]), i)
        for problem in row_problems(chunk.family, row):
            if len(found.problems) < MAX_PROBLEMS_A_CHUNK:
                found.problems.append(f"{file.path}: row {i}: {problem}")

"""Verifying shards: every checksum, every row, every picture. All problems are listed, not just the first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ofa_ds.data.answer_list import read_answer_list
from ofa_ds.data.manifest import MANIFEST, NEGATIVES, TYPED, Manifest, Shard, fingerprint, read_manifest
from ofa_ds.data.negative_files import checksums, read_negatives
from ofa_ds.data.picture import check_image
from ofa_ds.data.pool import run_jobs, serve_if_worker
from ofa_ds.data.shard_file import ShardFile, ShardFiles
from ofa_ds.data.shard_writer import chain, row_digest
from ofa_ds.data.shards import Shards
from ofa_ds.progress import Progress


@dataclass(frozen=True)
class Job:
    folder: Path
    family: str
    shard: Shard
    entries: bytes
    """Of the shard in the index."""


def verify_shards(path: Path | str, *, workers: int = 2) -> list[str]:
    """Compare every checksum and decode every picture. -> what is wrong, one line each."""
    serve_if_worker()
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return [str(error)]
    try:
        jobs = _jobs(path, manifest)
    except (OSError, RuntimeError) as error:
        return [str(error)]
    progress = Progress(sum(job.shard.rows for job in jobs), "verifying shards", "rows")
    problems = []
    try:
        for job, found in zip(jobs, run_jobs(verify_one, jobs, workers), strict=True):
            problems += found
            progress.add(job.shard.rows)
    finally:
        progress.close()
    return problems + _manifest_problems(path, manifest) + ([] if problems else _type_problems(path))


def _jobs(path: Path, manifest: Manifest) -> list[Job]:
    files = {family: ShardFiles(path, manifest, family) for family in manifest.families}
    return [Job(path, family, file.shard, bytes(file.entries)) for family in files for file in files[family]]


def _manifest_problems(path: Path, manifest: Manifest) -> list[str]:
    problems = []
    for family, part in manifest.families.items():
        digest = 0
        for shard in part.shards:
            digest = chain(digest, shard.digest, shard.rows)
        if digest != part.digest or part.rows != sum(shard.rows for shard in part.shards):
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


def _type_problems(path: Path) -> list[str]:
    """Rows of a type that the manifest does not count are neither shown nor judged, and not said to be there."""
    shards = Shards(path)
    problems = []
    for family in (family for family in TYPED if family in shards.families):
        types = shards.manifest.families[family].types
        found = {kind: sum(1 for _ in shards.rows_of_types(family, [kind])) for kind in types}
        if found != types:
            problems.append(f"{path / MANIFEST}: families.{family}.types is {types}, its files hold {found}")
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


def verify_one(job: Job) -> list[str]:
    """Runs in a worker: the problems of one file. Rows of a damaged batch are not looked at further."""
    file = ShardFile(job.folder / job.shard.file, job.family, job.shard, lambda: memoryview(job.entries))
    try:
        batches = range(file.num_batches)
        problems = {batch: file.checksum_problem(batch) for batch in (*batches, len(batches))}
    except (OSError, RuntimeError) as error:
        return [str(error)]
    found = [problem for problem in problems.values() if problem]
    if problems[len(batches)]:
        return found  # without the footer Arrow finds no batch
    digest = 0
    for batch in batches:
        if problems[batch]:
            continue
        for i in file.rows_of(batch):
            try:
                row = file.row(i, verify=False)
            except (OSError, RuntimeError) as error:
                return [*found, str(error)]
            digest = chain(digest, row_digest(row), 1)
            if row.get("image"):  # of a downstream row without a picture it is empty
                found += _image_problems(file, i, row["image"])
    if not found and digest != job.shard.digest:
        found.append(f"{file.path}: the rows are not those that {MANIFEST} describes")
    return found


def _image_problems(file: ShardFile, i: int, image: bytes) -> list[str]:
    try:
        check_image(image)
    except ValueError as error:
        return [f"{file.path}: row {i}: {error}"]
    return []

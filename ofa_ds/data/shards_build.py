"""Building shards: each job turns some lines of one TSV file into one Arrow file; the manifest is written last.

What is written depends on the sources and on rows_per_shard, not on the number of workers. Everything happens in a
directory beside the target, which takes its place when all is well and is removed when not.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ofa_ds.data import tsv
from ofa_ds.data.negative_files import derive_negatives, write_negatives
from ofa_ds.data.pool import run_jobs, serve_if_worker
from ofa_ds.data.shards import FORMAT, MANIFEST, SCHEMAS, to_columns
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import sync
from ofa_ds.terms import FAMILIES

MAX_BATCH_ROWS = 256
MAX_BATCH_BYTES = 16 << 20
QUARANTINE = "quarantine"

_PRIME = (1 << 61) - 1
_BASE = 0x1F3D5B79A2C4E68B % _PRIME


@dataclass(frozen=True)
class Job:
    """Lines `span` of `source` -> Arrow file `file` in `folder`."""

    folder: Path
    file: str
    family: str
    source: Path
    span: tsv.Span
    on_error: str


@dataclass
class Built:
    """What a job did. `digest` is of the rows alone, see `chain`."""

    job: Job
    rows: int = 0
    batch_rows: list[int] = field(default_factory=list)
    byte_ends: list[int] = field(default_factory=list)
    xxh3: list[str] = field(default_factory=list)
    digest: int = 0
    types: Counter[str] = field(default_factory=Counter)
    sides: dict[int, int] = field(default_factory=dict)
    """Image family: side of the picture -> first line that has it."""
    quarantined: int = 0


def build(
    out: Path,
    sources: Mapping[str, Sequence[Path]],
    negatives: Path | None,
    rows_per_shard: int,
    workers: int,
    on_error: str,
) -> dict[str, Any]:
    """See `shards.build_shards`."""
    serve_if_worker()
    if on_error not in ("stop", "quarantine"):
        raise ValueError(f"want on_error stop or quarantine, got {on_error!r}")
    unknown = set(sources) - set(FAMILIES)
    if unknown or not any(sources.values()):
        raise ValueError(f"want TSV files of {', '.join(FAMILIES)}; got {', '.join(sorted(unknown)) or 'none'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; give another --out or remove it")
    with _appearing(out) as folder:
        jobs = _plan(folder, sources, rows_per_shard, on_error)
        built = _run(jobs, workers)
        _one_side(built)
        manifest = dict(FORMAT)
        manifest["families"] = {family: _family(family, built) for family in FAMILIES if sources.get(family)}
        _merge_quarantine(folder, built)
        manifest["negatives"] = _negatives(folder, negatives, manifest)
        manifest["fingerprint"] = fingerprint(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Of the rows and the negatives in order, not of how they are cut into files."""
    content = {family: [part["rows"], part["digest"]] for family, part in manifest["families"].items()}
    return xxhash.xxh3_128_hexdigest(json.dumps([content, manifest["negatives"]], sort_keys=True).encode())


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A directory to write in, which becomes `out` at the end, or is removed where an error comes first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        os.replace(partial, out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plan(folder: Path, sources: Mapping[str, Sequence[Path]], rows_per_shard: int, on_error: str) -> list[Job]:
    jobs = []
    for family in FAMILIES:
        number = 0
        for source in sources.get(family, ()):
            if not source.is_file():
                raise ValueError(f"{source}: no such file")
            for span in tsv.spans(source, rows_per_shard):
                jobs.append(Job(folder, f"{family}-{number:05d}.arrow", family, source, span, on_error))
                number += 1
    return jobs


def _run(jobs: Sequence[Job], workers: int) -> list[Built]:
    progress = Progress(sum(job.span.num_lines for job in jobs), "building shards", "rows")
    built = []
    try:
        for done in run_jobs(build_one, jobs, workers):
            built.append(done)
            progress.add(done.job.span.num_lines)
    finally:
        progress.close()
    return built


def build_one(job: Job) -> Built:
    """Runs in a worker. Raises ValueError "file:line: column: reason" for a bad line under on_error stop."""
    built = Built(job)
    path = job.folder / job.file
    writer = _Writer(path, job.family, built)
    with contextlib.ExitStack() as stack:
        bad = None
        for number, line in tsv.lines(job.source, job.span):
            try:
                row = tsv.parse(job.family, line)
            except ValueError as error:
                message = f"{job.source}:{number}: {error}"
                if job.on_error == "stop":
                    raise ValueError(message) from error
                bad = bad or [stack.enter_context(path.with_suffix(suffix).open("wb")) for suffix in (".tsv", ".log")]
                bad[0].write(line + b"\n")
                bad[1].write(f"{message}\n".encode("utf-8", "backslashreplace"))
                built.quarantined += 1
                continue
            writer.add(row, len(line))
            if job.family == "vision_language":
                built.types[row["type"]] += 1
            elif job.family == "image":
                built.sides.setdefault(tsv.PIXELS_PER_CODE * 2 * round(len(row["codes"]) ** 0.5), number)
    writer.close()
    return built


class _Writer:
    """Rows -> record batches -> one Arrow file, and what the manifest says of it."""

    def __init__(self, path: Path, family: str, built: Built) -> None:
        self._path, self._family, self._built = path, family, built
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pa.ipc.new_file(self._sink, SCHEMAS[family])
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        """size: of the TSV line, which is never less than what is written of it."""
        if self._rows and (len(self._rows) == MAX_BATCH_ROWS or self._bytes + size > MAX_BATCH_BYTES):
            self._flush()
        self._rows.append(to_columns(self._family, row))
        self._bytes += size
        self._built.digest = chain(self._built.digest, row_digest(row), 1)
        self._built.rows += 1

    def _flush(self) -> None:
        schema = SCHEMAS[self._family]
        columns = [_array([row[part.name] for row in self._rows], part.type) for part in schema]
        self._file.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        self._built.batch_rows.append(len(self._rows))
        self._built.byte_ends.append(self._sink.tell())
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        """Writes no file where there were no rows."""
        if self._rows:
            self._flush()
        self._file.close()
        self._built.byte_ends.append(self._sink.tell())
        self._sink.close()
        if not self._built.rows:
            self._path.unlink()
            return
        data = np.memmap(self._path, np.uint8, "r")
        starts = [0, *self._built.byte_ends[:-1]]
        spans = zip(starts, self._built.byte_ends, strict=True)
        self._built.xxh3 = [xxhash.xxh3_64_hexdigest(data[start:stop]) for start, stop in spans]


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind != pa.binary():
        return pa.array(values, kind)
    # Joining is several times faster than letting Arrow's builder grow.
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def row_digest(row: Mapping[str, Any]) -> int:
    """Of a row's content, the same whether it comes from a TSV line or from a shard."""
    digest = xxhash.xxh3_64()
    rest = []
    for name in sorted(row):
        value = row[name]
        if isinstance(value, bytes | memoryview | np.ndarray):
            rest.append((name, len(value)))
            digest.update(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
        else:
            rest.append((name, value))
    digest.update(repr(rest).encode("utf-8", "surrogatepass"))
    return digest.intdigest()


def chain(before: int, digest: int, rows: int) -> int:
    """Digest of some rows followed by `rows` more whose digest is `digest`; the same however the rows are cut."""
    return (before * pow(_BASE, rows, _PRIME) + digest) % _PRIME


def _one_side(built: Sequence[Built]) -> None:
    """Raises ValueError where pictures of the image family differ in size: their codes would not line up."""
    first: dict[int, str] = {}
    for part in built:
        for side, line in part.sides.items():
            first.setdefault(side, f"{part.job.source}:{line}: {side} x {side}")
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise ValueError(f"{other}: image: want all pictures of one size, but {one}")


def _family(family: str, built: Sequence[Built]) -> dict[str, Any]:
    mine = [part for part in built if part.job.family == family]
    good = [part for part in mine if part.rows]
    if not good:
        source = mine[0].job.source
        tried = sum(part.job.span.num_lines for part in mine)
        raise ValueError(f"{source}: none of {tried} {family} lines is good; use --on-error stop to see what is wrong")
    digest, types = 0, Counter()
    for part in good:
        digest = chain(digest, part.digest, part.rows)
        types += part.types
    files: dict[Path, dict[str, Any]] = {}
    for part in mine:
        entry = files.setdefault(part.job.source, {"file": part.job.source.name, "rows": 0, "quarantined": 0})
        entry["rows"] += part.rows
        entry["quarantined"] += part.quarantined
    shards = [
        {"file": part.job.file, "rows": part.rows, "digest": part.digest, "batch_rows": part.batch_rows,
         "byte_ends": part.byte_ends, "xxh3": part.xxh3}
        for part in good
    ]  # fmt: skip
    return {
        "rows": sum(part.rows for part in good),
        "types": {kind: types[kind] for kind in tsv.TYPES if types[kind]},
        "quarantined": sum(part.quarantined for part in mine),
        "digest": digest,
        "sources": list(files.values()),
        "shards": shards,
    }


def _merge_quarantine(folder: Path, built: Sequence[Built]) -> None:
    """One file of bad lines per source, as they came, and one log of what is wrong with each."""
    names: dict[Path, str] = {}
    for part in built:
        if not part.quarantined:
            continue
        source = part.job.source
        if source not in names:
            stem = source.name.removesuffix(".tsv")
            names[source] = stem if stem not in names.values() else f"{stem}-{len(names)}"
        (folder / QUARANTINE).mkdir(exist_ok=True)
        for suffix in (".tsv", ".log"):
            path = (folder / part.job.file).with_suffix(suffix)
            with (folder / QUARANTINE / f"{names[source]}{suffix}").open("ab") as target, path.open("rb") as lines:
                shutil.copyfileobj(lines, target)
            path.unlink()


def _negatives(folder: Path, given: Path | None, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Checksum of each file of negatives that was written."""
    if given is not None:
        return write_negatives(given, folder)
    if "vision_language" in manifest["families"]:
        return derive_negatives(folder, manifest)
    return {}

"""Building shards: each job turns some lines of one TSV file into one Arrow file; the manifest is written last.

What is written depends on the sources and on rows_per_shard, not on the number of workers. Everything happens in a
directory beside the target, which takes its place when all is well and is removed when not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ofa_ds.data import answer_list, task_rows, tsv
from ofa_ds.data.batch_index import write_index
from ofa_ds.data.doubts import doubts, task_doubts, without_negative_answer, without_negative_caption
from ofa_ds.data.manifest import Family, Manifest, Source, fingerprint
from ofa_ds.data.negative_files import derive_negatives, read_negatives, write_negatives
from ofa_ds.data.pool import run_jobs, serve_if_worker
from ofa_ds.data.shard_writer import ShardWriter, Written, chain
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import new_directory, sync_tree
from ofa_ds.terms import FAMILIES

BAD_LINES, BAD_REASONS, DOUBTS = ".tsv", ".log", ".warn"
_PLACES = {BAD_LINES: "quarantine/{}.tsv", BAD_REASONS: "quarantine/{}.log", DOUBTS: "warnings/{}.log"}
"""Where the notes of a source end up."""


@dataclass(frozen=True)
class Job:
    """Lines `span` of `source` -> Arrow file `file` in `folder`."""

    folder: Path
    file: str
    family: str
    source: Path
    span: tsv.Span
    on_error: str
    strict: bool
    lines: task_rows.TaskLines | None = None
    """Of a downstream task."""
    answers: str = ""
    """Checksum of the list of answers in `folder`, where there is one."""

    def listed(self) -> frozenset[str]:
        """The answers that rows may have; empty where there is no list."""
        return answer_list.listed(self.folder, self.answers)

    def notes(self, suffix: str) -> Path:
        """File for lines about its lines, until `_gather` puts those of a source together."""
        return (self.folder / self.file).with_suffix(suffix)


@dataclass
class Built:
    """What a job did."""

    job: Job
    written: Written | None = None
    """None where no line was good."""
    types: Counter[str] = field(default_factory=Counter)
    first_lines: dict[str, int] = field(default_factory=dict)
    """Vision-language rows: type -> first line of it."""
    sides: dict[int, int] = field(default_factory=dict)
    """Image family: side of the picture -> first line that has it."""
    quarantined: int = 0
    warnings: int = 0
    unanswered: int = 0
    unlisted: int = 0

    @property
    def rows(self) -> int:
        return self.written.shard.rows if self.written else 0

    def count(self, row: Mapping[str, Any], line: int) -> None:
        if self.job.family == "vision_language":
            self.types[row["type"]] += 1
            self.first_lines.setdefault(row["type"], line)
        elif self.job.family == "downstream":
            self.types[row["type"]] += 1
            self.unanswered += not task_rows.is_answered(row)
            if self.job.answers and row["answers"]:
                self.unlisted += answer_list.best_answer(row["answers"]) not in self.job.listed()
        elif self.job.family == "image":
            self.sides.setdefault(tsv.PIXELS_PER_CODE * 2 * round(len(row["codes"]) ** 0.5), line)


def build_shards(
    out: Path | str,
    *,
    negatives: Path | str | None = None,
    rows_per_shard: int = 50_000,
    workers: int = 2,
    on_error: str = "stop",
    strict: bool = False,
    lines: task_rows.TaskLines | None = None,
    answers: Sequence[str] = (),
    **sources: Sequence[Path | str],
) -> Manifest:
    """Turn OFA's TSV files into shards in `out`, which must not exist yet (or be empty).

    sources: vision_language, text, image, detection = files; any of them, read in the order given; or downstream =
    files of one task, whose lines read as `lines` says, with the list of `answers` that the task may give.
    negatives: OFA's negative_sample directory; without it one is derived from the vision-language rows. on_error:
    what a bad line does: "stop" raises ValueError "file:line: column: reason" and leaves nothing behind,
    "quarantine" puts it into out/quarantine and counts it. Well-formed lines that look like a mistake (`doubts`)
    are listed in out/warnings and counted; strict makes them bad lines. The same sources and rows_per_shard give
    the same bytes with any number of workers. Under MPI, rank 0 gives the work to the other ranks, which leave the
    program when it is done.
    """
    serve_if_worker()
    out, paths = Path(out), {family: [Path(file) for file in files] for family, files in sources.items()}
    _refuse(out, paths, on_error, lines)
    with new_directory(out) as folder:
        answers_sum = answer_list.write_answer_list(folder / answer_list.FILE, answers) if answers else ""
        jobs = _plan(folder, paths, rows_per_shard, on_error=on_error, strict=strict)
        if lines:
            jobs = [dataclasses.replace(job, lines=lines, answers=answers_sum) for job in jobs]
        built = _run(jobs, workers)
        _one_side(built)
        sums = _negatives(folder, Path(negatives) if negatives else None, built)
        _doubt_negatives(folder, built, strict)
        _gather(folder, built)
        families = {family: _family(family, built) for family in FAMILIES if paths.get(family)}
        for family in families:
            mine = (part.written for part in built if part.job.family == family)
            write_index(folder, family, [written.entries for written in mine if written])
        name = fingerprint(families, sums, answers_sum)
        manifest = Manifest(families=families, negatives=sums, fingerprint=name, answers=answers_sum)
        manifest.write(folder)
        sync_tree(folder)
    return manifest


def _refuse(out: Path, sources: Mapping[str, Sequence[Path]], on_error: str, lines: object) -> None:
    if on_error not in ("stop", "quarantine"):
        raise ValueError(f"want on_error stop or quarantine, got {on_error!r}")
    unknown = set(sources) - set(FAMILIES)
    if unknown or not any(sources.values()):
        raise ValueError(f"want TSV files of {', '.join(FAMILIES)}; got {', '.join(sorted(unknown)) or 'none'}")
    if ("downstream" in sources) != (lines is not None) or (lines is not None and len(sources) > 1):
        raise ValueError("downstream files come alone, with what their lines are (lines)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; give another --out or remove it")


def _plan(
    folder: Path, sources: Mapping[str, Sequence[Path]], rows_per_shard: int, *, on_error: str, strict: bool
) -> list[Job]:
    jobs = []
    for family in FAMILIES:
        number = 0
        for source in sources.get(family, ()):
            if not source.is_file():
                raise ValueError(f"{source}: no such file")
            for span in tsv.spans(source, rows_per_shard):
                jobs.append(Job(folder, f"{family}-{number:05d}.arrow", family, source, span, on_error, strict))
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
    writer = ShardWriter(job.folder / job.file, job.family)
    with contextlib.ExitStack() as stack:
        notes: dict[str, BinaryIO] = {}

        def note(suffix: str, text: bytes) -> None:
            if suffix not in notes:  # most jobs need none
                notes[suffix] = stack.enter_context(job.notes(suffix).open("wb"))
            notes[suffix].write(text + b"\n")

        for number, line in tsv.lines(job.source, job.span):
            try:
                row, found = _read(job, line, number)
                if found and job.strict:
                    raise ValueError(f"{found[0]} (--strict)")
            except ValueError as error:
                message = f"{job.source}:{number}: {error}"
                if job.on_error == "stop":
                    raise ValueError(message) from error
                note(BAD_LINES, line)
                note(BAD_REASONS, encoded(message))
                built.quarantined += 1
                continue
            for doubt in found:
                note(DOUBTS, encoded(f"{job.source}:{number}: {doubt}"))
            built.warnings += len(found)
            writer.add(row, len(line))
            built.count(row, number)
    built.written = writer.close()
    return built


def _read(job: Job, line: bytes, number: int) -> tuple[dict[str, Any], list[str]]:
    """The row of a line, and what looks wrong in it. Raises ValueError "column: reason"."""
    if job.lines is None:
        row = tsv.parse(job.family, line)
        return row, doubts(job.family, line, row)
    row = task_rows.parse(job.lines, line, number, job.listed())
    return row, task_doubts(job.lines, line, row)


def encoded(message: str) -> bytes:
    return message.encode("utf-8", "backslashreplace")


def _one_side(built: Sequence[Built]) -> None:
    """Raises ValueError where pictures of the image family differ in size: their codes would not line up."""
    first: dict[int, str] = {}
    for part in built:
        for side, line in part.sides.items():
            first.setdefault(side, f"{part.job.source}:{line}: {side} x {side}")
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise ValueError(f"{other}: image: want all pictures of one size, but {one}")


def _negatives(folder: Path, given: Path | None, built: Sequence[Built]) -> dict[str, str]:
    """Checksum of each file of negatives that was written."""
    if given is not None:
        return write_negatives(given, folder)
    written = [part.written for part in built if part.job.family == "vision_language" and part.written]
    files = (each.reading(folder, "vision_language") for each in written)
    return derive_negatives(files, folder) if written else {}


def _doubt_negatives(folder: Path, built: Sequence[Built], strict: bool) -> None:
    """Warn, at the first row that needs one, where no wrong caption or answer can be made. Raises it where strict."""
    found = read_negatives(folder)
    for kind, doubt in (
        ("caption", without_negative_caption(found.captions)),
        ("qa", without_negative_answer(found.type2ans)),
    ):
        part = next((part for part in built if kind in part.first_lines), None)
        if doubt is None or part is None:
            continue
        message = f"{part.job.source}:{part.first_lines[kind]}: {doubt}"
        if strict:
            raise ValueError(f"{message} (--strict)")
        with part.job.notes(DOUBTS).open("ab") as file:
            file.write(encoded(f"{message}\n"))
        part.warnings += 1


def _gather(folder: Path, built: Sequence[Built]) -> None:
    """Notes of all jobs into one file per source: bad lines as they came, what is wrong with each, doubts."""
    names: dict[Path, str] = {}
    for source in (part.job.source for part in built):
        if source not in names:
            stem = source.name.removesuffix(".tsv")
            names[source] = stem if stem not in names.values() else f"{stem}-{len(names)}"
    for part in built:
        for suffix, place in _PLACES.items():
            path = part.job.notes(suffix)
            if not path.exists():
                continue
            target = folder / place.format(names[part.job.source])
            target.parent.mkdir(exist_ok=True)
            with target.open("ab") as file, path.open("rb") as lines:
                shutil.copyfileobj(lines, file)
            path.unlink()


def _family(family: str, built: Sequence[Built]) -> Family:
    mine = [part for part in built if part.job.family == family]
    good = [part.written.shard for part in mine if part.written]
    if not good:
        source = mine[0].job.source
        tried = sum(part.job.span.num_lines for part in mine)
        raise ValueError(f"{source}: none of {tried} {family} lines is good; use --on-error stop to see what is wrong")
    digest, types = 0, Counter[str]()
    for shard in good:
        digest = chain(digest, shard.digest, shard.rows)
    counts: dict[Path, list[int]] = {}
    for part in mine:
        types += part.types
        before = counts.get(part.job.source, [0, 0, 0])
        new = (part.rows, part.quarantined, part.warnings)
        counts[part.job.source] = [a + b for a, b in zip(before, new, strict=True)]
    return Family(
        rows=sum(shard.rows for shard in good),
        types={kind: types[kind] for kind in (*tsv.TYPES, *types) if types[kind]},
        quarantined=sum(part.quarantined for part in mine),
        warnings=sum(part.warnings for part in mine),
        unanswered=sum(part.unanswered for part in mine),
        unlisted=sum(part.unlisted for part in mine),
        digest=digest,
        own_ids=None if mine[0].job.lines is None else "id" in mine[0].job.lines.columns,
        sources=tuple(Source(file.name, *numbers) for file, numbers in counts.items()),
        shards=tuple(good),
    )

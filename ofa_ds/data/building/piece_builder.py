"""One piece of the sources -> Arrow files and notes in a work directory, and what is to be said of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from ofa_ds.data import answer_list, task_rows, tsv
from ofa_ds.data.batch_index import entry_type
from ofa_ds.data.building.source import Piece, Record, Row, SourceError
from ofa_ds.data.building.work import JOURNAL
from ofa_ds.data.manifest import Shard
from ofa_ds.data.negative_texts import NegativeTexts
from ofa_ds.data.shard_writer import ShardWriter, Written, row_bytes
from ofa_ds.storage import file_systems
from ofa_ds.storage.atomic import replace_file, sync

BAD_LINES, BAD_REASONS, DOUBTS, TEXTS, ENTRIES = ".tsv", ".log", ".warn", ".texts", ".index"
"""Ends of the names of notes: bad lines as they came, what is wrong with each, doubts; texts for the negatives; entries
of the index, too many to be held for all pieces."""

JOURNAL_VERSION = 2

MAX_REASONS = 10_000
"""Bad records of a part that are told one by one: a table of a few kilobytes may have any number of empty rows."""


@dataclass(frozen=True)
class Rules:
    """What a build does with every record."""

    on_error: str
    strict: bool
    rows_per_shard: int
    shard_bytes: int
    texts: bool = False
    """Keep the texts that wrong captions and answers are drawn from."""

    def key(self) -> Any:
        """Of what was built; `on_error` does not change what a piece without bad lines becomes."""
        return [self.strict, self.rows_per_shard, self.shard_bytes, self.texts]


@dataclass(frozen=True)
class Job:
    """Piece `number` of a family, in order over all its sources."""

    work: Path
    number: int
    family: str
    piece: Piece
    rules: Rules
    listed: tuple[Path, str] | None = None
    """Directory and checksum of a downstream task's list of answers."""
    upload: str = ""
    """Where Arrow files go when they are done; empty where the work directory becomes the target."""

    @property
    def stem(self) -> str:
        return f"{self.family}-{self.number:05d}"

    def key(self) -> str:
        content = [JOURNAL_VERSION, self.stem, self.piece.key(), self.rules.key(), self.upload]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    def note(self, part: int, suffix: str) -> Path:
        return self.work / JOURNAL / f"{self.stem}.{part}{suffix}"

    @property
    def record(self) -> Path:
        """Says that the piece is done, and how it went."""
        return self.work / JOURNAL / f"{self.stem}.done"


class At(NamedTuple):
    """A record: part of the piece, number within it."""

    part: int
    number: int


@dataclass
class PartCounts:
    records: int = 0
    rows: int = 0
    quarantined: int = 0
    warnings: int = 0


@dataclass
class Built:
    """What became of a piece. JSON-able as a whole (`to_json`)."""

    parts: list[PartCounts]
    shards: list[Shard] = field(default_factory=list)
    types: Counter[str] = field(default_factory=Counter)
    first: dict[str, At] = field(default_factory=dict)
    """Vision-language rows: type -> first record of it."""
    sides: dict[int, At] = field(default_factory=dict)
    """Image family: side of the picture -> first record that has it."""
    unanswered: int = 0
    unlisted: int = 0

    def count(self, job: Job, row: dict[str, Any], at: At) -> None:
        if "type" in row:
            self.types[row["type"]] += 1
        if job.family == "vision_language":
            self.first.setdefault(row["type"], at)
        elif job.family == "image":
            self.sides.setdefault(tsv.PIXELS_PER_CODE * 2 * round(len(row["codes"]) ** 0.5), at)
        elif job.family == "downstream":
            self.unanswered += not task_rows.is_answered(row)
            if job.listed and row["answers"]:
                self.unlisted += answer_list.best_answer(row["answers"]) not in answer_list.listed(*job.listed)

    def to_json(self) -> dict[str, Any]:
        plain = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        parts = [dataclasses.asdict(part) for part in self.parts]
        return plain | {"parts": parts, "shards": [dataclasses.asdict(each) for each in self.shards]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Built:
        return cls(
            parts=[PartCounts(**each) for each in found["parts"]],
            shards=[Shard(**each) for each in found["shards"]],
            types=Counter(found["types"]),
            first={kind: At(*at) for kind, at in found["first"].items()},
            sides={int(side): At(*at) for side, at in found["sides"].items()},
            unanswered=found["unanswered"],
            unlisted=found["unlisted"],
        )


class BadRecord(Exception):
    """A bad record under on_error stop, or a source that is wrong as a whole. Travels between processes."""

    def __init__(self, part: int, number: int | None, reason: str, place: str = "") -> None:
        super().__init__(part, number, reason, place)
        self.part, self.number, self.reason, self.place = part, number, reason, place


def build_piece(job: Job) -> Built:
    """Runs in a worker. Raises BadRecord; OSError where the machine fails. What is done is recorded, and not redone."""
    built = Built(parts=[PartCounts() for _ in job.piece.files])
    texts = NegativeTexts() if job.rules.texts else None
    writer = _Writer(job)
    for part in range(len(built.parts)):
        _build_part(job, part, built, writer, texts)
    written = writer.close()
    built.shards = [each.shard for each in written]
    with job.note(0, ENTRIES).open("wb") as file:
        file.writelines(each.entries.tobytes() for each in written)
    if texts is not None:
        texts.write(job.note(0, TEXTS))
    for path in (job.work / JOURNAL).glob(f"{job.stem}.*"):  # notes; Arrow files are durable already
        sync(path)
    replace_file(job.record, json.dumps({"key": job.key(), "built": built.to_json()}) + "\n")
    return built


def _build_part(job: Job, part: int, built: Built, writer: _Writer, texts: NegativeTexts | None) -> None:
    counts = built.parts[part]
    with contextlib.ExitStack() as stack:
        notes = _Notes(job, part, stack)
        try:
            for record in job.piece.records(part):
                counts.records += 1
                checked = _checked(job, part, record, notes, counts)
                if checked is None:
                    continue
                for doubt in checked.doubts:
                    notes.say(DOUBTS, record, doubt)
                counts.warnings += len(checked.doubts)
                counts.rows += 1
                writer.add(checked.row, record.num_bytes or row_bytes(checked.row))
                built.count(job, checked.row, At(part, record.number))
                if texts is not None:
                    texts.add(checked.row)
            if (left := counts.quarantined - MAX_REASONS) > 0:
                notes.say(BAD_REASONS, record, f"up to here {left} more bad records, which are not told one by one")
        except SourceError as error:
            raise BadRecord(part, error.number, str(error)) from error


def _checked(job: Job, part: int, record: Record, notes: _Notes, counts: PartCounts) -> Row | None:
    """None for a bad record that goes to the quarantine."""
    try:
        checked = record.read()
        if checked.doubts and job.rules.strict:
            raise ValueError(f"{checked.doubts[0]} (--strict)")
        return checked
    except ValueError as error:
        if job.rules.on_error == "stop" or isinstance(error, SourceError):
            raise BadRecord(part, record.number, str(error), record.place) from error
        if record.raw is not None:
            notes.add(BAD_LINES, record.raw)
        if counts.quarantined < MAX_REASONS:
            notes.say(BAD_REASONS, record, str(error))
        counts.quarantined += 1
        return None


class _Notes:
    """Files of notes of one part. Their messages begin with the record's number within the part, and its place."""

    def __init__(self, job: Job, part: int, stack: contextlib.ExitStack) -> None:
        self._job, self._part, self._stack = job, part, stack
        self._files: dict[str, BinaryIO] = {}

    def add(self, suffix: str, line: bytes) -> None:
        if suffix not in self._files:  # most parts need none
            self._files[suffix] = self._stack.enter_context(self._job.note(self._part, suffix).open("wb"))
        self._files[suffix].write(line + b"\n")

    def say(self, suffix: str, record: Record, message: str) -> None:
        self.add(suffix, encoded(json.dumps([record.number, record.place, message], ensure_ascii=False)))


class _Writer:
    """Arrow files of a piece, the next begun where one is full."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._writer: ShardWriter | None = None
        self._done: list[Written] = []
        self._rows = self._bytes = self._number = 0

    def add(self, row: dict[str, Any], num_bytes: int) -> None:
        full = self._rows == self._job.rules.rows_per_shard
        if self._writer is not None and (full or self._bytes + num_bytes > self._job.rules.shard_bytes):
            self._end()
        if self._writer is None:
            number = f"-{self._number:03d}" if self._number else ""
            self._path = self._job.work / f"{self._job.stem}{number}.arrow"
            self._writer = ShardWriter(self._path, self._job.family)
        self._writer.add(row, num_bytes)
        self._rows += 1
        self._bytes += num_bytes

    def close(self) -> list[Written]:
        if self._writer is not None:
            self._end()
        return self._done

    def _end(self) -> None:
        written = self._writer.close() if self._writer is not None else None
        if written is not None:
            sync(self._path)
            self._done.append(written)
            if self._job.upload:
                file_systems.upload(self._path, f"{self._job.upload}/{self._path.name}")
                self._path.unlink()
        self._writer = None
        self._rows = self._bytes = 0
        self._number += 1


def done_before(job: Job) -> Built | None:
    """What an earlier build of the same piece left, if it ended; None where anything about it has changed."""
    try:
        found = json.loads(job.record.read_text(encoding="utf-8"))
        if found["key"] != job.key():
            return None
        built = Built.from_json(found["built"])
        for _ in entries_of(job, built):
            pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none there, or one of another version
    if job.rules.on_error == "stop" and any(part.quarantined for part in built.parts):
        return None  # it stops at that line now
    files = [job.work / shard.file for shard in built.shards] if not job.upload else []
    whole = all(
        path.is_file() and path.stat().st_size == shard.num_bytes
        for path, shard in zip(files, built.shards, strict=False)
    )
    return built if whole else None


def entries_of(job: Job, built: Built) -> Iterator[np.ndarray]:
    """Those of the index, of each shard. Raises ValueError where they are not those that were written, OSError."""
    kind = entry_type(job.family)
    with job.note(0, ENTRIES).open("rb") as file:
        for shard in built.shards:
            data = file.read(shard.batches * kind.itemsize)
            if xxhash.xxh3_64_hexdigest(data) != shard.index_xxh3:
                raise ValueError(
                    f"{file.name}: the entries of the index are not those that were written; build it again"
                )
            yield np.frombuffer(data, kind)


def encoded(message: str) -> bytes:
    return message.encode("utf-8", "backslashreplace")

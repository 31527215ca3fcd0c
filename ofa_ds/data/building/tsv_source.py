"""TSV files, plain or compressed, here or remote, as pieces of lines. Nothing is read before a piece is."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ofa_ds.data import answer_list, task_rows, tsv
from ofa_ds.data.building.source import Record, Row, SourceError, SourceFile, source_file
from ofa_ds.data.doubts import doubts, task_doubts
from ofa_ds.storage import file_systems

CODECS = {".gz": "gzip", ".zst": "zstd"}
"""By the end of a file's name."""

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """The lines of a file whose first byte is at `start` ... `stop` - 1; of a compressed file all of them."""

    file: SourceFile
    start: int
    stop: int
    first_line: int | None = None
    """From 1; None where the lines before were not counted."""


@dataclass(frozen=True)
class TsvPiece:
    """Parts of files of one family, or of a downstream task's."""

    family: str
    parts: tuple[Part, ...]
    lines: task_rows.TaskLines | None = None
    answers: tuple[str, str] = ("", "")
    """(directory, checksum) of the list of answers of a downstream task."""

    @property
    def files(self) -> Sequence[SourceFile]:
        return [part.file for part in self.parts]

    @property
    def num_bytes(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    def key(self) -> Any:
        parts = [dataclasses.astuple(part) for part in self.parts]
        lines = None if self.lines is None else repr(dataclasses.asdict(self.lines))
        return [self.family, parts, lines, self.answers[1]]

    def records(self, part: int) -> Iterator[Record]:
        where = self.parts[part]
        for number, line in lines_of(where):
            absolute = number if where.first_line is None else number + where.first_line - 1
            yield Record(number, line, functools.partial(self._read, line, absolute), num_bytes=len(line))

    def _read(self, line: bytes, number: int) -> Row:
        if self.lines is None:
            row = tsv.parse(self.family, line)
            return Row(row, doubts(self.family, line, row))
        row = task_rows.parse(self.lines, line, number, self._listed())
        return Row(row, task_doubts(self.lines, line, row))

    def _listed(self) -> frozenset[str]:
        folder, checksum = self.answers
        return answer_list.listed(Path(folder), checksum)


def is_compressed(file: SourceFile) -> bool:
    return codec_of(file.location) is not None


def codec_of(location: str) -> str | None:
    return next((codec for suffix, codec in CODECS.items() if location.endswith(suffix)), None)


def cut(locations: Sequence[str], piece_bytes: int) -> list[tuple[Part, ...]]:
    """Pieces of about `piece_bytes`: large plain files are cut, small files are put together, in the order given.

    Raises SourceError for a missing and for an empty file.
    """
    pieces: list[tuple[Part, ...]] = []
    small: list[Part] = []
    filled = 0

    def end() -> None:
        nonlocal filled
        if small:
            pieces.append(tuple(small))
        small.clear()
        filled = 0

    for location in locations:
        file = source_file(location)
        if not file.num_bytes:
            raise SourceError(f"{location}: the file is empty")
        if filled and filled + file.num_bytes > piece_bytes:
            end()
        if file.num_bytes <= piece_bytes or is_compressed(file):
            small.append(Part(file, 0, file.num_bytes))
            filled += file.num_bytes
            continue
        for start in range(0, file.num_bytes, piece_bytes):
            pieces.append((Part(file, start, min(start + piece_bytes, file.num_bytes)),))
    end()
    return pieces


def lines_of(part: Part) -> Iterator[tuple[int, bytes]]:
    """(number from 1 within the part, line without its end). Raises SourceError where the file is wrong as a whole."""
    location = part.file.location
    codec = codec_of(location)
    with _opened(location) as raw:
        if codec is None:
            yield from _of_range(part, raw)
            return
        number = 0
        try:
            with pa.CompressedInputStream(raw, codec) as stream, io.BufferedReader(stream, _BUFFER_BYTES) as file:
                for number, line in enumerate(_lines(file, part.file), 1):
                    yield number, line.removesuffix(b"\n")
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise
            place = f"after line {number}" if number else "at its start"
            what = " ".join(str(error).split())
            raise SourceError(f"{location}: damaged {place}, not whole {codec}: {what}; copy it again") from error
        if not number:
            raise SourceError(f"{location}: the file is empty")


def _opened(location: str) -> Any:
    if file_systems.is_remote(location):
        return file_systems.open_input(location)
    return pa.OSFile(location) if codec_of(location) else open(location, "rb", buffering=_BUFFER_BYTES)


def _of_range(part: Part, raw: Any) -> Iterator[tuple[int, bytes]]:
    file = io.BufferedReader(raw, _BUFFER_BYTES) if isinstance(raw, pa.NativeFile) else raw
    position = part.start
    if part.start:  # a line that began before belongs to the part before
        file.seek(part.start - 1)
        position = part.start - 1
        while block := file.readline(_BUFFER_BYTES):
            position += len(block)
            if block.endswith(b"\n"):
                break
    if position >= part.stop:
        return
    for number, line in enumerate(_lines(file, part.file, first=not part.start), 1):
        position += len(line)
        yield number, line.removesuffix(b"\n")
        if position >= part.stop:
            return


def _lines(file: Any, source: SourceFile, *, first: bool = True) -> Iterator[bytes]:
    """Raises SourceError at a line of over MAX_LINE_BYTES, and at CRLF in the first."""
    number = 0
    while line := file.readline(tsv.MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > tsv.MAX_LINE_BYTES:
            raise SourceError(f"the line is longer than {tsv.MAX_LINE_BYTES} bytes; leave it out", number)
        if first and number == 1 and line.endswith(b"\r\n"):
            way = f"convert it: sed -i 's/\\r$//' {source.location}"
            raise SourceError(f"{source.location}:1: line: ends in CRLF, want LF alone; {way}")
        yield line


def width_of(location: str) -> int:
    """Columns of a file's first line. Raises SourceError where there is no file, or nothing in it."""
    (part,) = cut([location], 1 << 62)[0]
    _, line = next(lines_of(part))
    return line.count(b"\t") + 1


def count_lines(part: Part) -> int:
    return sum(1 for _ in lines_of(part))

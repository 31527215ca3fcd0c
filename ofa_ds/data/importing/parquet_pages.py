"""What reading a Parquet row group takes, from the headers of its pages: a file of kilobytes may unpack to gigabytes.

The file's own directory says how large row groups are and nothing checks it; what a reader allocates stands before each
page, in Thrift's compact protocol (github.com/apache/parquet-format, parquet.thrift, PageHeader).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ofa_ds.data.building.source import SourceError

MAX_PAGES_BYTES = 1 << 29
"""Most of what is in memory at once, unpacked: the dictionary and the largest page of each column."""

MAX_LIST_VALUES = 1 << 24
"""Most values of a column of lists in a row group: one row may have all of them, and each takes memory."""

BATCH_BYTES = 1 << 27
"""Of the rows that are decoded at once, where one has no more."""

BATCH_ROWS = 64

MAX_DIRECTORY_BYTES = 1 << 26

_HEADER_BYTES, _MAX_HEADER_BYTES = 1 << 12, 1 << 20
_DICTIONARY, _INDEX = 2, 1
_HEADERS = {0: (5, 2), 3: (8, 4)}
"""Type of a page with data -> field of its own header in the page header, field of the encoding in that."""
_DELTA = {6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY"}
"""Encodings whose data say once more how many values they have; nothing checks that."""


class _Unread(ValueError):
    """A file that may be whole."""


@dataclass
class _Column:
    dictionary: int = 0
    page: int = 0
    """Bytes of the largest."""
    pages: int = 0
    values: int = 0


def batch_rows(file: pq.ParquetFile, source: pa.NativeFile, location: str, group: int, names: Sequence[str]) -> int:
    """How many rows of a row group, of these columns, may be decoded at once. Raises SourceError for one too large."""
    where = f"{location}: row group {group}"
    held, row = 0, 1
    try:
        chunks = _chunks(_directory(source))[group]
    except (LookupError, ValueError, OverflowError) as error:
        raise SourceError(f"{where}: damaged: {error}; copy it again") from error
    for number in leaves(file, names):
        schema = file.schema.column(number)
        try:
            found = _column(source, chunks[number])
        except _Unread as error:
            raise SourceError(f"{where}: column {schema.path}: {error}") from error
        except (LookupError, ValueError, OverflowError) as error:
            raise SourceError(f"{where}: column {schema.path}: damaged: {error}; copy it again") from error
        largest = max(found.dictionary, found.page)
        if schema.max_repetition_level:
            if found.values > MAX_LIST_VALUES:
                raise SourceError(
                    f"{where}: column {schema.path}: {found.values} values in lists, at most "
                    f"{MAX_LIST_VALUES} are read; write it again with smaller row groups"
                )
            largest = found.page = found.pages
        held += found.dictionary + found.page
        row += largest
    if held > MAX_PAGES_BYTES:
        raise SourceError(
            f"{where}: its pages take {held} bytes at once, at most {MAX_PAGES_BYTES} are read; write it again with "
            "smaller row groups"
        )
    return max(1, min(BATCH_ROWS, BATCH_BYTES // row))


class _Chunk(NamedTuple):
    """A column of a row group: bytes start ... stop - 1 of the file."""

    start: int
    stop: int


def _directory(source: pa.NativeFile) -> bytes:
    """Raises ValueError. pyarrow's own objects for columns abort the process where their statistics are damaged."""
    size = source.size()
    source.seek(max(0, size - 8))
    end = source.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or not 0 < length <= min(size - 8, MAX_DIRECTORY_BYTES):
        raise ValueError(f"a directory of {length} bytes, at most {MAX_DIRECTORY_BYTES} are read")
    source.seek(size - 8 - length)
    return source.read(length)


@functools.lru_cache(1)
def _chunks(directory: bytes) -> list[list[_Chunk]]:
    """Of each row group, in the order of the schema. Raises ValueError."""
    try:
        groups = _Compact(directory).struct()[4]
        return [[_chunk(each[3]) for each in group[1]] for group in groups]
    except (LookupError, TypeError) as error:
        raise ValueError(f"a damaged directory ({error!r:.60})") from error


def _chunk(found: dict[int, Any]) -> _Chunk:
    size, data, dictionary = found[7], found[9], found.get(11, 0)
    start = dictionary if 0 < dictionary < data else data
    return _Chunk(start, start + size)


def leaves(file: pq.ParquetFile, names: Sequence[str]) -> Iterator[int]:
    """Numbers of the columns that are, or are in, one of `names`."""
    for number in range(file.metadata.num_columns):
        path = file.schema.column(number).path
        if any(path == name or path.startswith(f"{name}.") for name in names):
            yield number


def _column(source: pa.NativeFile, chunk: _Chunk) -> _Column:
    found = _Column()
    at, end = chunk
    if not 0 <= at <= end <= source.size():
        raise ValueError(f"its pages at {at} ... {end} are outside of the file of {source.size()} bytes")
    while at < end:
        header, size = _header(source, at, end)
        kind, unpacked, packed = (_number(header, field, at) for field in (1, 2, 3))
        at += size + packed
        if kind == _DICTIONARY:
            found.dictionary = max(found.dictionary, unpacked)
        elif kind in _HEADERS:
            found.page = max(found.page, unpacked)
            found.pages += unpacked
            mine, encoding = _HEADERS[kind]
            found.values += _number(header.get(mine), 1, at)
            if (encoding := _number(header[mine], encoding, at)) in _DELTA:
                raise _Unread(f"the encoding {_DELTA[encoding]} is not read; write it again with PLAIN or a dictionary")
        elif kind != _INDEX:
            raise ValueError(f"a page of type {kind} before byte {at}")
    if at != end:
        raise ValueError(f"its last page ends at byte {at}, the column at {end}")
    return found


def _number(header: Any, field: int, at: int) -> int:
    value = header.get(field) if isinstance(header, dict) else None
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(f"a page header before byte {at} has {value!r:.40} for field {field}")
    return value


def _header(source: pa.NativeFile, at: int, end: int) -> tuple[dict[int, Any], int]:
    """(fields, bytes) of the page header at `at`. It has statistics, and values in them, of any size."""
    size = _HEADER_BYTES
    while True:
        source.seek(at)
        data = source.read(min(size, end - at))
        try:
            reader = _Compact(data)
            return reader.struct(), reader.at
        except IndexError:
            if size >= min(_MAX_HEADER_BYTES, end - at):
                raise ValueError(f"a page header at byte {at} does not end") from None
            size *= 16


class _Compact:
    """Thrift's compact protocol. Raises IndexError where the data end, ValueError for what a header has not."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def unsigned(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than nine bytes")

    def signed(self) -> int:
        value = self.unsigned()
        return value >> 1 ^ -(value & 1)

    def skip(self, num_bytes: int) -> None:
        if num_bytes > len(self.data) - self.at:
            raise IndexError
        self.at += num_bytes

    def struct(self, depth: int = 0) -> dict[int, Any]:
        found: dict[int, Any] = {}
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.signed()
            if field in found:
                raise ValueError(f"a header with field {field} twice")
            found[field] = self.value(head & 15, depth)
        return found

    def value(self, kind: int, depth: int) -> Any:
        if depth > 12:
            raise ValueError("a header that is nested too deeply")
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.signed()
        if kind == 7:
            return self.skip(8)
        if kind == 8:
            return self.skip(self.unsigned())
        if kind in (9, 10):
            head = self.byte()
            size = self.unsigned() if head >> 4 == 15 else head >> 4
            if size > len(self.data) - self.at:  # each takes a byte or more
                raise IndexError
            inner = 3 if head & 15 in (1, 2) else head & 15
            return [self.value(inner, depth + 1) for _ in range(size)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"a header with a value of type {kind}")

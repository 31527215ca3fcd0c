"""Rows of one Arrow file, read column by column from where the library says that the buffers are.

Why not by the library's own row access: see `python -m ofa_ds.bench data` and its figures in `ofa_ds/docs/reading.md`.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ofa_ds.data.columns import BOX, SCHEMAS, from_columns, list_of
from ofa_ds.data.manifest import MANIFEST, Shard
from ofa_ds.data.open_file import OpenFile, opener

_MAGIC_BYTES = 8
"""What an Arrow file begins with, before its first message (the schema)."""

_HEAD = struct.Struct("<ii")
"""Of a message: a mark, and the size of its metadata."""

_HASHED_AT_ONCE = 1 << 20


class ShardFile:
    """Rows of one Arrow file. Kept are 8 bytes for each buffer of each batch touched, and no Arrow object."""

    def __init__(
        self, folder: Path, family: str, shard: Shard, open_file: Callable[[Path, int, str], OpenFile] | None = None
    ) -> None:
        """open_file: of `opener`, shared by all files of a directory."""
        self.path = folder / shard.file
        self.family = family
        self.num_rows = shard.rows
        self.batch_ends = array("q", accumulate(shard.batch_rows))
        self.byte_ends, self.checksums = shard.byte_ends, shard.xxh3
        self._opener = open_file or opener()

    def _open(self) -> OpenFile:
        """Raises OSError, and RuntimeError where its size is not the manifest's."""
        return self._opener(self.path, self.byte_ends[-1], MANIFEST)

    @cached_property
    def _positions(self) -> np.ndarray:
        """int64 [batches, buffers]: place of each buffer in the file; 0 in the first column means not yet asked for."""
        columns = SCHEMAS[self.family]
        return np.zeros((len(self.batch_ends), sum(len(_KEPT[kind]) for kind in columns.types)), np.int64)

    @cached_property
    def _columns(self) -> list[tuple[str, Any, slice]]:
        """(name, reader, its positions) of each column."""
        columns, first = [], 0
        for field in SCHEMAS[self.family]:
            last = first + len(_KEPT[field.type])
            columns.append((field.name, _READERS[field.type], slice(first, last)))
            first = last
        return columns

    def row(self, i: int, verify: bool) -> dict[str, Any]:
        """Raises RuntimeError that names the file where it is damaged, cut, or not the manifest's; OSError."""
        return from_columns(self.family, self._read(i, self._columns, verify))

    def fields(self, i: int, names: Collection[str]) -> dict[str, Any]:
        """Some columns of row `i`, as they are stored. Raises as `row` does, KeyError for a column that is not here."""
        columns = {column[0]: column for column in self._columns}
        return self._read(i, [columns[name] for name in names], verify=False)

    def _read(self, i: int, columns: Sequence[tuple[str, Any, slice]], verify: bool) -> dict[str, Any]:
        batch = bisect_right(self.batch_ends, i)
        positions = self._positions[batch].tolist()
        if not positions[0]:
            positions = self._touch(batch, verify)
        j = i - (self.batch_ends[batch - 1] if batch else 0)
        file = self._open()
        try:
            return {name: read(file, positions[at], j) for name, read, at in columns}
        except UnicodeDecodeError as error:
            raise RuntimeError(f"{self.path}: row {i}: damaged: its text is not UTF-8; build it again") from error

    def rows_of_types(self, types: Collection[str], start: int) -> Iterator[int]:
        """Numbers of the rows from `start` on whose type column has one of these. Raises as `row` does."""
        wanted = {kind.encode() for kind in types}
        at = next(at for name, _, at in self._columns if name == "type")
        for batch in range(bisect_right(self.batch_ends, start), len(self.batch_ends)):
            positions = self._positions[batch].tolist()
            if not positions[0]:
                positions = self._touch(batch, verify=False)
            ends, text = positions[at]
            first, file = self.batch_ends[batch - 1] if batch else 0, self._open()
            num_rows = self.batch_ends[batch] - first
            ends = np.frombuffer(file.read(ends, 4 * (num_rows + 1)), np.int32).tolist()
            text = bytes(file.read(text + ends[0], ends[-1] - ends[0]))
            for i in range(max(start - first, 0), num_rows):
                if text[ends[i] - ends[0] : ends[i + 1] - ends[0]] in wanted:
                    yield first + i

    def _touch(self, batch: int, verify: bool) -> list[int]:
        """Find where the buffers of a batch are. Nothing in here is shared by threads."""
        if verify and (problem := self.checksum_problem(batch)):
            raise RuntimeError(f"{problem}; copy or build the shards again")
        try:
            positions = self._buffer_positions(batch)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):  # of the machine: the library's own OSErrors, for damage, have none
                raise
            raise RuntimeError(f"{self.path}: record batch {batch} cannot be read ({error}); build it again") from error
        if any(position % 8 for position in positions):
            raise RuntimeError(f"{self.path}: its buffers are not aligned; build it again")
        self._positions[batch] = positions
        return positions

    def _buffer_positions(self, batch: int) -> list[int]:
        """From the batch's metadata alone: the library sees its content as memory that is never filled, nor read."""
        file, schema = self._open(), SCHEMAS[self.family]
        start = self.byte_ends[batch - 1] if batch else _MAGIC_BYTES + self._check_schema(file)
        message = np.empty(self.byte_ends[batch] - start, np.uint8)
        metadata = file.read(start, _message_head(file, start))
        message[: len(metadata)] = np.frombuffer(metadata, np.uint8)
        buffer = pa.py_buffer(message)
        record = pa.ipc.read_record_batch(pa.ipc.read_message(pa.BufferReader(buffer)), schema)
        if record.num_rows != self.batch_ends[batch] - (self.batch_ends[batch - 1] if batch else 0):
            raise pa.ArrowInvalid(f"it has {record.num_rows} rows, {MANIFEST} says otherwise")
        positions: list[int] = []
        for column in record.columns:
            buffers = column.buffers()
            kept = [buffers[k] for k in _KEPT[column.type]]
            positions += [part.address - buffer.address + start if part and part.size else 0 for part in kept]
        return positions

    def _check_schema(self, file: OpenFile) -> int:
        """Bytes of the schema's message. Raises RuntimeError where it is not this version's."""
        size = _message_head(file, _MAGIC_BYTES)
        found = pa.ipc.read_schema(pa.py_buffer(file.read(_MAGIC_BYTES, size)))
        if not found.equals(SCHEMAS[self.family]):
            raise RuntimeError(f"{self.path}: its columns are not those of this version of ofa-ds; build it again")
        return size

    def checksum_problem(self, batch: int) -> str | None:
        """What is wrong with the bytes of a batch, the header with the first; one past the last is the footer."""
        file, digest = self._open(), xxhash.xxh3_64()
        start, stop = self.byte_ends[batch - 1] if batch else 0, self.byte_ends[batch]
        for place in range(start, stop, _HASHED_AT_ONCE):
            digest.update(file.read(place, min(_HASHED_AT_ONCE, stop - place)))
        if (got := digest.hexdigest()) == self.checksums[batch]:
            return None
        what = "the footer"
        if batch < len(self.batch_ends):
            first = self.batch_ends[batch - 1] if batch else 0
            what = f"record batch {batch} (rows {first} ... {self.batch_ends[batch] - 1})"
        return f"{self.path}: {what} has checksum {got}, {MANIFEST} says {self.checksums[batch]}"


def _message_head(file: OpenFile, start: int) -> int:
    """Bytes of an Arrow message up to its content."""
    mark, size = _HEAD.unpack(file.read(start, _HEAD.size))
    if mark != -1:
        raise pa.ArrowInvalid(f"no Arrow message at byte {start}")
    return _HEAD.size + size


_At = Sequence[int]
"""Positions of a column's buffers."""

_PAIR = struct.Struct("<ii")
_INT = struct.Struct("<i")
_FOUR = struct.Struct("<4f")


def _range(file: OpenFile, at: int, j: int) -> tuple[int, int]:
    """First and one past the last item of row j, by a buffer of offsets."""
    return _PAIR.unpack(file.read(at + 4 * j, 8))


def _bytes(file: OpenFile, at: _At, j: int) -> bytes:
    start, stop = _range(file, at[0], j)
    return file.read(at[1] + start, stop - start)


def _str(file: OpenFile, at: _At, j: int) -> str:
    return _bytes(file, at, j).decode()


def _int(file: OpenFile, at: _At, j: int) -> int:
    return _INT.unpack(file.read(at[0] + 4 * j, 4))[0]


def _box(file: OpenFile, at: _At, j: int) -> tuple[float, ...]:
    return _FOUR.unpack(file.read(at[0] + 16 * j, 16))


def _strs(file: OpenFile, at: _At, j: int) -> list[str]:
    start, stop = _range(file, at[0], j)
    if start == stop:
        return []
    ends = array("i", file.read(at[1] + 4 * start, 4 * (stop - start + 1)))
    text = file.read(at[2] + ends[0], ends[-1] - ends[0])
    return [text[a - ends[0] : b - ends[0]].decode() for a, b in zip(ends, ends[1:], strict=False)]


def _items(dtype: type, width: int = 1) -> Callable[[OpenFile, _At, int], np.ndarray]:
    """Reader of a list of numbers, or of lists of `width` numbers."""
    size = np.dtype(dtype).itemsize * width

    def read(file: OpenFile, at: _At, j: int) -> np.ndarray:
        start, stop = _range(file, at[0], j)
        return np.frombuffer(file.read(at[1] + size * start, size * (stop - start)), dtype)

    return read


_floats, _shorts, _doubles = _items(np.float32, 4), _items(np.int16), _items(np.float64)


def _boxes(file: OpenFile, at: _At, j: int) -> np.ndarray:
    return _floats(file, at, j).reshape(-1, 4)


def _list(file: OpenFile, at: _At, j: int) -> list[float]:
    return _doubles(file, at, j).tolist()


_READERS = {
    pa.utf8(): _str, pa.binary(): _bytes, pa.int32(): _int, BOX: _box, list_of(BOX): _boxes,
    list_of(pa.utf8()): _strs, list_of(pa.int16()): _shorts, list_of(pa.float64()): _list,
}  # fmt: skip
"""How row j of a column is read, given the positions of its buffers."""

_KEPT = {
    pa.utf8(): (1, 2), pa.binary(): (1, 2), pa.int32(): (1,), BOX: (2,), list_of(BOX): (1, 4),
    list_of(pa.utf8()): (1, 3, 4), list_of(pa.int16()): (1, 3), list_of(pa.float64()): (1, 3),
}  # fmt: skip
"""Which of a column's buffers have content: the others are validity bitmaps, absent as nothing is nullable."""

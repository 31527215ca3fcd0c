"""Rows -> record batches -> one Arrow file, and what the manifest says of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ofa_ds.data.arrow_layout import buffer_places
from ofa_ds.data.batch_index import entry_type
from ofa_ds.data.columns import SCHEMAS, to_columns
from ofa_ds.data.manifest import Shard
from ofa_ds.data.open_file import OpenFile
from ofa_ds.data.shard_file import ShardFile

MAX_BATCH_ROWS = 256
MAX_BATCH_BYTES = 16 << 20

_PRIME = (1 << 61) - 1
_BASE = 0x1F3D5B79A2C4E68B % _PRIME


@dataclass(frozen=True)
class Written:
    """What is to be known of a finished file."""

    shard: Shard
    entries: np.ndarray
    """Of its record batches in the index: `batch_index.entry_type`."""

    def reading(self, folder: Path, family: str) -> ShardFile:
        """For what has no manifest yet."""
        return ShardFile(folder / self.shard.file, family, self.shard, lambda: memoryview(self.entries.tobytes()))


class ShardWriter:
    """`add` every row, then `close`. Holds one record batch in memory."""

    def __init__(self, path: Path, family: str) -> None:
        self._path, self._family = path, family
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pa.ipc.new_file(self._sink, SCHEMAS[family])
        self._rows: list[dict[str, Any]] = []
        self._bytes = self._digest = self._num_rows = self._end = 0
        self._entries: list[tuple[int, int, int, list[int]]] = []

    def add(self, row: dict[str, Any], size: int) -> None:
        """size: at least what is written of it."""
        if self._rows and (len(self._rows) == MAX_BATCH_ROWS or self._bytes + size > MAX_BATCH_BYTES):
            self._flush()
        self._rows.append(to_columns(self._family, row))
        self._bytes += size
        self._digest = chain(self._digest, row_digest(row), 1)

    def _flush(self) -> None:
        schema = SCHEMAS[self._family]
        columns = [_array([row[part.name] for row in self._rows], part.type) for part in schema]
        self._file.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        start, self._end = self._end, self._sink.tell()
        self._num_rows += len(self._rows)
        file = OpenFile(self._path, self._end, "its writer")
        _, places = buffer_places(file.read, self._family, start, self._end)
        self._entries.append((self._num_rows, self._end, file.xxh3_64(start, self._end), places))
        self._rows, self._bytes = [], 0

    def close(self) -> Written | None:
        """None, and no file, where there were no rows."""
        if self._rows:
            self._flush()
        self._file.close()
        num_bytes = self._sink.tell()
        self._sink.close()
        if not self._entries:
            self._path.unlink()
            return None
        entries = np.zeros(len(self._entries), entry_type(self._family))
        for entry, found in zip(entries, self._entries, strict=True):
            entry["rows_end"], entry["byte_end"], entry["xxh3"], entry["places"] = found
        footer = OpenFile(self._path, num_bytes, "its writer").xxh3_64(self._end, num_bytes)
        shard = Shard(
            file=self._path.name, rows=self._num_rows, batches=len(entries), num_bytes=num_bytes, digest=self._digest,
            footer_xxh3=f"{footer:016x}", index_xxh3=xxhash.xxh3_64_hexdigest(entries),
        )  # fmt: skip
        return Written(shard, entries)


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
        if isinstance(value, bytes | np.ndarray):
            rest.append((name, len(value)))
            digest.update(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
        else:
            rest.append((name, value))
    digest.update(repr(rest).encode("utf-8", "surrogatepass"))
    return digest.intdigest()


def row_bytes(row: Mapping[str, Any]) -> int:
    """At least what the row takes in an Arrow file, the same wherever it comes from."""
    return 64 + sum(_value_bytes(value) for value in row.values())


def _value_bytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, str):
        return 8 + (len(value) if value.isascii() else len(value.encode()))
    return 16 + sum(_value_bytes(item) for item in value) if isinstance(value, list | tuple) else 8


def chained(shards: Iterable[Shard]) -> int:
    """Digest of the rows of files, one after another."""
    digest = 0
    for shard in shards:
        digest = chain(digest, shard.digest, shard.rows)
    return digest


def chain(before: int, digest: int, rows: int) -> int:
    """Digest of some rows followed by `rows` more whose digest is `digest`; the same however the rows are cut."""
    return (before * pow(_BASE, rows, _PRIME) + digest) % _PRIME

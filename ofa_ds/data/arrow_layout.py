"""Where the buffers of a record batch are in an Arrow file, by the library, from the batch's metadata alone."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from ofa_ds.data.columns import KEPT, SCHEMAS

_MAGIC_BYTES = 8
"""What an Arrow file begins with, before its first message (the schema)."""

_HEAD = struct.Struct("<ii")
"""Of a message: a mark, and the size of its metadata."""

MAX_METADATA = 1 << 20
"""Bytes; those of 30 buffers are a few thousand, whatever they hold."""

Read = Callable[[int, int], bytes]
"""(first byte, size) -> bytes of a file. Raises RuntimeError where they are not there."""


def buffer_places(read: Read, family: str, start: int, end: int) -> tuple[int, list[int]]:
    """(rows, place of each buffer of `KEPT` from byte `start` on; 0: empty) of the batch at bytes start ... end - 1.

    The library sees the content as memory that is never filled, nor read. Raises pa.ArrowException, or the library's
    OSError (without a number), where it cannot read them or the columns are not this version's; and as `read` does.
    """
    message_start = start or _MAGIC_BYTES + _check_schema(read, family)
    metadata = read(message_start, _message_head(read, message_start))
    message = np.empty(max(end - message_start, len(metadata)), np.uint8)
    message[: len(metadata)] = np.frombuffer(metadata, np.uint8)
    buffer = pa.py_buffer(message)
    record = pa.ipc.read_record_batch(pa.ipc.read_message(pa.BufferReader(buffer)), SCHEMAS[family])
    places: list[int] = []
    for column in record.columns:
        buffers = column.buffers()
        kept = [buffers[k] for k in KEPT[column.type]]
        places += [part.address - buffer.address + message_start - start if part and part.size else 0 for part in kept]
    return record.num_rows, places


def layout_problem(read: Read, family: str, entry: Sequence[int]) -> str | None:
    """Where a batch is not what its entry in the index says (`batch_index.entry_reader`). Raises as `read` does."""
    first, start, stop, end, *places = entry
    try:
        rows, found = buffer_places(read, family, start, end)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # of the machine: the library's own OSErrors, for damage, have none
            raise
        return f"Arrow cannot read it ({error})"
    if rows != stop - first:
        return f"it has {rows} rows, its index says {stop - first}"
    return None if found == places else "its buffers are not where its index says"


def _check_schema(read: Read, family: str) -> int:
    """Bytes of the schema's message. Raises as `buffer_places` does."""
    size = _message_head(read, _MAGIC_BYTES)
    found = pa.ipc.read_schema(pa.py_buffer(read(_MAGIC_BYTES, size)))
    if not found.equals(SCHEMAS[family]):
        raise pa.ArrowInvalid("its columns are not those of this version of ofa-ds")
    return size


def _message_head(read: Read, start: int) -> int:
    """Bytes of an Arrow message up to its content."""
    mark, size = _HEAD.unpack(read(start, _HEAD.size))
    if mark != -1 or not 0 < size <= MAX_METADATA:
        raise pa.ArrowInvalid(f"no Arrow message at byte {start}")
    return _HEAD.size + size

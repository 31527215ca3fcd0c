"""What reading an Arrow stream would take, from its messages: buffers may be compressed, and unpack to any size.

Framing: github.com/apache/arrow, docs/source/format/Columnar.rst; tables of a message: format/Message.fbs, in
FlatBuffers: a table begins with the distance to a list of where its fields are, 0 for one that is not there.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import pyarrow as pa

from ofa_ds.data.building.source import SourceError

MAGIC = b"ARROW1\0\0"
"""An Arrow file begins with it, and goes on with a stream."""

MAX_BATCH_BYTES = 1 << 29
"""Largest record batch, unpacked, whose buffers are compressed; others are as large as their file says."""

MAX_METADATA_BYTES = 1 << 26

_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


class _Message(NamedTuple):
    kind: int
    body: int
    """Bytes."""
    buffers: list[tuple[int, int]]
    """Offset and length of each in the body, where they are compressed."""


def to_stream(source: pa.NativeFile) -> bool:
    """Go to where the stream of an Arrow file begins, or of a file that is one; whether it is a stream alone."""
    source.seek(0)
    if source.read(len(MAGIC)) == MAGIC:
        return False
    source.seek(0)
    return True


def check_stream(source: pa.NativeFile, location: str) -> None:
    """Raises SourceError for one that is not whole, or has a batch that unpacks to more than MAX_BATCH_BYTES.

    The dictionaries of all batches count together: a reader keeps them.
    """
    alone = to_stream(source)
    number = dictionaries = at = 0
    try:
        while size := _metadata_bytes(source):
            at = source.tell()
            message = _message(source.read(size))
            begin = source.tell()
            if not 0 <= message.body <= source.size() - begin:
                raise ValueError(f"a body of {message.body} bytes, {source.size() - begin} are left")
            unpacked = sum(_unpacked(source, begin, message.body, each) for each in message.buffers)
            if message.kind == _DICTIONARY_BATCH:
                dictionaries = unpacked = dictionaries + unpacked
            if unpacked > MAX_BATCH_BYTES:
                raise SourceError(
                    f"{location}: message {number}: its buffers unpack to {unpacked} bytes, at most {MAX_BATCH_BYTES} "
                    "are read; write it again with smaller record batches, or without compression"
                )
            source.seek(begin + message.body)
            number += 1
        if alone and source.tell() != source.size():
            raise ValueError("something follows the end of its stream")
    except SourceError:
        raise
    except (struct.error, ValueError) as error:
        raise SourceError(f"{location}: damaged at byte {at}, message {number}: {error}; copy it again") from error


def _metadata_bytes(source: pa.NativeFile) -> int:
    """0 at the end mark. Older streams have nothing before the number."""
    head = source.read(4)
    if head == b"\xff\xff\xff\xff":
        head = source.read(4)
    if len(head) < 4:
        raise ValueError("it ends without its end mark")
    size = struct.unpack("<i", head)[0]
    if not 0 <= size <= MAX_METADATA_BYTES:
        raise ValueError(f"{size} bytes of metadata, at most {MAX_METADATA_BYTES} are read")
    return size


def _unpacked(source: pa.NativeFile, begin: int, body: int, buffer: tuple[int, int]) -> int:
    """Bytes of one compressed buffer, as its first eight say; -1 is one that is stored as it is."""
    offset, length = buffer
    if not 0 <= offset <= offset + length <= body:
        raise ValueError(f"a buffer at {offset} of {length} bytes in a body of {body}")
    if length < 8:
        return 0
    source.seek(begin + offset)
    size = struct.unpack("<q", source.read(8))[0]
    if size < -1:
        raise ValueError(f"a compressed buffer of {size} bytes")
    return max(size, length - 8)


def _message(data: bytes) -> _Message:
    if b"experimental_compression" in data:  # as in Arrow 0.17, outside of the tables that are looked at here
        raise ValueError("a compression of before Arrow 1.0")
    table = _at(data, "<I", 0)
    where, header, length = (_field(data, table, number) for number in (1, 2, 3))
    body = _at(data, "<q", length) if length else 0
    kind = _at(data, "<B", where) if where else 0
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return _Message(kind, body, [])
    batch = _follow(data, header)
    if kind == _DICTIONARY_BATCH:
        batch = _follow(data, _field(data, batch, 1))
    buffers, compression = _field(data, batch, 2), _field(data, batch, 3)
    if not compression or not buffers:
        return _Message(kind, body, [])
    first = _follow(data, buffers)
    places = range(first + 4, first + 4 + 16 * _at(data, "<I", first), 16)
    return _Message(kind, body, [(_at(data, "<q", at), _at(data, "<q", at + 8)) for at in places])


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a table is; 0 for none."""
    fields = table - _at(data, "<i", table)
    entry = 4 + 2 * number
    if entry + 2 > _at(data, "<H", fields):
        return 0
    offset = _at(data, "<H", fields + entry)
    return table + offset if offset else 0


def _follow(data: bytes, at: int) -> int:
    if not at:
        raise ValueError("a message without its table")
    return at + _at(data, "<I", at)


def _at(data: bytes, form: str, at: int) -> int:
    if at < 0:
        raise ValueError(f"a place {at} in a message")
    return struct.unpack_from(form, data, at)[0]

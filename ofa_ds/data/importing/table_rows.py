"""Rows of Arrow record batches as Python values, each measured before it is one: lists and dictionaries may repeat a
value without end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

MAX_ROW_BYTES = 1 << 28
"""Largest row that is read; eight for each number and each place in a list."""

_MANY_BYTES = 1 << 26
"""Of rows that become Python values together."""


def rows_of(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any] | ValueError]:
    """In place of a row that is not valid, or too large, what is wrong with it."""
    try:
        batch.validate(full=True)
        size = sum(map(_num_bytes, batch.columns))
        if size <= (_MANY_BYTES if batch.num_rows > 1 else MAX_ROW_BYTES):
            yield from batch.to_pylist()
            return
        problem = ValueError(f"the row has {size} bytes, at most {MAX_ROW_BYTES} are read")
    except pa.ArrowException as error:
        problem = ValueError(" ".join(str(error).split())[:200])
    if batch.num_rows > 1:
        for k in range(batch.num_rows):
            yield from rows_of(batch.slice(k, 1))
    else:
        yield problem


def is_read(kind: pa.DataType, inside: bool = False) -> bool:
    """Whether `_num_bytes` knows how large values of a type are. inside: a list."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_read(kind.storage_type, inside)
    if types.is_struct(kind):
        return all(is_read(kind.field(k).type, inside) for k in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_read(kind.value_type, inside=True)
    if types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return not inside
    return _is_bytes(kind) or any(
        test(kind) for test in (types.is_null, types.is_boolean, types.is_integer, types.is_floating)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string))


def _num_bytes(array: pa.Array) -> int:
    """Of its values, each where it is: at least what Python takes for them. Copies no text."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _num_bytes(array.storage)
    if types.is_struct(kind):
        return sum(map(_num_bytes, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return 8 * len(array) + _num_bytes(array.flatten())
    if types.is_dictionary(kind):
        return 8 * len(array) + (pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return sum(each.as_buffer().size for each in array if each.is_valid)
    if _is_bytes(kind):
        return 8 * len(array) + (pc.sum(pc.binary_length(array)).as_py() or 0)
    return 8 * len(array)

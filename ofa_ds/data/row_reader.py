"""Row j of a record batch, from where its buffers are: one straight function for each family and choice of columns.

It is put together from the lines below and compiled once. With a call for each column a row took 1.2 times as long,
and reading rows is what limits how many readers a processor feeds; what is put together are this module's own lines
and the names in `columns.SCHEMAS`, nothing from a file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from ofa_ds.data.columns import BOX, KEPT, SCHEMAS, list_of

Data = mmap.mmap | bytes
"""What record batches are read from; a slice of it is bytes."""

ReadRow = Callable[[Data, memoryview, int, int, Sequence[int], int], dict[str, Any]]
"""(data, int32 view of it, first byte and one past the last byte of the batch, places of its buffers, j) -> columns.

Nothing outside the batch is returned, and no more than it holds allocated. Raises IndexError, ValueError or
struct.error where the batch's own numbers point elsewhere.
"""

_RANGE = "x = (start + {0} >> 2) + j; a = ints[x]; b = ints[x + 1]"
"""First and one past the last item of row j, by a buffer of offsets."""
_SLICE = f"{_RANGE}; s = start + {{1}}\nif not 0 <= a <= b <= end - s: outside()\n"

_LINES = {
    pa.utf8(): _SLICE + "{name} = data[s + a : s + b].decode()",
    pa.binary(): _SLICE + "{name} = data[s + a : s + b]",
    pa.int32(): "{name} = ints[(start + {0} >> 2) + j]",
    BOX: "{name} = four_floats(data, start + {0} + 16 * j)",
    list_of(pa.utf8()): f"{_RANGE}\n{{name}} = strings(data, ints, (start, end), {{1}}, {{2}}, a, b) if a != b else []",
    list_of(pa.float64()): _SLICE + "{name} = doubles(data, s, end, a, b) if a != b else []",
    list_of(pa.int16()): _SLICE + "{name} = items(data, s, end, a, b, 2).view('<i2')",
    list_of(BOX): _SLICE + "{name} = items(data, s, end, a, b, 16).view('<f4').reshape(-1, 4)",
}
"""How a column is read, given {0}, {1}, ...: the places of its buffers of `KEPT`."""


def _outside() -> None:
    raise ValueError("it points outside its record batch")


def _strings(
    data: Data, ints: memoryview, batch: tuple[int, int], ends_at: int, text_at: int, a: int, b: int
) -> list[str]:
    start, end = batch
    first, text = (start + ends_at >> 2) + a, start + text_at
    if not 0 <= a < b <= end - start:
        _outside()
    ends = ints[first : first + b - a + 1].tolist()
    if len(ends) != b - a + 1:
        _outside()
    found = []
    for c, d in pairwise(ends):
        if not 0 <= c <= d <= end - text:
            _outside()
        found.append(data[text + c : text + d].decode())
    return found


def _doubles(data: Data, at: int, end: int, a: int, b: int) -> list[float]:
    if at + 8 * b > end:
        _outside()
    return list(struct.unpack_from(f"<{b - a}d", data, at + 8 * a))


def _items(data: Data, at: int, end: int, a: int, b: int, size: int) -> np.ndarray:
    """uint8 [size * (b - a)], items a ... b - 1 of `size` bytes each."""
    if at + size * b > end:
        _outside()
    return np.frombuffer(data[at + size * a : at + size * b], np.uint8)


_HELPERS = {
    "outside": _outside, "four_floats": struct.Struct("<4f").unpack_from, "strings": _strings, "doubles": _doubles,
    "items": _items,
}  # fmt: skip


@lru_cache
def reader(family: str, columns: tuple[str, ...] | None = None) -> ReadRow:
    """Of some columns, as they are stored; None: of all. Raises KeyError for a column that the family has not."""
    schema = SCHEMAS[family]
    if unknown := set(columns or ()) - set(schema.names):
        raise KeyError(f"{family} rows have no column {', '.join(sorted(unknown))}")
    lines, first = [], 0
    for field in schema:
        places = [f"p{first + k}" for k in range(len(KEPT[field.type]))]
        first += len(places)
        if columns is None or field.name in columns:
            lines += _LINES[field.type].format(*places, name=f"c_{field.name}").split("\n")
    names = schema.names if columns is None else columns
    source = [
        "def read(data, ints, start, end, places, j):",
        f"{', '.join(f'p{k}' for k in range(first))}, = places",
        *lines,
        f"return {{{', '.join(f'{name!r}: c_{name}' for name in names)}}}",
    ]
    scope: dict[str, Any] = dict(_HELPERS)
    exec(compile("\n    ".join(source), f"<{__name__}: {family}>", "exec"), scope)
    return scope["read"]

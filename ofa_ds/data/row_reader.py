"""Row j of a record batch, from where its buffers are: one straight function for each family and choice of columns.

It is put together from the lines below and compiled once. With a call for each column a row took 1.2 times as long,
and reading rows is what limits how many readers a processor feeds; what is put together are this module's own lines
and the names in `columns.SCHEMAS`, nothing from a file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from ofa_ds.data.columns import BOX, KEPT, SCHEMAS, WITH_ANSWERS, list_of

Data = mmap.mmap | bytes
"""What record batches are read from; a slice of it is bytes."""

ReadRow = Callable[[Data, memoryview, int, Sequence[int], int], dict[str, Any]]
"""(data, int32 view of it, byte at which the batch begins, (first row, first byte, one past the last row, one past the
last byte, places of its buffers ...), row) -> the row.

Nothing outside the batch is returned, and no more than it holds allocated. Raises IndexError, ValueError or
struct.error where the batch's own numbers point elsewhere.
"""

_RANGE = "x = q + ({0} >> 2); a = ints[x]; b = ints[x + 1]"
"""First and one past the last item of the row, by a buffer of offsets. q: the row's int32 in a buffer at place 0."""
_SLICE = f"{_RANGE}; s = base + {{1}}\nif not 0 <= a <= b <= end - s: outside()\n"

_LINES = {
    pa.utf8(): _SLICE + "{name} = data[s + a : s + b].decode()",
    pa.binary(): _SLICE + "{name} = data[s + a : s + b]",
    pa.int32(): "{name} = ints[q + ({0} >> 2)]",
    BOX: "{name} = four_floats(data, base + {0} + 16 * j)",
    list_of(pa.utf8()): f"{_RANGE}\n{{name}} = strings(data, ints, (base, end), {{1}}, {{2}}, a, b) if a != b else []",
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
    base, end = batch
    text, last = base + text_at, (base + ends_at >> 2) + b
    if not 0 <= a < b < end - base or last >= len(ints):
        _outside()
    start = ints[last - b + a]
    found = []
    for stop in ints[last - b + a + 1 : last + 1]:
        if not 0 <= start <= stop <= end - text:
            _outside()
        found.append(data[text + start : text + stop].decode())
        start = stop
    return found


def _doubles(data: Data, at: int, end: int, a: int, b: int) -> list[float]:
    if at + 8 * b > end:
        _outside()
    return memoryview(data[at + 8 * a : at + 8 * b]).cast("d").tolist()


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
    """Of some columns, as they are stored; None: of the whole row, as `columns.from_columns` gives it.

    Raises KeyError for a column that the family has not.
    """
    schema = SCHEMAS[family]
    if unknown := set(columns or ()) - set(schema.names):
        raise KeyError(f"{family} rows have no column {', '.join(sorted(unknown))}")
    lines, first = [], 0
    for field in schema:
        places = [f"p{first + k}" for k in range(len(KEPT[field.type]))]
        first += len(places)
        if columns is None or field.name in columns:
            lines += _LINES[field.type].format(*places, name=f"c_{field.name}").split("\n")
    source = [
        "def read(data, ints, base, entry, i):",
        f"first, start, _, end, {', '.join(f'p{k}' for k in range(first))} = entry",
        "j = i - first; q = (base >> 2) + j; end += base - start",
        *lines,
        f"return {{{_items_of_row(family) if columns is None else _items_of(columns)}}}",
    ]
    scope: dict[str, Any] = dict(_HELPERS)
    exec(compile("\n    ".join(source), f"<{__name__}: {family}>", "exec"), scope)
    return scope["read"]


def _items_of(columns: Iterable[str]) -> str:
    return ", ".join(f"{name!r}: c_{name}" for name in columns)


def _items_of_row(family: str) -> str:
    """The same as `columns.from_columns` of all columns, without a second dictionary."""
    if family not in WITH_ANSWERS:
        return _items_of(SCHEMAS[family].names)
    answers = "[*zip(c_answer_text, c_answer_confidence, strict=True)] if c_answer_text or c_answer_confidence else []"
    box = "c_box if c_box[0] == c_box[0] else None"
    made = {"answer_text": f"'answers': {answers}", "answer_confidence": "", "box": f"'box': {box}"}
    return ", ".join(filter(None, (made.get(name, _items_of([name])) for name in SCHEMAS[family].names)))

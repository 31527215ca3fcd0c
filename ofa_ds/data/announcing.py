"""Asking the system for what rows need before they are read, so that a disk has many requests at once and not one.

A record batch has its small columns together before and after the one that is most of it: pictures, or else texts. So a
row is the batch's small columns and its own picture.
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Sequence
from functools import lru_cache

from ofa_ds.data.columns import KEPT, SCHEMAS

MAX_WHOLE_BYTES = 256 << 10
"""Of a batch that is asked for as a whole."""

CALLS_AFTER_A_FAULT = 256
"""So many are announced before it is looked at again whether anything has to be waited for."""

_BEFORE_PLACES = 4
"""Numbers of an entry before its places: see `batch_index.entry_reader`."""


class Faults:
    """Whether pages have had to be waited for of late: where all are in memory announcing them is time lost."""

    def __init__(self) -> None:
        self._seen, self._left = -1, 0

    def are_due(self) -> bool:
        """Ask it once for each announcement. A process's major faults count, whatever page they were for."""
        found = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        if found != self._seen:
            self._seen, self._left = found, CALLS_AFTER_A_FAULT
        else:
            self._left = max(self._left - 1, 0)
        return self._left > 0


def announce_batch(data: mmap.mmap, base: int, entry: Sequence[int], family: str) -> bool:
    """Ask for the small columns of a batch. -> whether a row's own part is to be asked for too.

    base: byte of `data` at which the batch begins.
    """
    _, start, _, stop, *_ = entry
    end = base + stop - start
    _, content, after = _largest(family)
    if stop - start <= MAX_WHOLE_BYTES:
        _ask(data, base, end)
        return False
    _ask(data, base, base + entry[content])
    if after is not None:
        _ask(data, base + entry[after], end)
    return True


def announce_row(data: mmap.mmap, ints: memoryview, base: int, entry: Sequence[int], family: str, row: int) -> None:
    """Ask for the largest column of a row; the batch's small columns are waited for, wrong numbers passed over."""
    first, start, _, stop, *_ = entry
    offsets, content, _ = _largest(family)
    at = (base + entry[offsets] >> 2) + row - first
    a, b = ints[at], ints[at + 1]
    place = base + entry[content]
    if 0 <= a <= b <= base + stop - start - place:
        _ask(data, place + a, place + b)


@lru_cache
def _largest(family: str) -> tuple[int, int, int | None]:
    """Where in an entry the places of the largest column are: its offsets, its content, what comes after it."""
    schema = SCHEMAS[family]
    name = "image" if "image" in schema.names else "text"
    before = schema.names[: schema.names.index(name)]
    at = _BEFORE_PLACES + sum(len(KEPT[schema.field(each).type]) for each in before)
    return at, at + 1, None if name == schema.names[-1] else at + 2


def _ask(data: mmap.mmap, start: int, stop: int) -> None:
    if start < stop <= len(data):
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        data.madvise(mmap.MADV_WILLNEED, first, stop - first)

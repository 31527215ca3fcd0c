"""Whether a data worker still gets on: which row it is at, and what the system says of it.

A worker is judged by its rows; a slow disk and a failing service are none of its faults, so whatever it reads is a sign
of life too, and whatever it writes: each request that is tried again, or takes long, is told.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple

from ofa_ds.train.slots import unnamed_file

TELL_S = 30.0
"""Of waiting for a worker that stays at one row: it is told."""
REPLACE_S = 300.0
"""Of waiting for a worker without any sign of life: another one takes its place. Far more than any row takes."""

_PLACE = struct.Struct("<qq32s")
"""Rows begun, the row, its family."""
_STRIDE = 64


class Places:
    """Memory that workers share with the trainer: the row that each is at."""

    def __init__(self, count: int, descriptor: int | None = None) -> None:
        """Raises RuntimeError, one line, where the system gives no such memory."""
        self._count = count
        try:
            self._file = unnamed_file() if descriptor is None else descriptor
            if descriptor is None:
                os.ftruncate(self._file, count * _STRIDE)
            self._data = mmap.mmap(self._file, count * _STRIDE)
        except OSError as error:
            raise RuntimeError(f"no memory that processes share: {error}; set data.workers=0") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _passed, (self._count, DupFd(self._file))

    def begin(self, worker: int, family: str, row: int) -> None:
        """By the worker: the row is next."""
        rows, *_ = _PLACE.unpack_from(self._data, worker * _STRIDE)
        _PLACE.pack_into(self._data, worker * _STRIDE, rows + 1, row, family.encode())

    def clear(self, worker: int) -> None:
        """It has begun no row."""
        _PLACE.pack_into(self._data, worker * _STRIDE, 0, 0, b"")

    def of(self, worker: int) -> tuple[int, str]:
        """(rows begun, the last one in words)."""
        rows, row, family = _PLACE.unpack_from(self._data, worker * _STRIDE)
        return rows, f"{family.rstrip(bytes(1)).decode(errors='replace')} row {row}" if rows else "before its first row"

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _passed(count: int, descriptor: Any) -> Places:
    return Places(count, descriptor.detach())


class Seen(NamedTuple):
    """Of a process, by the system."""

    state: str = ""
    """R runs, S waits, D waits for a disk, T is stopped; empty where the system does not say."""
    moved: tuple[int, ...] = (0, 0, 0)
    """Page faults that went to a disk, bytes that came from there, bytes that it wrote anywhere."""
    cpu: int = 0
    """Clock ticks that it has run."""


def seen(pid: int) -> Seen:
    """What /proc says of it; nothing where there is no such process or no /proc."""
    with suppress(OSError, ValueError, LookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        read = written = 0
        with suppress(OSError):  # may be kept from us
            counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            read, written = int(counts["read_bytes"]), int(counts["wchar"])
        return Seen(fields[0], (int(fields[9]), read, written), int(fields[11]) + int(fields[12]))
    return Seen()


@dataclass
class Silence:
    """How long one worker has been waited for. It is over with the next batch or row."""

    at: tuple[int, int] = (-1, -1)
    """Number of the batch, rows begun."""
    before: Seen = Seen()
    row_s: float = 0.0
    """At one row."""
    dead_s: float = 0.0
    """Without any sign of life."""
    told: bool = False

    def add(self, passed_s: float, at: tuple[int, int], now: Seen) -> None:
        if at != self.at:
            self.at, self.before, self.row_s, self.dead_s, self.told = at, now, 0.0, 0.0, False
            return
        self.row_s += passed_s
        starts = at[1] == 0 and now.cpu != self.before.cpu  # it imports; afterwards a decoder may run for ever
        moves = now.state == "D" or now.moved != self.before.moved
        self.dead_s = 0.0 if starts or moves else self.dead_s + passed_s
        self.before = now

    @property
    def does(self) -> str:
        """What the worker does, in words."""
        words = {"T": "it is stopped (SIGSTOP)", "D": "it waits for a disk", "R": "it computes", "S": "it waits"}
        return words.get(self.before.state, "nobody knows at what")

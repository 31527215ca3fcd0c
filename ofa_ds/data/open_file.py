"""Files read at any place by `pread`, never mapped: one that is cut while it is read is an error, not a SIGBUS."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

MAX_OPEN = 256
"""Files that one reader holds open; the least recently used is closed. Processes have 1,024 descriptors by default."""


class OpenFile:
    """A file open for reading. It is closed when nobody refers to it, so that no thread loses it in the middle."""

    def __init__(self, path: Path, size: int, promise: str) -> None:
        """Raises RuntimeError where its size in bytes is not `size`, which `promise` says."""
        self.path, self.size, self._promise = path, size, promise
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if (found := os.fstat(self._number).st_size) != size:
            raise self._wrong_size(found)

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)

    def read(self, start: int, size: int) -> bytes:
        """Raises RuntimeError where the bytes are not in the file as promised, or no longer in it."""
        if size < 0 or start < 0 or start + size > self.size:
            place = f"bytes {start} ... {start + size} of {self.size}"
            raise RuntimeError(f"{self.path}: damaged: it points at {place}; build it again")
        data = os.pread(self._number, size, start)
        if len(data) == size:
            return data
        parts = [data]
        while (size := size - len(parts[-1])) and parts[-1]:  # a read stops after 2 GiB, and at an interrupt
            start += len(parts[-1])
            parts.append(os.pread(self._number, size, start))
        if size:
            raise self._wrong_size(os.fstat(self._number).st_size)
        return b"".join(parts)

    def _wrong_size(self, found: int) -> RuntimeError:
        want = f"want {self.size} bytes as in {self._promise}"
        return RuntimeError(f"{self.path}: {want}, got {found}; copy or build it again, and do not write it in place")


def opener() -> Callable[[Path, int, str], OpenFile]:
    """`open(path, size, promise)` -> OpenFile, kept open; safe to call from several threads and after a fork."""
    return lru_cache(MAX_OPEN)(OpenFile)

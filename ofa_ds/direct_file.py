"""Writes a new file from front to back, past the page cache where the file system allows it.

What a training job saves is read again by another process, if ever: keeping it in the page cache would cost a copy, ten
times the processor time of the write itself, and memory that training uses.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

BLOCK_BYTES = 4096
"""Offsets, sizes and addresses of direct writes are multiples of it."""

_STAGE_BYTES = 1 << 22
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)


def set_direct(descriptor: int, on: bool) -> bool:
    """Have reads and writes pass by the page cache, or not any more.

    Returns whether it is on; a file system in memory, for one, does not have it.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return on


class DirectFile:
    """`head_bytes` (a multiple of BLOCK_BYTES) are kept free at the front, for what `finish` is given.

    Pieces of any size are gathered in one aligned buffer.
    """

    def __init__(self, path: Path, head_bytes: int) -> None:
        """Raises FileExistsError."""
        if head_bytes % BLOCK_BYTES:
            raise ValueError(f"a head of {head_bytes} bytes, want a multiple of {BLOCK_BYTES}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self.path = path
        self._head_bytes = head_bytes
        self._file = os.open(path, flags, 0o644)
        self._direct = set_direct(self._file, True)
        self._stage = memoryview(mmap.mmap(-1, _STAGE_BYTES))  # page-aligned
        self._at, self._filled = head_bytes, 0

    @property
    def size(self) -> int:
        """Bytes of the file, head included."""
        return self._at + self._filled

    def write(self, data: bytes | memoryview) -> None:
        """Raises OSError: the disk is full, or fails."""
        view = memoryview(data)
        while view:
            count = min(len(view), _STAGE_BYTES - self._filled)
            self._stage[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == _STAGE_BYTES:
                self._put(_STAGE_BYTES, self._at)
                self._at, self._filled = self._at + _STAGE_BYTES, 0

    def finish(self, head: bytes) -> None:
        """Write what is left and the head, and make the file durable."""
        if len(head) != self._head_bytes:
            raise ValueError(f"{self.path}: a head of {len(head)} bytes where {self._head_bytes} were kept")
        size = self.size
        if self._filled:
            padded = -(-self._filled // BLOCK_BYTES) * BLOCK_BYTES
            self._stage[self._filled : padded] = bytes(padded - self._filled)
            self._put(padded, self._at)
            os.ftruncate(self._file, size)
        for start in range(0, len(head), _STAGE_BYTES):
            part = head[start : start + _STAGE_BYTES]
            self._stage[: len(part)] = part
            self._put(len(part), start)
        os.fsync(self._file)
        found = os.fstat(self._file).st_size
        if found != size:
            raise OSError(f"{self.path}: has {found} bytes after writing {size}; is the disk full?")

    def close(self) -> None:
        os.close(self._file)

    def _put(self, count: int, at: int) -> None:
        """Write the first bytes of the stage."""
        view, start = self._stage[:count], at
        while view:
            try:
                written = os.pwrite(self._file, view, at)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = set_direct(self._file, False)  # it wants another alignment, or cannot do it after all
                continue
            view, at = view[written:], at + written
        if not self._direct:
            _start_writeback(self._file, start, count)


def _start_writeback(descriptor: int, at: int, num_bytes: int) -> None:
    """Have the disk begin now: otherwise it idles until fsync, and then everything waits for it."""
    call = getattr(_libc, "sync_file_range", None)
    if call is not None:
        call(descriptor, ctypes.c_int64(at), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE)

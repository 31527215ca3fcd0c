"""Writes a new file from front to back, past the page cache where the file system allows it.

What a training job saves is read again by another process, if ever: keeping it in the page cache would cost a copy, ten
times the processor time of the write itself, and memory that training uses.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager
from pathlib import Path

from ofa_ds.storage.direct import BLOCK_BYTES, set_direct
from ofa_ds.storage.open_files import OpenFiles

_STAGE_BYTES = 1 << 22
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None)


class DirectFile:
    """`head_bytes` (a multiple of BLOCK_BYTES) are kept free at the front, for what `finish` is given.

    Pieces of any size are gathered in an aligned buffer. Not for two threads at once.
    """

    def __init__(
        self,
        path: Path,
        head_bytes: int,
        *,
        stage_bytes: int | None = None,
        pool: Executor | None = None,
        files: OpenFiles | None = None,
    ) -> None:
        """stage_bytes: of the buffer, a multiple of BLOCK_BYTES. pool: writes there, from one of two such buffers,
        while the other one is filled. files: opens it there, where a file is one of many.

        Raises FileExistsError.
        """
        if head_bytes % BLOCK_BYTES:
            raise ValueError(f"a head of {head_bytes} bytes, want a multiple of {BLOCK_BYTES}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self.path = path
        self._head_bytes = head_bytes
        self._files = files or OpenFiles(1, direct=True)
        with self._files.use(path, flags) as descriptor:
            self._direct = set_direct(descriptor, True)
        self._stage_bytes = stage_bytes or _STAGE_BYTES
        self._stage, self._spare = (memoryview(mmap.mmap(-1, self._stage_bytes)) for _ in range(2))  # page-aligned
        self._at, self._filled = head_bytes, 0
        self._pool = pool
        self._pending: Future[None] | None = None

    @property
    def size(self) -> int:
        """Bytes of the file, head included."""
        return self._at + self._filled

    def write(self, data: bytes | memoryview) -> None:
        """Raises OSError: the disk is full, or fails."""
        view = memoryview(data)
        while view:
            count = min(len(view), self._stage_bytes - self._filled)
            self._stage[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == self._stage_bytes:
                self._put_whole_stage()

    def finish(self, head: bytes) -> None:
        """Write what is left and the head, and make the file durable."""
        if len(head) != self._head_bytes:
            raise ValueError(f"{self.path}: a head of {len(head)} bytes where {self._head_bytes} were kept")
        self._wait()
        size = self.size
        if self._filled:
            padded = -(-self._filled // BLOCK_BYTES) * BLOCK_BYTES
            self._stage[self._filled : padded] = bytes(padded - self._filled)
            self._put(self._stage[:padded], self._at)
            with self._opened() as descriptor:
                os.ftruncate(descriptor, size)
        for start in range(0, len(head), self._stage_bytes):
            part = head[start : start + self._stage_bytes]
            self._stage[: len(part)] = part
            self._put(self._stage[: len(part)], start)
        with self._opened() as descriptor:
            os.fsync(descriptor)
            found = os.fstat(descriptor).st_size
        if found != size:
            raise OSError(f"{self.path}: has {found} bytes after writing {size}; is the disk full?")

    def close(self) -> None:
        """What was not finished is not whole."""
        if self._pending is not None:
            wait([self._pending])  # it must not write into another file that gets this descriptor
        self._files.close(self.path)

    def _opened(self) -> AbstractContextManager[int]:
        return self._files.use(self.path, os.O_RDWR | os.O_NOFOLLOW)

    def _put_whole_stage(self) -> None:
        if self._pool is None:
            self._put(self._stage, self._at)
        else:
            self._wait()
            self._pending = self._pool.submit(self._put, self._stage, self._at)
            self._stage, self._spare = self._spare, self._stage
        self._at, self._filled = self._at + self._stage_bytes, 0

    def _wait(self) -> None:
        """Until the spare buffer is written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _put(self, view: memoryview, at: int) -> None:
        with self._opened() as descriptor:
            self._put_into(descriptor, view, at)

    def _put_into(self, descriptor: int, view: memoryview, at: int) -> None:
        start, count = at, len(view)
        if not self._direct:
            set_direct(descriptor, False)  # it may have been opened anew
        while view:
            try:
                written = os.pwrite(descriptor, view, at)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = set_direct(descriptor, False)  # it wants another alignment, or cannot do it after all
                continue
            view, at = view[written:], at + written
        if not self._direct:
            _start_writeback(descriptor, start, count)


def _start_writeback(descriptor: int, at: int, num_bytes: int) -> None:
    """Have the disk begin now: otherwise it idles until fsync, and then everything waits for it."""
    call = getattr(_libc, "sync_file_range", None)
    if call is not None:
        call(descriptor, ctypes.c_int64(at), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE)

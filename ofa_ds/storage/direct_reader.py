"""Reads a file from front to back, ahead of who uses it, past the page cache where the file system allows it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, wait
from pathlib import Path

from ofa_ds.storage.direct_file import set_direct
from ofa_ds.storage.safetensors_file import DamagedError, read_block


class DirectReader:
    """Ranges of a file in ascending order, each block read while the one before is used. For one thread."""

    def __init__(self, path: Path, pool: Executor, block_bytes: int) -> None:
        """pool: reads there. block_bytes: a multiple of BLOCK_BYTES; two such buffers are kept."""
        self.path = path
        self._pool = pool
        self._block_bytes = block_bytes
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        self._size = os.fstat(self._file).st_size
        set_direct(self._file, True)
        self._buffers = [memoryview(mmap.mmap(-1, block_bytes)) for _ in range(2)]
        self._reads: dict[int, Future[None]] = {}
        """By number of the block, which is in the buffer of the same parity."""

    def read(self, start: int, num_bytes: int) -> Iterator[memoryview]:
        """Views of these bytes, one after the other; each is overwritten after the next one was asked for.

        Raises DamagedError where the file ends before.
        """
        end = start + num_bytes
        if end > self._size:
            raise DamagedError(f"{self.path}: ends at byte {self._size}, want {start} to {end}")
        while start < end:
            number = start // self._block_bytes
            at = number * self._block_bytes
            yield self._block(number)[start - at : end - at]
            start = min(end, at + self._block_bytes)

    def close(self) -> None:
        wait(self._reads.values())
        os.close(self._file)

    def _block(self, number: int) -> memoryview:
        for wanted in (number, number + 1):
            if wanted in self._reads or wanted * self._block_bytes >= self._size:
                continue
            for old in [each for each in self._reads if each % 2 == wanted % 2]:
                wait([self._reads.pop(old)])
            self._reads[wanted] = self._pool.submit(self._fill, wanted)
        self._reads[number].result()
        return self._buffers[number % 2]

    def _fill(self, number: int) -> None:
        at = number * self._block_bytes
        read_block(self._file, self._buffers[number % 2], min(self._block_bytes, self._size - at), at, self.path)

"""Reads a file from front to back, ahead of who uses it, past the page cache where the file system allows it."""

from __future__ import annotations

import mmap
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager
from pathlib import Path

from ofa_ds.storage.open_files import OpenFiles
from ofa_ds.storage.safetensors_file import DamagedError, read_block


class DirectReader:
    """Ranges of a file in ascending order, each block read while the one before is used. For one thread."""

    def __init__(
        self,
        path: Path,
        pool: Executor,
        block_bytes: int,
        ranges: Iterable[tuple[int, int]],
        *,
        num_buffers: int = 16,
        files: OpenFiles | None = None,
    ) -> None:
        """pool: reads there. block_bytes: a multiple of direct.BLOCK_BYTES.

        ranges: (start, number of bytes) of what will be asked for, ascending: what to read ahead. num_buffers: blocks
        in memory: the one that is used, and those that are read ahead. files: opens it there, where it is one of many.
        """
        self.path = path
        self._pool = pool
        self._block_bytes = block_bytes
        self._files = files or OpenFiles(1, direct=True)
        with self._opened() as descriptor:
            self._size = os.fstat(descriptor).st_size
        self._wanted = array("q")
        for each in ranges:
            blocks = self._blocks_of(*each)
            self._wanted.extend(blocks[1:] if self._wanted and blocks and self._wanted[-1] == blocks[0] else blocks)
        self._num_buffers = num_buffers
        self._free = [memoryview(mmap.mmap(-1, block_bytes)) for _ in range(num_buffers)]
        self._blocks: dict[int, tuple[memoryview, Future[None]]] = {}
        """By number: what was read, or is on its way."""
        self._last = -1

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
        wait([read for _, read in self._blocks.values()])
        self._files.close(self.path)

    def _opened(self) -> AbstractContextManager[int]:
        return self._files.use(self.path, os.O_RDONLY | os.O_NOFOLLOW)

    def _blocks_of(self, start: int, num_bytes: int) -> range:
        """Numbers of the blocks that hold these bytes."""
        return range(start // self._block_bytes, -(-(start + num_bytes) // self._block_bytes))

    def _block(self, number: int) -> memoryview:
        if number != self._last:
            following = bisect_right(self._wanted, number)
            self._hold([number, *self._wanted[following : following + self._num_buffers - 1]])
            self._last = number
        buffer, read = self._blocks[number]
        read.result()
        return buffer

    def _hold(self, numbers: Sequence[int]) -> None:
        """Have these blocks, and no others, in memory or on their way."""
        for number in self._blocks.keys() - set(numbers):
            buffer, read = self._blocks.pop(number)
            wait([read])
            self._free.append(buffer)
        for number in numbers:
            if number not in self._blocks:
                buffer = self._free.pop()
                self._blocks[number] = buffer, self._pool.submit(self._fill, buffer, number * self._block_bytes)

    def _fill(self, buffer: memoryview, at: int) -> None:
        with self._opened() as descriptor:
            read_block(descriptor, buffer, min(self._block_bytes, self._size - at), at, self.path)

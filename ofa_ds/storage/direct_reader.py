"""Reads a file from front to back, ahead of who uses it, past the page cache where the file system allows it."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from pathlib import Path

from ofa_ds.storage.direct_file import set_direct
from ofa_ds.storage.safetensors_file import DamagedError, read_block

NUM_BUFFERS = 16
"""Of each file: the block that is used, and those that are read ahead."""


class DirectReader:
    """Ranges of a file in ascending order, each block read while the one before is used. For one thread."""

    def __init__(self, path: Path, pool: Executor, block_bytes: int, ranges: Iterable[tuple[int, int]]) -> None:
        """pool: reads there. block_bytes: a multiple of direct_file.BLOCK_BYTES; NUM_BUFFERS of them are kept.

        ranges: (start, number of bytes) of what will be asked for, ascending: what to read ahead.
        """
        self.path = path
        self._pool = pool
        self._block_bytes = block_bytes
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        self._size = os.fstat(self._file).st_size
        set_direct(self._file, True)
        self._wanted = list(dict.fromkeys(number for each in ranges for number in self._blocks_of(*each)))
        self._free = [memoryview(mmap.mmap(-1, block_bytes)) for _ in range(NUM_BUFFERS)]
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
        os.close(self._file)

    def _blocks_of(self, start: int, num_bytes: int) -> range:
        """Numbers of the blocks that hold these bytes."""
        return range(start // self._block_bytes, -(-(start + num_bytes) // self._block_bytes))

    def _block(self, number: int) -> memoryview:
        if number != self._last:
            following = bisect_right(self._wanted, number)
            self._hold([number, *self._wanted[following : following + NUM_BUFFERS - 1]])
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
        read_block(self._file, buffer, min(self._block_bytes, self._size - at), at, self.path)

"""Record batches of a chunk one after another: each is read once, past the page cache, while the one before is used.

What is in memory is two stretches of the file. Mapped files would count all that was touched of them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ofa_ds.data.manifest import MANIFEST
from ofa_ds.data.open_file import wrong_size
from ofa_ds.data.shard_file import ShardFile
from ofa_ds.data.tools.chunks import Chunk
from ofa_ds.storage.direct import BLOCK_BYTES, set_direct
from ofa_ds.storage.safetensors_file import DamagedError, read_block

STRETCH_BYTES = 8 << 20
"""That are read at once, or one record batch where that is larger."""


@dataclass
class Held:
    """Bytes `start` ... `stop` - 1 of a file, at the begin of `data`, which may be longer."""

    path: Path
    data: mmap.mmap
    ints: memoryview
    """`data` as int32."""
    start: int
    stop: int

    def read(self, start: int, size: int) -> bytes:
        """Raises RuntimeError where they are not here."""
        if size < 0 or not self.start <= start <= start + size <= self.stop:
            raise RuntimeError(f"{self.path}: damaged: it points at bytes {start} ... {start + size}; build it again")
        return self.data[start - self.start : start + size - self.start]

    def xxh3_64(self, start: int, stop: int) -> int:
        with memoryview(self.data) as whole, whole[start - self.start : stop - self.start] as part:
            digest = xxhash.xxh3_64()
            digest.update(part)
            return digest.intdigest()


class SweptFile(ShardFile):
    """A shard of which one stretch is in memory: nothing else of it is asked for."""

    __slots__ = ("held",)
    held: Held

    def batch_bytes(self, batch: int, start: int) -> tuple[mmap.mmap, memoryview, int]:
        return self.held.data, self.held.ints, start - self.held.start

    def _opened(self) -> Held:
        return self.held


def sweep(chunk: Chunk) -> Iterator[tuple[ShardFile, int]]:
    """(file, number of a record batch that can be read from it now), in order; after the last of a file its footer.

    Raises RuntimeError with the file where that is damaged or cut, ValueError for its manifest, OSError.
    """
    whole = chunk.file
    file = SweptFile(whole.path, whole.family, whole.shard, lambda: memoryview(whole.entries.tobytes()))
    batches = range(chunk.first, chunk.stop + (chunk.stop == file.num_batches))
    stretches = _stretches(file, batches)
    places = [(file.bytes_of(some[0]).start, file.bytes_of(some[-1]).stop) for some in stretches]
    for held, some in zip(_read(file, places), stretches, strict=True):
        file.held = held
        yield from ((file, batch) for batch in some)


def record_batches(chunk: Chunk) -> Iterator[tuple[ShardFile, int]]:
    """As `sweep`, without footers."""
    return ((file, batch) for file, batch in sweep(chunk) if batch < file.num_batches)


def _stretches(file: ShardFile, batches: range) -> list[range]:
    found, first = [], batches.start
    for batch in batches:
        more = batch + 1 in batches
        if not more or file.bytes_of(batch + 1).stop - file.bytes_of(first).start > STRETCH_BYTES:
            found.append(range(first, batch + 1))
            first = batch + 1
    return found


def _read(file: ShardFile, places: Sequence[tuple[int, int]]) -> Iterator[Held]:
    """(first byte, one past the last) each; what came is written over when the next but one is asked for."""
    size = max((-(-stop // BLOCK_BYTES) - start // BLOCK_BYTES) * BLOCK_BYTES for start, stop in places)
    buffers = [_buffer(size) for _ in range(2)]
    views = [memoryview(buffer).cast("i") for buffer in buffers]
    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if (found := os.fstat(descriptor).st_size) != file.shard.num_bytes:
            raise wrong_size(file.path, file.shard.num_bytes, found, MANIFEST)
        set_direct(descriptor, True)

        def fill(number: int) -> Held:
            start, stop = places[number]
            begin, k = start // BLOCK_BYTES * BLOCK_BYTES, number % 2
            try:
                read_block(descriptor, memoryview(buffers[k]), stop - begin, begin, file.path)
            except DamagedError as error:
                found = os.fstat(descriptor).st_size
                raise wrong_size(file.path, file.shard.num_bytes, found, MANIFEST) from error
            return Held(file.path, buffers[k], views[k], begin, stop)

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(fill, 0)
            for number in range(len(places)):
                held = coming.result()
                if number + 1 < len(places):
                    coming = pool.submit(fill, number + 1)
                yield held
    finally:
        os.close(descriptor)
        _spare.extend(buffers)


_spare: list[mmap.mmap] = []
"""Of sweeps that are done: to fault in every page of fresh memory took longer than the checksum of what is in it."""


def _buffer(size: int) -> mmap.mmap:
    with suppress(IndexError):
        while len(found := _spare.pop()) < size:
            pass
        return found
    return mmap.mmap(-1, size)

"""A checkpoint from its first tensor to its last, each byte compared with its checksum as it passes. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ofa_ds.checkpoint.format import KINDS, TensorInfo
from ofa_ds.checkpoint.manifest import Manifest
from ofa_ds.checkpoint.rank_file import open_rank
from ofa_ds.storage.direct_file import BLOCK_BYTES
from ofa_ds.storage.direct_reader import NUM_BUFFERS, DirectReader
from ofa_ds.storage.safetensors_file import DamagedError, SafetensorsFile, wrong_sum
from ofa_ds.storage.tensor_writer import TensorSpec

_PREFIXES = tuple(f"{kind}|" for kind in KINDS)
MAX_FILES = 64
"""Of those that are read, or written, at the same time."""
BUFFER_BYTES = 64 << 20
"""For all files that are read, and for all that are written."""
THREADS = 4
"""Of the pool that reads, and writes: they only wait for the disk."""
_MAX_BLOCK_BYTES = 1 << 19
"""Larger ones would read more of what lies between the weights."""


@dataclass(frozen=True)
class Small:
    """A tensor beside the parameters: a generator's state, or a buffer."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, self.dtype, self.shape, len(self.data))


class CheckedStream:
    """Holds all files open. Fastest where tensors are asked for in the manifest's order. For one thread.

    Each tensor is to be read from its first element to its last; in between, others may not be.
    """

    def __init__(self, directory: Path, manifest: Manifest, pool: Executor, kinds: Sequence[str] = KINDS) -> None:
        """kinds: what will be read. pool: reads there. Raises DamagedError: a header, or what is `small`, is wrong."""
        self._layout = manifest.layout
        self._position = ("", "", 0)
        self._sum = xxhash.xxh3_64()
        self._sums: list[dict[str, str]] = []
        self.small: list[dict[str, Small]] = []
        """Of each rank's file, by name."""
        for rank in range(manifest.world_size):
            file = open_rank(directory, manifest, rank, SafetensorsFile)
            self.small.append(_small(file))
            self._sums.append(file.metadata)
        share = BUFFER_BYTES // (NUM_BUFFERS * manifest.world_size)
        block_bytes = min(_MAX_BLOCK_BYTES, share // BLOCK_BYTES * BLOCK_BYTES)
        wanted = self._ranges(manifest.tensors, kinds)
        self._files = [
            DirectReader(directory / entry.name, pool, block_bytes, ranges)
            for entry, ranges in zip(manifest.files, wanted, strict=True)
        ]

    def read(self, name: str, kind: str, start: int, numel: int) -> Iterator[memoryview]:
        """Bytes of elements start : start + numel of a parameter's `kind`.

        Each view is overwritten after the next one was asked for. Raises DamagedError where a checksum is wrong:
        nothing that was read of the tensor is then to be used. Raises ValueError where elements were left out.
        """
        if start and self._position != (name, kind, start):
            raise ValueError(f"{kind} of {name} is to be read from its first element to its last, not from {start}")
        end = start + numel
        for part in self._layout.overlaps(name, start, numel):
            low, high = max(start, part.start), min(end, part.start + part.numel)
            if low == part.start:
                self._sum = xxhash.xxh3_64()
            file = self._files[part.rank]
            for view in file.read(self._layout.byte(name, kind, part) + 4 * (low - part.start), 4 * (high - low)):
                self._sum.update(view)
                yield view
            self._position = (name, kind, high)
            if high == part.start + part.numel:
                self._compare(part.rank, f"{kind}|{name}")

    def _compare(self, rank: int, stored: str) -> None:
        found, want = self._sum.hexdigest(), self._sums[rank].get(stored)
        if found != want:
            raise DamagedError(wrong_sum(self._files[rank].path, stored, found, want))

    def _ranges(self, infos: Mapping[str, TensorInfo], kinds: Sequence[str]) -> list[list[tuple[int, int]]]:
        """(start, number of bytes) of these kinds in each file, ascending."""
        ranges: list[list[tuple[int, int]]] = [[] for _ in self._sums]
        for name, info in infos.items():
            for part in self._layout.overlaps(name, 0, info.numel):
                for kind in info.kinds:
                    if kind in kinds:
                        ranges[part.rank].append((self._layout.byte(name, kind, part), 4 * part.numel))
        return ranges

    def close(self) -> None:
        for file in self._files:
            file.close()


def _small(file: SafetensorsFile) -> dict[str, Small]:
    """Raises DamagedError where a checksum is wrong."""
    found = {}
    for name, entry in file.entries.items():
        if name.startswith(_PREFIXES):
            continue
        data = bytearray(entry.end - entry.start)
        file.read_into(name, memoryview(data))
        if (checksum := xxhash.xxh3_64_hexdigest(data)) != file.metadata.get(name):
            raise DamagedError(wrong_sum(file.path, name, checksum, file.metadata.get(name)))
        found[name] = Small(entry.dtype, entry.shape, bytes(data))
    return found

"""A checkpoint from its first tensor to its last, each byte compared with its checksum as it passes. Without torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import xxhash

from ofa_ds.checkpoint.format import KINDS, Part, piece_of
from ofa_ds.checkpoint.manifest import Manifest
from ofa_ds.checkpoint.rank_file import open_rank
from ofa_ds.checkpoint.writing import BUFFER_BYTES, Small
from ofa_ds.storage.direct import BLOCK_BYTES
from ofa_ds.storage.direct_reader import DirectReader
from ofa_ds.storage.open_files import OpenFiles, descriptor_share
from ofa_ds.storage.safetensors_file import DamagedError, SafetensorsFile, wrong_sum

_SUM = re.compile("[0-9a-f]{16}")
_PREFIXES = tuple(f"{kind}|" for kind in KINDS)
_MAX_BLOCK_BYTES = 1 << 19
"""Larger ones would read more of what lies between the weights."""
_BUFFERS = (2, 16)
"""Least and most blocks of a file in memory."""
_USEFUL_BLOCK_BYTES = 1 << 16
"""Rather fewer blocks than smaller ones."""


class CheckedStream:
    """Any number of files, in bounded memory: buffers of BUFFER_BYTES in all, 8 bytes for each checksum.

    Fastest where tensors are asked for in the manifest's order. For one thread.

    Each tensor is to be read from its first element to its last; in between, others may not be.
    """

    def __init__(self, directory: Path, manifest: Manifest, pool: Executor, kinds: Sequence[str] = KINDS) -> None:
        """kinds: what will be read. pool: reads there. Raises DamagedError: a header, or what is `small`, is wrong."""
        self._manifest = manifest
        self._layout = manifest.layout
        self._position = ("", "", 0)
        self._sum = xxhash.xxh3_64()
        ends = itertools.accumulate((len(info.kinds) for info in manifest.tensors.values()), initial=0)
        self._column = dict(zip(manifest.tensors, ends, strict=False))
        """Of the first kind of each tensor in `_sums`."""
        num_columns = sum(len(info.kinds) for info in manifest.tensors.values())
        self._sums = np.zeros((manifest.world_size, num_columns), np.uint64)
        self.small: list[dict[str, Small]] = []
        """Of each rank's file, by name."""
        for rank in range(manifest.world_size):
            file = open_rank(directory, manifest, rank, SafetensorsFile)
            self.small.append(_small(file))
            self._keep_sums(file, rank)
        share = BUFFER_BYTES // manifest.world_size
        num_buffers = min(max(share // _USEFUL_BLOCK_BYTES, _BUFFERS[0]), _BUFFERS[1])
        block_bytes = min(_MAX_BLOCK_BYTES, max(BLOCK_BYTES, share // num_buffers // BLOCK_BYTES * BLOCK_BYTES))
        opened = OpenFiles(descriptor_share(), direct=True)
        self._files = [
            DirectReader(
                directory / entry.name, pool, block_bytes, self._ranges(rank, kinds), num_buffers=num_buffers,
                files=opened,
            )
            for rank, entry in enumerate(manifest.files)
        ]  # fmt: skip

    def _keep_sums(self, file: SafetensorsFile, rank: int) -> None:
        for stored in file.entries:
            kind, _, name = stored.partition("|")
            if kind in KINDS:
                text = file.metadata.get(stored)
                if not isinstance(text, str) or not _SUM.fullmatch(text):
                    raise DamagedError(f"{file.path}: has no checksum of {stored}")
                column = self._column[name] + self._manifest.tensors[name].kinds.index(kind)
                self._sums[rank, column] = int(text, 16)

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
                self._compare(part.rank, name, kind)

    def _compare(self, rank: int, name: str, kind: str) -> None:
        column = self._column[name] + self._manifest.tensors[name].kinds.index(kind)
        found, want = self._sum.hexdigest(), f"{int(self._sums[rank, column]):016x}"
        if found != want:
            raise DamagedError(wrong_sum(self._files[rank].path, f"{kind}|{name}", found, want))

    def _ranges(self, rank: int, kinds: Sequence[str]) -> Iterator[tuple[int, int]]:
        """(start, number of bytes) of these kinds in a file, ascending."""
        for name, info in self._manifest.tensors.items():
            start, numel = piece_of(self._manifest.parts[name], info, rank, self._manifest.world_size)
            if numel:
                for kind in info.kinds:
                    if kind in kinds:
                        yield self._layout.byte(name, kind, Part(rank, start, numel)), 4 * numel

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

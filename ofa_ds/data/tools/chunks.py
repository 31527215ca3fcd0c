"""Shards in chunks of record batches, for work on all of their rows by several processes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ofa_ds.data.manifest import Manifest, read_manifest
from ofa_ds.data.shard_file import ShardFile, ShardFiles

CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """Record batches `first` ... `stop` - 1 of shard `number` of a family, about CHUNK_BYTES of them. Picklable."""

    folder: Path
    family: str
    number: int
    first: int
    stop: int
    num_bytes: int
    run: str
    """Of one command: what a process keeps open is of it alone."""

    @property
    def file(self) -> ShardFile:
        """Raises ValueError, RuntimeError, OSError where the manifest cannot be read, or not any more."""
        return _files(self.folder, self.family, self.run)[self.number]


def chunks_of(folder: Path, manifest: Manifest) -> Iterator[Chunk | RuntimeError | OSError]:
    """All of them, in order; in place of those of a file whose index is wrong, what is wrong with it."""
    run = secrets.token_hex(8)
    for family in manifest.families:
        for number, file in enumerate(ShardFiles(folder, manifest, family)):
            try:
                yield from _chunks(Chunk(folder, family, number, 0, 0, 0, run), file)
            except (RuntimeError, OSError) as error:
                yield error


def _chunks(like: Chunk, file: ShardFile) -> Iterator[Chunk]:
    ends = file.entries["byte_end"].tolist()
    first = start = 0
    for batch, end in enumerate(ends, 1):
        if end - start >= CHUNK_BYTES or batch == len(ends):
            yield Chunk(like.folder, like.family, like.number, first, batch, end - start, like.run)
            first, start = batch, end


@lru_cache(maxsize=16)
def _files(folder: Path, family: str, run: str) -> ShardFiles:
    return ShardFiles(folder, read_manifest(folder), family)

"""Writing a checkpoint of any number of ranks in one pass over a training state. Without torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ofa_ds.checkpoint.format import (
    MANIFEST,
    MAX_RANKS,
    Facts,
    Parts,
    TensorInfo,
    file_name,
    num_bytes_of,
    parts_of,
    payload_specs,
)
from ofa_ds.checkpoint.layout import Layout
from ofa_ds.checkpoint.manifest import manifest_of, write_manifest
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import check_space, new_directory
from ofa_ds.storage.direct import BLOCK_BYTES
from ofa_ds.storage.open_files import OpenFiles, descriptor_share
from ofa_ds.storage.tensor_writer import FileEntry, TensorSpec, TensorWriter

BUFFER_BYTES = 64 << 20
"""For all files that are read, and for all that are written."""
THREADS = 4
"""Of the pool that reads, and writes: they only wait for the disk."""
_MAX_STAGE_BYTES = 4 << 20
_MIB = 1 << 20


@dataclass(frozen=True)
class Small:
    """A tensor beside the parameters: a generator's state, or a buffer."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, self.dtype, self.shape, len(self.data))


class Source(Protocol):
    """A training state that is gone through once, in the order of its tensors."""

    tensors: Mapping[str, TensorInfo]
    buffers: Mapping[str, tuple[int, ...]]
    ema_buffers: Mapping[str, tuple[int, ...]]
    facts: Facts

    def views(self, name: str, kind: str) -> Iterator[memoryview]:
        """All bytes of a parameter's `kind`, in order; each view may be overwritten by the next one."""
        ...

    def small(self, rank: int, ranks: int) -> Mapping[str, Small]:
        """What the file of a rank of so many holds after the parameters."""
        ...


def write_files(destination: Path, source: Source, pool: Executor, *, ranks: int, stage: int) -> Path:
    """The checkpoint that `ranks` ranks at ZeRO `stage` would save, in the new directory `destination`.

    Atomic: it appears when all of it is durable. Memory: BUFFER_BYTES, and 8 bytes for each tensor of each file; open
    files: as many as the system lets be. Raises ValueError (it exists), OSError (the disk is full, noticed before
    writing where the system tells).
    """
    if not 0 < ranks <= MAX_RANKS:
        raise ValueError(f"{destination}: want 1 to {MAX_RANKS} ranks, got {ranks}")
    parts = parts_of(source.tensors, ranks, stage)
    with new_directory(destination) as partial:
        check_space(partial, num_bytes_of(source.tensors, ranks), ranks + 2)
        files = _write_ranks(partial, source, pool, parts=parts, ranks=ranks)
        manifest = manifest_of(
            source.tensors, parts, files=files, stage=stage, facts=source.facts, buffers=source.buffers,
            ema_buffers=source.ema_buffers,
        )  # fmt: skip
        write_manifest(partial / MANIFEST, manifest)
    return destination


def _write_ranks(partial: Path, source: Source, pool: Executor, *, parts: Parts, ranks: int) -> list[FileEntry]:
    layout, opened = Layout(source.tensors, parts, ranks), OpenFiles(descriptor_share(), direct=True)
    stage_bytes = min(_MAX_STAGE_BYTES, max(BLOCK_BYTES, BUFFER_BYTES // (2 * ranks) // BLOCK_BYTES * BLOCK_BYTES))
    payload = sum(4 * info.numel * len(info.kinds) for info in source.tensors.values())
    with ExitStack() as stack:
        files, small = [], [source.small(rank, ranks) for rank in range(ranks)]
        for rank in range(ranks):
            specs = _Specs(source.tensors, parts, rank, ranks, small[rank])
            path = partial / file_name(rank)
            files.append(
                stack.enter_context(TensorWriter(path, specs, stage_bytes=stage_bytes, pool=pool, files=opened))
            )
        meter = Progress(math.ceil(payload / _MIB), "writing", "MiB")
        stack.callback(meter.close)
        for name, info in source.tensors.items():
            shares = [(files[part.rank], 4 * part.numel) for part in layout.overlaps(name, 0, info.numel)]
            for kind in info.kinds:
                _deal(source.views(name, kind), shares)
                meter.add(4 * info.numel / _MIB)
        for file, each in zip(files, small, strict=True):
            for tensor in each.values():
                file.write(tensor.data)
        list(pool.map(TensorWriter.finish, files))  # each waits for its disk
    return [file.entry for file in files]


@dataclass(frozen=True)
class _Specs(Collection[TensorSpec]):
    """What a rank's file holds, made anew each time it is gone through: thousands of files have millions of them."""

    tensors: Mapping[str, TensorInfo]
    parts: Parts
    rank: int
    ranks: int
    small: Mapping[str, Small]

    def __iter__(self) -> Iterator[TensorSpec]:
        yield from payload_specs(self.tensors, self.parts, self.rank, self.ranks)
        yield from (each.spec(name) for name, each in self.small.items())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, spec: object) -> bool:
        return any(spec == each for each in self)


def _deal(views: Iterable[memoryview], shares: list[tuple[TensorWriter, int]]) -> None:
    """Give each file, in turn, as many bytes as are its own."""
    turns = iter(shares)
    left = 0
    for view in views:
        while view:
            if not left:
                file, left = next(turns)
            count = min(left, len(view))
            file.write(view[:count])
            view, left = view[count:], left - count

"""A training state that can be read piece by piece, wherever it comes from; and the one that is our checkpoint."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ofa_ds.checkpoint.format import Facts, TensorInfo, rng_prefix
from ofa_ds.checkpoint.manifest import Manifest
from ofa_ds.checkpoint.rank_file import open_rank
from ofa_ds.checkpoint.stream import CheckedStream
from ofa_ds.checkpoint.tensor_file import TensorFile, bytes_of
from ofa_ds.engine.partition import AVERAGE
from ofa_ds.storage.open_files import OpenFiles, descriptor_share
from ofa_ds.storage.safetensors_file import read_into

_OPEN_FILES = 64
_OPEN_HEADERS = 4
"""A header of the 6B has some 6,000 entries; 1,024 of them would not fit the memory that conversions promise."""


class TrainingState(Protocol):
    """What converters write, and what they give to be written. Names: docs/ofa.md, Model: names."""

    tensors: Mapping[str, TensorInfo]
    buffers: Mapping[str, tuple[int, ...]]
    """Shapes by name; so is `ema_buffers`, the moving average's own."""
    ema_buffers: Mapping[str, tuple[int, ...]]
    facts: Facts

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements start : start + numel of the flat tensor: fp32 [numel]."""
        ...

    def buffer(self, name: str) -> Tensor:
        """Whole, in its own dtype."""
        ...

    def ema_buffer(self, name: str) -> Tensor: ...

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Generator states (uint8) of a rank by name; empty where there are none."""
        ...


@dataclass(frozen=True, kw_only=True)
class ForeignState:
    """A training state read from another program's files."""

    tensors: Mapping[str, TensorInfo]
    buffers: Mapping[str, tuple[int, ...]]
    ema_buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    facts: Facts
    read: Callable[[str, str, int, int], Tensor]
    buffer: Callable[[str], Tensor]
    ema_buffer: Callable[[str], Tensor] = field(default=lambda name: torch.empty(0))

    def rng(self, rank: int) -> dict[str, Tensor]:
        return {}


class Reader:
    """Flat ranges of a checkpoint's tensors: the manifest says which bytes those are, and only they are read.

    Does not compare checksums (`verify` and `load` do that first). Not for two threads at once.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.layout = manifest.layout
        self.tensors = manifest.tensors
        self.buffers = manifest.buffers
        self.ema_buffers = manifest.ema_buffers
        self.facts = manifest.facts
        self._files = OpenFiles(min(_OPEN_FILES, descriptor_share()), direct=False)
        self._headers: OrderedDict[int, TensorFile] = OrderedDict()

    @property
    def has_average(self) -> bool:
        """Whether there is a moving average of every trainable parameter."""
        infos = self.tensors.values()
        return any(AVERAGE in info.kinds for info in infos) and all(
            AVERAGE in info.kinds for info in infos if info.trainable
        )

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements start : start + numel of `kind` (weight, exp_avg, ...) of a parameter: fp32 [numel]."""
        result = torch.empty(numel)
        buffer = bytes_of(result)
        for part in self.layout.overlaps(name, start, numel):
            low, high = max(start, part.start), min(start + numel, part.start + part.numel)
            at = self.layout.byte(name, kind, part) + 4 * (low - part.start)
            target = buffer[4 * (low - start) : 4 * (high - start)]
            with self._files.use(self._path(part.rank), os.O_RDONLY | os.O_NOFOLLOW) as descriptor:
                read_into(descriptor, target, at, self._path(part.rank))
        return result

    def buffer(self, name: str) -> Tensor:
        return self.file(0).read(f"buffer|{name}")

    def ema_buffer(self, name: str) -> Tensor:
        return self.file(0).read(f"ema_buffer|{name}")

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Generator states of rank `rank` of the run that trained it, however the checkpoint was cut since."""
        file = self.file(rank % self.manifest.world_size)
        prefix = rng_prefix(rank, self.manifest.world_size)
        return {name.removeprefix(prefix): file.read(name) for name in file.names() if name.startswith(prefix)}

    def file(self, rank: int) -> TensorFile:
        """A rank's file with its header read and checked."""
        if rank not in self._headers:
            self._headers[rank] = open_rank(self.directory, self.manifest, rank, TensorFile)
            if len(self._headers) > _OPEN_HEADERS:
                self._headers.popitem(last=False)
        return self._headers[rank]

    def _path(self, rank: int) -> Path:
        return self.directory / self.manifest.files[rank].name


class StreamReader(Reader):
    """Compares checksums as it goes: what has read a tensor from its first element to its last knows that it is right.

    Until then `read` may raise DamagedError, and nothing of the tensor is to be relied on.
    """

    def __init__(self, directory: Path, manifest: Manifest, stream: CheckedStream) -> None:
        super().__init__(directory, manifest)
        self._stream = stream

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        result = torch.empty(numel)
        buffer = bytes_of(result)
        for view in self._stream.read(name, kind, start, numel):
            buffer[: len(view)] = view
            buffer = buffer[len(view) :]
        return result

"""Writes one safetensors file, tensor by tensor, from bytes that need not all be in memory at once.

    8 bytes: length of the header | header, JSON, spaces | bytes of the tensors, in the order of the header

The spaces fill a block of the disk. Knows no torch: the process that writes checkpoints in the background
(`background_writer.py`) starts in a tenth of a second and stays small.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from ofa_ds.storage.direct import BLOCK_BYTES
from ofa_ds.storage.direct_file import DirectFile
from ofa_ds.storage.open_files import OpenFiles


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: str
    """safetensors' name, such as F32."""
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class FileEntry:
    """A file that was written, as a manifest lists it."""

    name: str
    bytes: int
    header_bytes: int
    header_xxh3_128: str
    """Checksum of the header, which holds the checksums of the tensors."""


class TensorWriter:
    """`with TensorWriter(path, specs) as file: file.write(bytes) ...`, then `file.entry` is for the manifest.

    The bytes come in the order of `specs`, in pieces of any size that do not cross a tensor's end. The header takes the
    checksum of each tensor (xxh3-64, in safetensors' `__metadata__`), so it is written last, in the place kept for it.
    The manifest has the header's own checksum: together they cover every byte, and each tensor can be checked alone.
    """

    def __init__(
        self,
        path: Path,
        specs: Collection[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        *,
        stage_bytes: int | None = None,
        pool: Executor | None = None,
        files: OpenFiles | None = None,
    ) -> None:
        """metadata: for `__metadata__`, in place of checksums. stage_bytes, pool, files: as `DirectFile` takes them.

        Raises FileExistsError; OSError: the disk is full.
        """
        self.path = path
        self._metadata = metadata
        self._specs = specs
        self._sums = array("Q")
        self._whole = ""
        self._turns = iter(specs)
        self._header_bytes = len(self._header([0] * len(specs)))
        self._file = DirectFile(path, 8 + self._header_bytes, stage_bytes=stage_bytes, pool=pool, files=files)
        self._turn()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        """Add bytes to the tensor whose turn it is."""
        if not len(data):
            return
        if len(data) > self._left:
            raise ValueError(f"{self.path}: {len(data)} bytes for a tensor that lacks {self._left}")
        self._sum.update(data)
        self._left -= len(data)
        self._file.write(data)
        if not self._left:
            self._sums.append(self._sum.intdigest())
            self._turn()

    @property
    def entry(self) -> FileEntry:
        """For the manifest."""
        return FileEntry(self.path.name, self._file.size, self._header_bytes, self._whole)

    def _turn(self) -> None:
        """To the next tensor that has bytes; those without are complete."""
        self._sum = xxhash.xxh3_64()
        self._now: TensorSpec | None = None
        self._left = 0
        for spec in self._turns:
            if spec.num_bytes:
                self._now, self._left = spec, spec.num_bytes
                return
            self._sums.append(self._sum.intdigest())

    def finish(self) -> None:
        """Write the header and make the file durable, once. Raises ValueError: bytes are missing."""
        if self._whole:
            return
        if self._now is not None:
            raise ValueError(f"{self.path}: {self._now.name} lacks {self._left} bytes")
        header = self._header(self._sums)
        self._whole = xxhash.xxh3_128_hexdigest(header)
        self._file.finish(len(header).to_bytes(8, "little") + header)

    def _header(self, sums: Sequence[int]) -> bytes:
        """Always of the same length, whatever the sums."""
        own = {spec.name: f"{value:016x}" for spec, value in zip(self._specs, sums, strict=True)}
        header: dict[str, Any] = {"__metadata__": own if self._metadata is None else dict(self._metadata)}
        end = 0
        for spec in self._specs:
            start, end = end, end + spec.num_bytes
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        return text + b" " * (-(8 + len(text)) % BLOCK_BYTES)

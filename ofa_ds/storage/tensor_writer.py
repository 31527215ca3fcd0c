"""Writes one safetensors file, tensor by tensor, from bytes that need not all be in memory at once.

    8 bytes: length of the header | header, JSON, spaces | bytes of the tensors, in the order of the header

The spaces fill a block of the disk. Knows no torch: the process that writes checkpoints in the background
(`background_writer.py`) starts in a tenth of a second and stays small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from ofa_ds.storage.direct_file import BLOCK_BYTES, DirectFile

_NO_SUM = "0" * 16


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
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        *,
        stage_bytes: int | None = None,
        pool: Executor | None = None,
    ) -> None:
        """metadata: for `__metadata__`, in place of checksums. stage_bytes, pool: as `DirectFile` takes them.

        Raises FileExistsError; OSError: the disk is full.
        """
        self.path = path
        self._metadata = metadata
        self._specs = specs
        self._sums: list[str] = []
        self._sum = xxhash.xxh3_64()
        self._left = specs[0].num_bytes if specs else 0
        self._header_bytes = len(self._header([_NO_SUM] * len(specs)))
        self._file = DirectFile(path, 8 + self._header_bytes, stage_bytes=stage_bytes, pool=pool)
        self._finish_tensors()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
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
        self._finish_tensors()

    @property
    def entry(self) -> FileEntry:
        """For the manifest."""
        return FileEntry(self.path.name, self._file.size, self._header_bytes, self._whole)

    def _finish_tensors(self) -> None:
        """Close every tensor that is complete, empty ones too."""
        while not self._left and len(self._sums) < len(self._specs):
            self._sums.append(self._sum.hexdigest())
            self._sum = xxhash.xxh3_64()
            if len(self._sums) < len(self._specs):
                self._left = self._specs[len(self._sums)].num_bytes

    def _finish(self) -> None:
        if len(self._sums) < len(self._specs):
            raise ValueError(f"{self.path}: {self._specs[len(self._sums)].name} lacks {self._left} bytes")
        header = self._header(self._sums)
        self._whole = xxhash.xxh3_128_hexdigest(header)
        self._file.finish(len(header).to_bytes(8, "little") + header)

    def _header(self, sums: Sequence[str]) -> bytes:
        """Always of the same length, whatever the sums."""
        own = {spec.name: value for spec, value in zip(self._specs, sums, strict=True)}
        header: dict[str, Any] = {"__metadata__": own if self._metadata is None else dict(self._metadata)}
        end = 0
        for spec in self._specs:
            start, end = end, end + spec.num_bytes
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        return text + b" " * (-(8 + len(text)) % BLOCK_BYTES)

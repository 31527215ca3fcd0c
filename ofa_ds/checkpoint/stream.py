"""A checkpoint from its first tensor to its last, each byte compared with its checksum as it passes. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ofa_ds.checkpoint.format import KINDS, Manifest
from ofa_ds.checkpoint.layout import Layout
from ofa_ds.storage.direct_reader import DirectReader
from ofa_ds.storage.safetensors_file import DamagedError, SafetensorsFile, wrong_sum
from ofa_ds.storage.tensor_writer import TensorSpec

_KINDS = tuple(f"{kind}|" for kind in KINDS)


@dataclass(frozen=True)
class Small:
    """A tensor beside the parameters: a generator's state, or a buffer."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, self.dtype, self.shape, len(self.data))


class CheckedStream:
    """Holds all files open. Fastest where tensors are asked for in the manifest's order. For one thread."""

    def __init__(self, directory: Path, manifest: Manifest, pool: Executor, block_bytes: int) -> None:
        """pool, block_bytes: of the `DirectReader` of each file. Raises DamagedError: a header is wrong."""
        self._layout = Layout(manifest)
        self._sums: list[dict[str, str]] = []
        self.small: list[dict[str, Small]] = []
        """Of each rank's file, by name."""
        for entry in manifest["files"]:
            path = directory / entry["name"]
            file = SafetensorsFile(path, num_bytes=entry["bytes"], header_xxh3_128=entry["header_xxh3_128"])
            self.small.append(_small(file))
            self._sums.append(file.metadata)
        self._files = [DirectReader(directory / entry["name"], pool, block_bytes) for entry in manifest["files"]]

    def read(self, name: str, kind: str, numel: int) -> Iterator[memoryview]:
        """All bytes of a parameter's `kind`; each view is overwritten after the next one was asked for.

        Raises DamagedError where a checksum is wrong: nothing of what was yielded is then to be used.
        """
        for part in self._layout.overlaps(name, 0, numel):
            file, found = self._files[part.rank], xxhash.xxh3_64()
            for view in file.read(self._layout.byte(name, kind, part), 4 * part.numel):
                found.update(view)
                yield view
            stored = f"{kind}|{name}"
            want = self._sums[part.rank].get(stored)
            if found.hexdigest() != want:
                raise DamagedError(wrong_sum(file.path, stored, found.hexdigest(), want))

    def close(self) -> None:
        for file in self._files:
            file.close()


def _small(file: SafetensorsFile) -> dict[str, Small]:
    """Raises DamagedError where a checksum is wrong."""
    names = [name for name in file.names() if not name.startswith(_KINDS)]
    for problem in file.check(names):
        raise DamagedError(problem)
    found = {}
    for name in names:
        entry = file.entry(name)
        data = bytearray(entry.end - entry.start)
        file.read_into(name, memoryview(data))
        found[name] = Small(entry.dtype, entry.shape, bytes(data))
    return found

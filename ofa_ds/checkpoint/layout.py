"""Where a manifest puts each element: file and byte. Arithmetic only; reads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Overlap:
    """Elements of a tensor in one rank's file."""

    rank: int
    start: int
    """First of the tensor's elements in this file."""
    numel: int


class Layout:
    """Where the manifest puts each element: file and byte. Arithmetic only; reads nothing."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self.world_size: int = manifest["world_size"]
        self._files = manifest["files"]
        tensors = manifest["tensors"].values()
        self._index = {name: k for k, name in enumerate(manifest["tensors"])}
        self._kinds = {name: tuple(tensor["kinds"]) for name, tensor in manifest["tensors"].items()}
        self._totals = np.array([math.prod(tensor["shape"]) for tensor in tensors], dtype=np.int64)
        self._bytes = np.array([4 * len(tensor["kinds"]) for tensor in tensors], dtype=np.int64)
        self._even = np.array([tensor["parts"] == "even" for tensor in tensors], dtype=bool)
        self._parts = {
            name: [Overlap(*part) for part in tensor["parts"]]
            for name, tensor in manifest["tensors"].items()
            if tensor["parts"] != "even"
        }
        self._listed: list[list[tuple[int, int]]] = [[] for _ in range(self.world_size)]
        for name, parts in self._parts.items():
            for part in parts:
                self._listed[part.rank].append((self._index[name], part.numel))
        self._ends: dict[int, np.ndarray] = {}

    def begin(self, rank: int) -> int:
        """First byte after the header of a rank's file."""
        return 8 + self._files[rank]["header_bytes"]

    def num_bytes(self, rank: int) -> int:
        """Bytes of a rank's pieces of all parameters."""
        ends = self._ends_of(rank)
        return int(ends[-1]) if len(ends) else 0

    def overlaps(self, name: str, start: int, numel: int) -> list[Overlap]:
        """The parts that hold elements start : start + numel of a tensor."""
        if not numel:
            return []
        end = start + numel
        if name in self._parts:
            return [part for part in self._parts[name] if part.start < end and part.start + part.numel > start]
        total = int(self._totals[self._index[name]])
        part = -(-total // self.world_size)
        ranks = range(start // part, -(-end // part))
        return [Overlap(rank, rank * part, min(part, total - rank * part)) for rank in ranks]

    def byte(self, name: str, kind: str, part: Overlap) -> int:
        """The byte of that rank's file at which its part of `kind` starts. Raises ValueError: there is no such kind."""
        kinds = self._kinds[name]
        if kind not in kinds:
            raise ValueError(f"the checkpoint has no {kind} of {name}")
        index = self._index[name]
        end = int(self._ends_of(part.rank)[index])
        return self.begin(part.rank) + end - 4 * part.numel * (len(kinds) - kinds.index(kind))

    def _ends_of(self, rank: int) -> np.ndarray:
        """[tensors] byte after each one's pieces in a rank's file, counted from the end of the header."""
        if rank not in self._ends:
            part = -(-self._totals // self.world_size)
            numel = np.where(self._even, np.clip(self._totals - rank * part, 0, part), 0)
            for index, count in self._listed[rank]:
                numel[index] = count
            self._ends[rank] = np.cumsum(numel * self._bytes)
        return self._ends[rank]

"""Where a manifest puts each element: file and byte. Arithmetic only; reads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ofa_ds.checkpoint.format import Part, Parts, TensorInfo


class Layout:
    """Where a manifest puts each element: file and byte. Arithmetic only; reads nothing."""

    def __init__(
        self, tensors: Mapping[str, TensorInfo], parts: Parts, world_size: int, *, header_bytes: Sequence[int] = ()
    ) -> None:
        """header_bytes: of each file; without them nobody may ask for bytes."""
        self.world_size = world_size
        self._header_bytes = header_bytes
        self._index = {name: k for k, name in enumerate(tensors)}
        self._kinds = {name: info.kinds for name, info in tensors.items()}
        self._totals = np.array([info.numel for info in tensors.values()], dtype=np.int64)
        self._bytes = np.array([4 * len(info.kinds) for info in tensors.values()], dtype=np.int64)
        self._even = np.array([parts[name] == "even" for name in tensors], dtype=bool)
        self._parts = {name: cut for name, cut in parts.items() if not isinstance(cut, str)}
        self._listed: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
        for name, cut in self._parts.items():
            for part in cut:
                self._listed[part.rank].append((self._index[name], part.numel))
        self._ends: dict[int, np.ndarray] = {}

    def begin(self, rank: int) -> int:
        """First byte after the header of a rank's file."""
        return 8 + self._header_bytes[rank]

    def sizes(self) -> list[int]:
        """Bytes of each rank's pieces of all parameters; quick for any number of ranks and tensors."""
        totals, item_bytes = self._totals[self._even], self._bytes[self._even]
        share = np.maximum(-(-totals // self.world_size), 1)
        full = totals // share  # ranks 0 ... full - 1 hold a whole share, the next one the rest
        change = np.zeros(self.world_size + 1, dtype=np.int64)
        change[0] = np.sum(share * item_bytes)
        np.subtract.at(change, full, share * item_bytes)
        sizes = np.cumsum(change)
        np.add.at(sizes, full, (totals - full * share) * item_bytes)
        for rank, listed in enumerate(self._listed):
            sizes[rank] += sum(numel * int(self._bytes[index]) for index, numel in listed)
        return sizes[: self.world_size].tolist()

    def overlaps(self, name: str, start: int, numel: int) -> list[Part]:
        """The parts that hold elements start : start + numel of a tensor."""
        if not numel:
            return []
        end = start + numel
        if name in self._parts:
            return [part for part in self._parts[name] if part.start < end and part.start + part.numel > start]
        total = int(self._totals[self._index[name]])
        part = -(-total // self.world_size)
        ranks = range(start // part, -(-end // part))
        return [Part(rank, rank * part, min(part, total - rank * part)) for rank in ranks]

    def byte(self, name: str, kind: str, part: Part) -> int:
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

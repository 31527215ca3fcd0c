"""Rows of one Arrow file, read column by column from where its index says that the buffers are.

Why not by the library's own row access: see `python -m ofa_ds.bench data` and its figures in `ofa_ds/docs/reading.md`.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np

from ofa_ds.data.batch_index import BatchIndex, entry_type
from ofa_ds.data.columns import KEPT, SCHEMAS, from_columns
from ofa_ds.data.manifest import MANIFEST, ConvertedManifest, Manifest, Shard
from ofa_ds.data.old_index import OldIndex
from ofa_ds.data.open_file import MappedFile, OpenFile
from ofa_ds.data.row_reader import Data, ReadRow, reader

MAX_OPEN = 4096
"""Files that one reader holds mapped; the one opened first goes. Each has a descriptor: see `MapPool`."""

_PLACES_AT = 24
"""Byte of an entry at which its places begin."""

_NOTHING = memoryview(b"")


class MapPool:
    """Which files of a reader are mapped: so many, and no more than the process may have open."""

    def __init__(self) -> None:
        self._mapped: deque[ref[ShardFile]] = deque()

    def add(self, file: ShardFile) -> None:
        """A thread that reads in one that is forgotten goes on reading: it holds the mapping itself."""
        self._mapped.append(ref(file))
        while len(self._mapped) > MAX_OPEN:
            if (oldest := self._mapped.popleft()()) is not None:
                oldest.forget()


class ShardFile:
    """Rows of one Arrow file. Kept are the mapping of the file and its entries in the index, and no Arrow object.

    Safe to use from several threads and after a fork: what is filled in when first asked for never changes.
    """

    def __init__(
        self, path: Path, family: str, shard: Shard, entries: Callable[[], memoryview], pool: MapPool | None = None
    ) -> None:
        """entries: gives the bytes of the shard's entries in the index. pool: of all files of a directory."""
        self.path, self.family, self.shard = path, family, shard
        self.num_rows, self.num_batches = shard.rows, shard.batches
        self._entries_of, self._pool = entries, pool or MapPool()
        self._raw = self._longs = _NOTHING
        self._file: MappedFile | None = None
        self._row = reader(family)
        self._words = entry_type(family).itemsize // 8
        self._places = struct.Struct(f"<{sum(len(KEPT[kind]) for kind in SCHEMAS[family].types)}I")
        self._checked: set[int] = set()

    def _load(self) -> memoryview:
        """The entries as u8 numbers: `_words` each, of which the first are rows_end, byte_end, xxh3."""
        self._raw = self._entries_of()
        self._longs = self._raw.cast("Q")
        return self._longs

    @property
    def entries(self) -> np.ndarray:
        """Of its record batches, as `batch_index.entry_type` has them. Raises as `row` does."""
        self._longs or self._load()
        return np.frombuffer(self._raw, entry_type(self.family))

    def row(self, i: int, verify: bool = False) -> dict[str, Any]:
        """Raises RuntimeError that names the file where it is damaged, cut, or not the manifest's; OSError.

        verify: compare the record batch with its checksum when it is first touched.
        """
        return from_columns(self.family, self._read(i, self._row, verify))

    def fields(self, i: int, names: Collection[str]) -> dict[str, Any]:
        """Some columns of row `i`, as they are stored. Raises as `row` does, KeyError for a column that is not here."""
        return self._read(i, reader(self.family, tuple(names)), verify=False)

    def _read(self, i: int, read: ReadRow, verify: bool) -> dict[str, Any]:
        batch = self.batch_of(i)
        if verify and batch not in self._checked:
            self._check(batch)
        (first, start), (_, end) = self._place(batch - 1), self._place(batch)
        data, ints, base = self.batch_bytes(batch)
        places = self._places.unpack_from(self._raw, 8 * self._words * batch + _PLACES_AT)
        try:
            return read(data, ints, base, base + end - start, places, i - first)
        except (IndexError, ValueError, struct.error) as error:
            what = "its text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise RuntimeError(f"{self.path}: row {i}: damaged: {what}; copy or build it again") from error

    def batch_of(self, i: int) -> int:
        """Number of the record batch that row `i` is in. Raises as `row` does."""
        longs, words = self._longs or self._load(), self._words
        batch = i // longs[0]  # most often all batches but the last have as many rows as the first
        if batch < self.num_batches and (longs[words * (batch - 1)] if batch else 0) <= i < longs[words * batch]:
            return batch
        return bisect_right(range(self.num_batches), i, key=lambda k: longs[words * k])

    def rows_of(self, batch: int) -> range:
        """The rows of a batch."""
        self._longs or self._load()
        return range(self._place(batch - 1)[0], self._place(batch)[0])

    def _place(self, batch: int) -> tuple[int, int]:
        """(rows_end, byte_end) of a batch; zeros before the first."""
        at = self._words * batch
        return (self._longs[at], self._longs[at + 1]) if batch >= 0 else (0, 0)

    def batch_bytes(self, batch: int) -> tuple[Data, memoryview, int]:
        """(what holds the bytes of a batch, the same as int32, at which byte of it the batch begins).

        Raises RuntimeError where the file is not as long as the manifest says, OSError.
        """
        file = self._file or self._map()
        file.check_size()
        return file.data, file.ints, self._place(batch - 1)[1]

    def _map(self) -> MappedFile:
        self._file = file = MappedFile(self.path, self.shard.num_bytes, MANIFEST)
        self._pool.add(self)
        return file

    def forget(self) -> None:
        """The mapping goes when the last reader in it is done."""
        self._file = None

    def rows_of_types(self, types: Collection[str], start: int) -> Iterator[int]:
        """Numbers of the rows from `start` on whose type column has one of these. Raises as `row` does."""
        wanted = {kind.encode() for kind in types}
        at = sum(len(KEPT[field.type]) for field in takewhile(lambda field: field.name != "type", SCHEMAS[self.family]))
        for batch in range(self.batch_of(start) if start < self.num_rows else self.num_batches, self.num_batches):
            (first, byte_start), (stop, byte_end) = self._place(batch - 1), self._place(batch)
            data, ints, base = self.batch_bytes(batch)
            ends_at, text_at = self._places.unpack_from(self._raw, 8 * self._words * batch + _PLACES_AT)[at : at + 2]
            ends = ints[base + ends_at >> 2 :][: stop - first + 1].tolist()
            if len(ends) != stop - first + 1 or not 0 <= ends[0] <= ends[-1] <= byte_end - byte_start - text_at:
                raise RuntimeError(
                    f"{self.path}: row {first}: damaged: its types are elsewhere; copy or build it again"
                )
            text = data[base + text_at : base + text_at + ends[-1]]
            for i in range(max(start - first, 0), stop - first):
                if text[ends[i] : ends[i + 1]] in wanted:
                    yield first + i

    def _check(self, batch: int) -> None:
        if problem := self.checksum_problem(batch):
            raise RuntimeError(f"{problem}; copy or build the shards again")
        self._checked.add(batch)

    def checksum_problem(self, batch: int) -> str | None:
        """What is wrong with the bytes of a batch, the header with the first; one past the last is the footer."""
        self._longs or self._load()
        start = self._place(batch - 1)[1]
        if batch == self.num_batches:
            stop, want, what = self.shard.num_bytes, self.shard.footer_xxh3, "the footer"
        else:
            stop, want = self._place(batch)[1], f"{self._longs[self._words * batch + 2]:016x}"
            what = f"record batch {batch} (rows {self._place(batch - 1)[0]} ... {self._place(batch)[0] - 1})"
        got = f"{OpenFile(self.path, self.shard.num_bytes, MANIFEST).xxh3_64(start, stop):016x}"
        if got == want:
            return None
        return f"{self.path}: {what} has checksum {got}, want {want}"


class ShardFiles(Sequence[ShardFile]):
    """Those of a family. Nothing is opened, nor an object made, before it is asked for."""

    def __init__(self, folder: Path, manifest: Manifest, family: str, pool: MapPool | None = None) -> None:
        self._folder, self._family, self._pool = folder, family, pool or MapPool()
        self._shards = manifest.families[family].shards
        self._index: BatchIndex | OldIndex = BatchIndex(folder, family, self._shards)
        if isinstance(manifest, ConvertedManifest):
            self._index = OldIndex(folder, family, manifest.old_shards[family])
        self._files: list[ShardFile | None] = [None] * len(self._shards)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> ShardFile:
        return self._files[number] or self._make(number)

    def _make(self, number: int) -> ShardFile:
        shard, entries = self._shards[number], partial(self._index.entries, number)
        self._files[number] = file = ShardFile(self._folder / shard.file, self._family, shard, entries, self._pool)
        return file

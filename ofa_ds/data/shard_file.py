"""Rows of one Arrow file, read column by column from where its index says that the buffers are.

Why not by the library's own row access: see `python -m ofa_ds.bench rows` and its figures in `ofa_ds/docs/reading.md`.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import Any, Protocol
from weakref import ref

import numpy as np

from ofa_ds.data.announcing import announce_batch, announce_row
from ofa_ds.data.arrow_layout import layout_problem
from ofa_ds.data.batch_index import BatchIndex, entry_reader, entry_type
from ofa_ds.data.columns import KEPT, SCHEMAS
from ofa_ds.data.corrupt import CorruptRecord
from ofa_ds.data.manifest import MANIFEST, ConvertedManifest, Manifest, Shard
from ofa_ds.data.old_index import OldIndex
from ofa_ds.data.open_file import MappedFile, OpenFile
from ofa_ds.data.row_reader import Data, ReadRow, reader
from ofa_ds.storage.open_files import descriptor_share

MAX_OPEN = 4096
"""Files that one reader holds mapped, each with a descriptor; the one opened first goes."""

_NOTHING = memoryview(b"")
_NOWHERE = (0, 0, 0)


class MapPool:
    """Which files of a reader are mapped: no more than `MAX_OPEN`, and half of what the process may have open."""

    def __init__(self) -> None:
        self._mapped: deque[ref[ShardFile]] = deque()
        self._most = min(MAX_OPEN, descriptor_share())

    def add(self, file: ShardFile) -> None:
        """A thread that reads in one that is forgotten goes on reading: it holds the mapping itself."""
        self._mapped.append(ref(file))
        while len(self._mapped) > self._most:
            if (oldest := self._mapped.popleft()()) is not None:
                oldest.forget()

    def forget(self) -> None:
        """All of them: none of their pages counts as this process's memory any more."""
        while self._mapped:
            if (file := self._mapped.popleft()()) is not None:
                file.forget()


class ShardFile:
    """Rows of one Arrow file. Kept are the mapping of the file and its entries in the index, and no Arrow object.

    Safe to use from several threads and after a fork: what is filled in when first asked for never changes.
    """

    __slots__ = (
        "path", "location", "family", "shard", "num_rows", "num_batches", "_entries_of", "_pool", "_raw", "_longs",
        "_file", "_row", "_entry", "_checked", "__weakref__",
    )  # fmt: skip

    def __init__(
        self, path: Path, family: str, shard: Shard, entries: Callable[[], memoryview], pool: MapPool | None = None
    ) -> None:
        """entries: gives the bytes of the shard's entries in the index. pool: of all files of a directory."""
        self.path, self.family, self.shard = path, family, shard
        self.location = str(path)
        """As messages name it."""
        self.num_rows, self.num_batches = shard.rows, shard.batches
        self._entries_of, self._pool = entries, pool or MapPool()
        self._raw = self._longs = _NOTHING
        self._file: MappedFile | None = None
        self._row, self._entry = reader(family), entry_reader(family)
        self._checked: set[int] = set()

    def _load(self) -> memoryview:
        """The entries as u8 numbers: `words` each, of which the first are rows_end, byte_end, xxh3."""
        raw = self._entries_of()
        self._raw, self._longs = raw, raw.cast("Q")
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
        return self._read(i, self._row, verify)

    def fields(self, i: int, names: Collection[str]) -> dict[str, Any]:
        """Some columns of row `i`, as they are stored. Raises as `row` does, KeyError for a column that is not here."""
        return self._read(i, reader(self.family, tuple(names)), verify=False)

    def _read(self, i: int, read: ReadRow, verify: bool) -> dict[str, Any]:
        longs = self._longs or self._load()
        batch = i // longs[0]  # most often all batches but the last have as many rows as the first
        entry = self._entry(self._raw, batch) if batch < self.num_batches else _NOWHERE
        if not entry[0] <= i < entry[2]:
            batch = self.batch_of(i)
            entry = self._entry(self._raw, batch)
        if verify and batch not in self._checked:
            self._check(batch)
        data, ints, base = self.batch_bytes(batch, entry[1])
        try:
            return read(data, ints, base, entry, i)
        except (IndexError, ValueError, struct.error) as error:
            what = "its text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise CorruptRecord(f"{self.location}: row {i}: damaged: {what}; copy or build it again") from error

    def batch_of(self, i: int) -> int:
        """Number of the record batch that row `i` is in. Raises as `row` does."""
        longs, words = self._longs or self._load(), entry_type(self.family).itemsize // 8
        return bisect_right(range(self.num_batches), i, key=lambda k: longs[words * k])

    def rows_of(self, batch: int) -> range:
        """The rows of a record batch. Raises as `row` does."""
        first, _, stop, *_ = self._entry_of(batch)
        return range(first, stop)

    def bytes_of(self, batch: int) -> range:
        """The bytes of a record batch in the file; one past the last is the footer. Raises as `row` does."""
        if batch == self.num_batches:
            return range(self.bytes_of(batch - 1).stop, self.shard.num_bytes)
        _, start, _, end, *_ = self._entry_of(batch)
        return range(start, end)

    def _entry_of(self, batch: int) -> tuple[int, ...]:
        self._longs or self._load()
        return self._entry(self._raw, batch)

    def batch_bytes(self, batch: int, start: int) -> tuple[Data, memoryview, int]:
        """(what holds the bytes of a batch, the same as int32, at which byte of it the batch begins).

        start: the same in the file. Raises RuntimeError where the file is not as long as the manifest says, OSError.
        """
        file = self._file or self._map()
        if file.data.size() != file.size:
            raise file.wrong_size()
        return file.data, file.ints, start

    def announce(self, i: int) -> Callable[[], None] | None:
        """Have the system read what row `i` needs, without waiting. -> what to call for the rest of it, best later.

        The rest is its picture: where that is has to be read first. Raises as `row` does.
        """
        entry = self._entry_of(batch := self.batch_of(i))
        data, ints, base = self.batch_bytes(batch, entry[1])
        if announce_batch(data, base, entry, self.family):
            return partial(announce_row, data, ints, base, entry, self.family, i)
        return None

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
        for batch in range(self.batch_of(start), self.num_batches):
            for i, kind in zip(self.rows_of(batch), self.types_in(batch), strict=True):
                if kind in wanted and i >= start:
                    yield i

    def types_in(self, batch: int) -> list[bytes]:
        """The type column of a record batch. Raises as `row` does."""
        before = takewhile(lambda field: field.name != "type", SCHEMAS[self.family])
        at = 4 + sum(len(KEPT[field.type]) for field in before)
        first, byte_start, stop, byte_end, *_ = entry = self._entry_of(batch)
        data, ints, base = self.batch_bytes(batch, byte_start)
        ends_at, text = entry[at], base + entry[at + 1]
        ends = ints[base + ends_at >> 2 :][: stop - first + 1].tolist()
        if len(ends) != stop - first + 1 or not 0 <= ends[0] <= ends[-1] <= base + byte_end - byte_start - text:
            raise RuntimeError(f"{self.location}: row {first}: damaged: its type is not there; copy or build it again")
        types_text = data[text : text + ends[-1]]
        return [types_text[a:b] for a, b in pairwise(ends)]

    def _check(self, batch: int) -> None:
        if problem := self.checksum_problem(batch):
            raise CorruptRecord(f"{problem}; copy or build the shards again")
        self._checked.add(batch)

    def checksum_problem(self, batch: int) -> str | None:
        """What is wrong with the bytes of a batch, the header with the first; one past the last is the footer.

        A batch whose buffers Arrow finds elsewhere than the index is wrong too.
        """
        where = self.bytes_of(batch)
        if batch < self.num_batches:
            want, rows = int(self.entries["xxh3"][batch]), self.rows_of(batch)
            what = f"record batch {batch} (rows {rows.start} ... {rows.stop - 1})"
        else:
            want, what = int(self.shard.footer_xxh3, 16), "the footer"
        file = self._opened()
        if (got := file.xxh3_64(where.start, where.stop)) != want:
            return f"{self.path}: {what} has checksum {got:016x}, want {want:016x}"
        if batch < self.num_batches:
            found = layout_problem(file.read, self.family, self._entry_of(batch))
            return found and f"{self.path}: {what}: {found}"
        return None

    def _opened(self) -> Checked:
        return OpenFile(self.path, self.shard.num_bytes, MANIFEST)


class Checked(Protocol):
    """What checksums are taken of: bytes of a file, by their places in it."""

    def read(self, start: int, size: int) -> bytes: ...

    def xxh3_64(self, start: int, stop: int) -> int: ...


class ShardFiles(Sequence[ShardFile]):
    """Those of a family. Nothing is opened, nor an object made, before it is asked for."""

    def __init__(
        self, folder: Path, manifest: Manifest, family: str, pool: MapPool | None = None,
        make: MakeFile | None = None,
    ) -> None:  # fmt: skip
        """make: makes each, where they are not files of this machine."""
        self._folder, self._family, self._pool = folder, family, pool or MapPool()
        self._make_file = make or partial(_local, self._pool)
        self._shards = manifest.families[family].shards
        self._index: BatchIndex | OldIndex = BatchIndex(folder, family, self._shards)
        if isinstance(manifest, ConvertedManifest):
            self._index = OldIndex(folder, family, manifest.old_shards[family])
        self.row_ends = list(accumulate(shard.rows for shard in self._shards))
        self.num_rows = self.row_ends[-1]
        self.open: list[ShardFile | None] = [None] * len(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> ShardFile:
        return self.open[number] or self._make(number)

    def _make(self, number: int) -> ShardFile:
        shard, entries = self._shards[number], partial(self._index.entries, number)
        self.open[number] = file = self._make_file(self._folder / shard.file, self._family, shard, entries)
        return file


MakeFile = Callable[[Path, str, Shard, Callable[[], memoryview]], ShardFile]
"""From path, family, shard, and what gives its entries in the index."""


def _local(pool: MapPool, path: Path, family: str, shard: Shard, entries: Callable[[], memoryview]) -> ShardFile:
    return ShardFile(path, family, shard, entries, pool)

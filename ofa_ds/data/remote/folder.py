"""A remote directory of shards: small files mirrored, record batches fetched when they are read or announced."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import xxhash

from ofa_ds.data import answer_list
from ofa_ds.data.batch_index import entry_type, index_file
from ofa_ds.data.corrupt import CorruptRecord
from ofa_ds.data.manifest import MANIFEST, NEGATIVES, ConvertedManifest, read_manifest
from ofa_ds.data.open_file import MappedFile
from ofa_ds.data.remote.ahead import Ahead
from ofa_ds.data.remote.cache import BatchCache, given_bytes
from ofa_ds.data.remote.fetching import RemoteFile, download, read_small
from ofa_ds.data.remote.mirror import Mirror, remove_forgotten
from ofa_ds.data.row_reader import Data, ReadRow
from ofa_ds.data.shard_file import ShardFile

CACHE = "OFA_DS_CACHE"
"""Environment: the directory of the cache."""

THREADS = 16
"""That fetch ahead, of each process."""

MAPPED = 128
"""Record batches that a process holds mapped."""

MAX_IN_MEMORY = 256 << 20
"""Bytes of record batches that a process holds where the disk has no room for them."""


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(base) / "ofa-ds" / "shards")


class RemoteFolder:
    """What `Shards` needs of a remote directory. Not for use after a fork; a new process makes its own."""

    def __init__(self, location: str, task: str = "") -> None:
        """Raises ValueError where no shards are there, OSError where the service is not reached."""
        self.location = location.rstrip("/")
        base = cache_directory()
        base.mkdir(parents=True, exist_ok=True)
        try:
            data = read_small(f"{self.location}/{MANIFEST}")
        except FileNotFoundError as error:
            way = f"--task {task} --out {self.location} TSV ..." if task else f"--out {self.location} --work DIR ..."
            raise ValueError(
                f"{self.location}: no shards there (no {MANIFEST}); build them with: ofa-ds shards build {way}"
            ) from error
        self._name = f"{xxhash.xxh3_64_hexdigest(self.location.encode())}-{xxhash.xxh3_64_hexdigest(data)}"
        self._mirror = Mirror(base / "mirrors", self._name)
        self.mirror = self._mirror.folder
        self._mirror.place(MANIFEST, data)
        with self.naming():
            self.manifest = read_manifest(self.mirror)
        self._cache = BatchCache(base / "batches", given_bytes())
        remove_forgotten(base / "mirrors", self._cache.drop_folder)
        self._mirror_small_files()
        self._mapped: OrderedDict[str, MappedFile | _InMemory] = OrderedDict()
        self._lock = threading.Lock()
        self._ahead: Ahead[MappedFile | _InMemory] = Ahead(THREADS)

    def naming(self) -> AbstractContextManager[None]:
        """Errors about mirrored files name the remote ones."""
        return self._mirror.named(self.location)

    def _mirror_small_files(self) -> None:
        """Once a host; the index files are checked when they are read. Raises RuntimeError for damage, OSError."""
        sums = {f"{NEGATIVES}/{name}": want for name, want in self.manifest.negatives.items()}
        if self.manifest.answers:
            sums[answer_list.FILE] = self.manifest.answers
        for name, want in sums.items():
            if (self.mirror / name).exists():
                continue
            data = read_small(f"{self.location}/{name}")
            if (got := xxhash.xxh3_64_hexdigest(data)) != want:
                raise RuntimeError(f"{self.location}/{name}: has checksum {got}, want {want}; upload the shards again")
            self._mirror.place(name, data)
        if isinstance(self.manifest, ConvertedManifest):
            return
        for family, files in self.manifest.families.items():
            path = index_file(self.mirror, family)
            num_bytes = sum(shard.batches for shard in files.shards) * entry_type(family).itemsize
            if not path.exists() or path.stat().st_size != num_bytes:
                with self._mirror.partial(path.name) as partial:
                    download(f"{self.location}/{path.name}", partial, num_bytes)
                    self._check_index(partial, path.name, family)

    def _check_index(self, path: Path, name: str, family: str) -> None:
        """Raises RuntimeError where an index that was just fetched is not the manifest's."""
        with path.open("rb") as file:
            for shard in self.manifest.families[family].shards:
                got = xxhash.xxh3_64_hexdigest(file.read(shard.batches * entry_type(family).itemsize))
                if got != shard.index_xxh3:
                    raise RuntimeError(
                        f"{self.location}/{name}: what it says of {shard.file} has checksum {got}, want "
                        f"{shard.index_xxh3}; upload the shards again"
                    )

    def make_file(self, path: Path, family: str, shard: object, entries: Callable[[], memoryview]) -> RemoteShardFile:
        def named_entries() -> memoryview:
            with self.naming():
                return entries()

        return RemoteShardFile(self, path, family, shard, named_entries)

    def batch(self, file: RemoteShardFile, number: int) -> MappedFile | _InMemory:
        """The bytes of a record batch. Raises RuntimeError where they are not the manifest's, OSError."""
        name = self._batch_name(file, number)
        with self._lock:
            if (found := self._mapped.get(name)) is not None:
                self._mapped.move_to_end(name)
                return found
        if self._cache.find(name) is not None:
            return self._map(name, file, number)
        return self._ahead.now(name, lambda: self._map(name, file, number))

    def announce(self, file: RemoteShardFile, number: int) -> None:
        """Fetch a record batch that will be read soon, beside what goes on."""
        name = self._batch_name(file, number)
        with self._lock:
            if name in self._mapped:
                return
        self._ahead.ask(name, lambda: self._map(name, file, number))

    def _batch_name(self, file: RemoteShardFile, number: int) -> str:
        return f"{self._name}/{file.path.name}.{number}"

    def _map(self, name: str, file: RemoteShardFile, number: int) -> MappedFile | _InMemory:
        where = file.bytes_of(number)
        for _ in range(8):  # another process may make room between the two
            found = self._cache.get(name, lambda: file.fetch(number))
            if isinstance(found, bytes):
                mapped: MappedFile | _InMemory = _InMemory(found)
                break
            try:
                mapped = MappedFile(found, len(where), MANIFEST)
                break
            except FileNotFoundError:
                continue
            except RuntimeError as error:  # its size
                self._drop(name, str(error))
        else:
            mapped = _InMemory(file.fetch(number))
        with self._lock:
            self._mapped[name] = mapped
            while len(self._mapped) > MAPPED:
                self._mapped.popitem(last=False)
            if isinstance(mapped, _InMemory):
                self._bound_memory()
        return mapped

    def _bound_memory(self) -> None:
        held = [(name, len(each.data)) for name, each in self._mapped.items() if isinstance(each, _InMemory)]
        total = sum(size for _, size in held)
        for name, size in held[:-1]:
            if total <= MAX_IN_MEMORY:
                break
            del self._mapped[name]
            total -= size

    def check(self, file: RemoteShardFile, number: int) -> None:
        """Compare a record batch with its checksum as it is in the cache now; a damaged one is fetched again."""
        name, want = self._batch_name(file, number), int(file.entries["xxh3"][number])
        place = self._cache.folder / name
        for _ in range(2):
            if (got := xxhash.xxh3_64_intdigest(self.batch(file, number).data)) == want:
                return
            self._drop(name, f"{place}: has checksum {got:016x}, want {want:016x}")
        raise RuntimeError(f"{file.location}: damaged each time it is written to {place}; is the disk in order?")

    def _drop(self, name: str, why: str) -> None:
        print(f"{why.partition('; copy')[0]}: damaged in the cache; fetched again", file=sys.stderr, flush=True)
        with self._lock:
            self._mapped.pop(name, None)
        self._cache.drop(name)


class _InMemory:
    """As `MappedFile`, for a batch that found no room on the disk."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.ints = memoryview(data)[: len(data) & ~3].cast("i")


class RemoteShardFile(ShardFile):
    """Rows of a remote Arrow file. `path` is its place in the mirror, where it never is; messages say `location`."""

    __slots__ = ("_folder", "_remote")

    def __init__(
        self, folder: RemoteFolder, path: Path, family: str, shard: object, entries: Callable[[], memoryview]
    ) -> None:
        super().__init__(path, family, shard, entries)
        self._folder = folder
        self.location = f"{folder.location}/{path.name}"
        self._remote = RemoteFile(self.location, self.shard.num_bytes, MANIFEST)

    def _read(self, i: int, read: ReadRow, verify: bool) -> dict[str, Any]:
        try:
            return super()._read(i, read, verify)
        except CorruptRecord:  # here or there? If it is the copy in the cache, that is fetched again
            self._folder.check(self, self.batch_of(i))
            return super()._read(i, read, verify)

    def batch_bytes(self, batch: int, start: int) -> tuple[Data, memoryview, int]:
        found = self._folder.batch(self, batch)
        return found.data, found.ints, 0

    def fetch(self, batch: int) -> bytes:
        """The bytes of a batch, checked. Raises RuntimeError where they are others than the index says, OSError."""
        where, want = self.bytes_of(batch), int(self.entries["xxh3"][batch])
        for attempt in range(2):  # damage on the way does not come twice
            data = self._remote.read(where.start, len(where))
            got = xxhash.xxh3_64_intdigest(data)
            if got == want:
                return data
            if attempt == 0:
                print(f"{self.location}: record batch {batch} came damaged; fetched again", file=sys.stderr)
        raise RuntimeError(
            f"{self.location}: record batch {batch} has checksum {got:016x}, want {want:016x}; it was changed "
            "or damaged there: upload the shards again"
        )

    def announce(self, i: int) -> None:
        self._folder.announce(self, self.batch_of(i))

    def _check(self, batch: int) -> None:
        self._folder.check(self, batch)
        self._checked.add(batch)

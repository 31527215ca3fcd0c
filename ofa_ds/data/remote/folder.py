"""A remote directory of shards: small files mirrored, record batches fetched when they are read or announced."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from ofa_ds.data import answer_list
from ofa_ds.data.batch_index import entry_type, index_file
from ofa_ds.data.manifest import MANIFEST, NEGATIVES, ConvertedManifest, read_manifest
from ofa_ds.data.open_file import MappedFile
from ofa_ds.data.remote.cache import BatchCache
from ofa_ds.data.remote.fetching import RemoteFile, download, read_small
from ofa_ds.data.row_reader import Data
from ofa_ds.data.shard_file import ShardFile

CACHE, CACHE_BYTES = "OFA_DS_CACHE", "OFA_DS_CACHE_BYTES"
"""Environment: the directory of the cache, and how many bytes it may have."""

MAX_BYTES = 64 << 30
"""Of the cache where nothing is said: this, or half of what is free on its disk."""

THREADS = 8
"""That fetch ahead, of each process."""

MAPPED = 128
"""Record batches that a process holds mapped."""

MAX_IN_MEMORY = 256 << 20
"""Bytes of record batches that a process holds where the disk has no room for them."""

_FORGOTTEN_S = 3600.0
"""An unfinished small file that nobody wrote to for so long is one of a killed process."""


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(base) / "ofa-ds" / "shards")


def cache_bytes(folder: Path) -> int:
    """Raises ValueError for a value that is no number of bytes."""
    given = os.environ.get(CACHE_BYTES, "")
    if not given:
        return min(MAX_BYTES, shutil.disk_usage(folder).free // 2)
    if not (given.isascii() and given.isdigit()) or int(given) < 1:
        raise ValueError(f"{CACHE_BYTES}: want a number of bytes, got {given!r}")
    return int(given)


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
        name = f"{xxhash.xxh3_64_hexdigest(self.location.encode())}-{xxhash.xxh3_64_hexdigest(data)}"
        self.mirror = base / "mirrors" / name
        self.mirror.mkdir(parents=True, exist_ok=True)
        _place(self.mirror / MANIFEST, data)
        self.manifest = read_manifest(self.mirror)
        self._mirror_small_files()
        self._cache = BatchCache(base / "batches", cache_bytes(base))
        self._name = name
        self._mapped: OrderedDict[str, MappedFile | _InMemory] = OrderedDict()
        self._ahead: dict[str, Future] = {}
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def _mirror_small_files(self) -> None:
        """Once a host; the index files are checked when they are read. Raises RuntimeError for damage, OSError."""
        sums = {f"{NEGATIVES}/{name}": want for name, want in self.manifest.negatives.items()}
        if self.manifest.answers:
            sums[answer_list.FILE] = self.manifest.answers
        for name, want in sums.items():
            if (path := self.mirror / name).exists():
                continue
            data = read_small(f"{self.location}/{name}")
            if (got := xxhash.xxh3_64_hexdigest(data)) != want:
                raise RuntimeError(f"{self.location}/{name}: has checksum {got}, want {want}; upload the shards again")
            _place(path, data)
        if not isinstance(self.manifest, ConvertedManifest):
            for family in self.manifest.families:
                path = index_file(self.mirror, family)
                size = sum(shard.batches for shard in self.manifest.families[family].shards)
                if not path.exists() or path.stat().st_size != size * entry_type(family).itemsize:
                    with _partial(path) as partial:
                        download(f"{self.location}/{path.name}", partial)
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
        return RemoteShardFile(self, path, family, shard, entries)

    def batch(self, file: RemoteShardFile, number: int) -> MappedFile | _InMemory:
        """The bytes of a record batch. Raises RuntimeError where they are not the manifest's, OSError."""
        name = f"{self._name}/{file.path.name}.{number}"
        with self._lock:
            found = self._mapped.get(name)
            waiting = self._ahead.get(name)
            if found is not None:
                self._mapped.move_to_end(name)
                return found
        if waiting is not None:
            with suppress(Exception):  # what failed ahead is tried again, and raised, here
                waiting.result()
        return self._map(name, file, number)

    def _map(self, name: str, file: RemoteShardFile, number: int) -> MappedFile | _InMemory:
        where = file.bytes_of(number)
        for _ in range(8):  # another process may make room between the two
            found = self._cache.get(name, len(where), lambda: file.fetch(number))
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
        name, want = f"{self._name}/{file.path.name}.{number}", int(file.entries["xxh3"][number])
        for _ in range(2):
            if (got := xxhash.xxh3_64_intdigest(self.batch(file, number).data)) == want:
                return
            self._drop(name, f"{self._cache.folder / name}: has checksum {got:016x}, want {want:016x}")
        raise RuntimeError(f"{self._cache.folder / name}: damaged each time it is written; is the disk in order?")

    def _drop(self, name: str, why: str) -> None:
        print(f"{why.partition('; copy')[0]}: damaged in the cache; fetched again", file=sys.stderr, flush=True)
        with self._lock:
            self._mapped.pop(name, None)
        self._cache.drop(name)

    def announce(self, file: RemoteShardFile, number: int) -> None:
        """Fetch a record batch that will be read soon, beside what goes on."""
        name = f"{self._name}/{file.path.name}.{number}"
        with self._lock:
            if name in self._mapped or name in self._ahead:
                return
            if self._threads is None:
                self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="shards-ahead")
            self._ahead[name] = self._threads.submit(self._fetch_ahead, name, file, number)

    def _fetch_ahead(self, name: str, file: RemoteShardFile, number: int) -> None:
        try:
            self._map(name, file, number)
        finally:
            with self._lock:
                self._ahead.pop(name, None)


class _InMemory:
    """As `MappedFile`, for a batch that found no room on the disk."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.ints = memoryview(data)[: len(data) & ~3].cast("i")


class RemoteShardFile(ShardFile):
    """Rows of a remote Arrow file. `path` is its place in the mirror, where it never is; messages say the location."""

    __slots__ = ("_folder", "_remote")

    def __init__(
        self, folder: RemoteFolder, path: Path, family: str, shard: object, entries: Callable[[], memoryview]
    ) -> None:
        super().__init__(path, family, shard, entries)
        self._folder = folder
        self._remote = RemoteFile(f"{folder.location}/{path.name}", self.shard.num_bytes, MANIFEST)

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
                print(f"{self._remote.location}: record batch {batch} came damaged; fetched again", file=sys.stderr)
        raise RuntimeError(
            f"{self._remote.location}: record batch {batch} has checksum {got:016x}, want {want:016x}; it was changed "
            "or damaged there: upload the shards again"
        )

    def announce(self, i: int) -> None:
        self._folder.announce(self, self.batch_of(i))

    def _check(self, batch: int) -> None:
        self._folder.check(self, batch)
        self._checked.add(batch)

    def checksum_problem(self, batch: int) -> str | None:
        if batch == self.num_batches:
            start = self.bytes_of(batch - 1).stop
            got = xxhash.xxh3_64_hexdigest(self._remote.read(start, self.shard.num_bytes - start))
            wrong = f"{self._remote.location}: the footer has checksum {got}, want {self.shard.footer_xxh3}"
            return None if got == self.shard.footer_xxh3 else wrong
        try:
            self.fetch(batch)
        except RuntimeError as error:
            return str(error)
        return None


def _place(path: Path, data: bytes) -> None:
    with _partial(path) as partial:
        partial.write_bytes(data)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A file beside it that takes its name: whole or not there, also where several processes make it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _FORGOTTEN_S:
                left.unlink()
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

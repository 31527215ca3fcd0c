"""Record batches of remote shards on a local disk: bounded, shared by all processes of a host, safe against kill -9.

A batch is one file, which appears when it is whole and its checksum right. Who fetches it holds a lock on its
unfinished file, so that the others wait for it rather than fetch it too; a killed fetcher's lock is gone with it, and
the next begins the file anew. What was not used for the longest time goes when the bound is reached; who still reads in
it holds a mapping, which stays.

How many bytes there are is kept in a file whose lock orders every change: a new file is counted before it has its size,
one that goes is counted until it is gone. So a process that is killed in between leaves the count too high, never too
low; the bound is reached a little early then, and making room counts all files anew. They are also counted where the
count is missing or damaged, or from before the machine's last start: nobody waited for it to be on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from uuid import UUID

import xxhash

from ofa_ds.storage.sizes import size_text

CACHE_BYTES = "OFA_DS_CACHE_BYTES"
"""Environment: how many bytes the cache may have."""

MAX_BYTES = 64 << 30
"""Of the cache where nothing is said: this, or half of its disk's free space and what it has already."""

TELL_S, TOLD = 120.0, 10
"""Of waiting for a service, or for who fetches from it: it is told. Oftener than a worker that says nothing is taken to
hang; so often at most of another process, which may be stopped: its own waiting ends before."""

PART = ".part"
USED = "used"
"""File that holds how many bytes the batches take, and whose lock orders who changes that."""

_COUNT = struct.Struct("<q16sQ")
"""Bytes, the machine's start, xxh3-64 of both."""
_KEPT_SHARE = 0.9
"""Of the bound, what is left after room was made."""


class BatchCache:
    """Files under `folder`, of at most `max_bytes` together, unfinished ones too, whatever processes use it."""

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if max_bytes is None:
            max_bytes = min(MAX_BYTES, (shutil.disk_usage(folder).free + self.used()) // 2)
        self.max_bytes = max_bytes

    def used(self) -> int:
        """Bytes that are counted now."""
        with self._counter() as descriptor:
            return self._counted(descriptor)

    def find(self, name: str) -> Path | None:
        """The file of a batch that is there. name: a path below the folder."""
        path = self.folder / name
        with suppress(FileNotFoundError):
            os.utime(path)  # used now
            return path
        return None

    def get(self, name: str, fetch: Callable[[], bytes]) -> Path | bytes:
        """The file of a batch, fetched where it is not there. Its bytes alone where there is no room for it.

        fetch: gives its checked bytes, and raises what is wrong with them.
        """
        if (path := self.find(name)) is not None:
            return path
        path, data = self.folder / name, None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone(path) as part:
                if path.exists():  # another process fetched it meanwhile
                    return path
                data = fetch()
                if self._reserve(part, len(data)):
                    _write(part, data)
                    with self._counter():  # so that who counts meets it once
                        os.rename(part, path)
                    return path
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._give_back(error)
        return fetch() if data is None else data

    def drop(self, name: str) -> None:
        """Forget a batch that turned out to be damaged here, so that it is fetched again."""
        self._remove(self.folder / name)

    def drop_folder(self, name: str) -> None:
        """All batches of a data set that nobody has open."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        with self._counter() as descriptor:
            self._set(descriptor, self._sizes())

    @contextmanager
    def _alone(self, path: Path) -> Iterator[Path]:
        """The unfinished file of a batch, of which this process has the lock."""
        part = path.with_name(path.name + PART)
        while True:
            with _opened(part) as descriptor:
                _lock(descriptor, part)
                if not is_at(descriptor, part):  # whoever had it has finished the file, or it was cleared away
                    continue
                try:
                    yield part
                finally:
                    if is_at(descriptor, part):
                        self._remove(part)
                return

    def _reserve(self, part: Path, num_bytes: int) -> bool:
        """Give an unfinished file its size, after others went where they are too many. -> whether there is room."""
        with self._counter() as descriptor:
            left_over = part.stat().st_size  # of who was killed at it: counted already
            used = self._counted(descriptor) - left_over
            if used + num_bytes > self.max_bytes:
                used = self._evict(int(self.max_bytes * _KEPT_SHARE) - num_bytes) - left_over
            fits = used + num_bytes <= self.max_bytes
            self._set(descriptor, used + (num_bytes if fits else left_over))
            if fits:
                os.truncate(part, num_bytes)
        return fits

    def _remove(self, path: Path) -> None:
        with self._counter() as descriptor, suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            self._set(descriptor, self._counted(descriptor) - size)

    def _give_back(self, error: OSError) -> None:
        """Half of the cache, on a disk that is full."""
        free = size_text(shutil.disk_usage(self.folder).free)
        what = f"{self.folder}: {error.strerror}, {free} are free of a cache of {size_text(self.max_bytes)}"
        print(f"{what}; half of it is given back; {CACHE_BYTES} makes it smaller", file=sys.stderr, flush=True)
        with suppress(OSError), self._counter() as descriptor:
            self._set(descriptor, self._evict(self.max_bytes // 2))

    def _evict(self, left: int) -> int:
        """Remove what was used longest ago until at most `left` bytes are there. -> the bytes that are."""
        found, total = [], 0
        for path in self._files():
            if path.name.endswith(PART) and _clear_if_nobodys(path):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                total += status.st_size
                if not path.name.endswith(PART):
                    found.append((status.st_mtime_ns, status.st_size, path))
        for _, size, path in sorted(found, key=lambda each: each[0]):
            if total <= max(left, 0):
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _sizes(self) -> int:
        total = 0
        for path in self._files():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                if name != USED:
                    yield Path(folder, name)

    @contextmanager
    def _counter(self) -> Iterator[int]:
        """The file of the count, of which this thread has the lock: nobody else changes sizes meanwhile."""
        with _opened(self.folder / USED) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor

    def _counted(self, descriptor: int) -> int:
        data = os.pread(descriptor, _COUNT.size + 1, 0)
        if len(data) == _COUNT.size:
            used, boot, checksum = _COUNT.unpack(data)
            if checksum == xxhash.xxh3_64_intdigest(data[:24]) and boot == _boot():
                return used
        self._set(descriptor, used := self._sizes())
        return used

    @staticmethod
    def _set(descriptor: int, used: int) -> None:
        head = struct.pack("<q16s", max(used, 0), _boot())
        data = head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
        try:
            done = os.pwrite(descriptor, data, 0)
        except OSError:  # the disk is full
            done = 0
        if done != len(data) or os.fstat(descriptor).st_size != len(data):
            os.ftruncate(descriptor, done // len(data) * done)  # nothing is there: counted anew when next asked for


def given_bytes() -> int | None:
    """Of the cache, where the environment says it. Raises ValueError for a value that is no number of bytes."""
    if not (given := os.environ.get(CACHE_BYTES, "")):
        return None
    if not (given.isascii() and given.isdigit()) or int(given) < 1:
        raise ValueError(f"{CACHE_BYTES}: want a number of bytes, got {given!r}")
    return int(given)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """For reading and writing, made where it is not there. A lock of it ends with the block, however that does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, part: Path) -> None:
    """Waits for whoever fetches into an unfinished file, and tells so."""
    with suppress(BlockingIOError):
        return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    is_ours = threading.Event()

    def tell() -> None:
        for k in range(1, TOLD + 1):
            if is_ours.wait(TELL_S):
                return
            print(f"{part}: waits for who fetches it, for {k * TELL_S:.0f} s", file=sys.stderr, flush=True)

    threading.Thread(target=tell, daemon=True, name="shards-wait").start()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    finally:
        is_ours.set()


@cache
def _boot() -> bytes:
    """Of the machine's last start; zeros where the system does not say."""
    try:
        return UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    except (OSError, ValueError):
        return bytes(16)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _write(part: Path, data: bytes) -> None:
    try:
        with open(part, "r+b", buffering=0) as file:
            write_whole(file, data)
            os.fsync(file.fileno())  # or after a power cut the name may be there without the data
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(part)) from error


def write_whole(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _clear_if_nobodys(part: Path) -> bool:
    """An unfinished file whose fetcher was killed. -> whether it is gone."""
    with suppress(OSError):
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
            return True
        finally:
            os.close(descriptor)
    return False

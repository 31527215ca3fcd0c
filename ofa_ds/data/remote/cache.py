"""Record batches of remote shards on a local disk: bounded, shared by all processes of a host, safe against kill -9.

A batch is one file, which appears when it is whole and its checksum right. Who fetches it holds a lock on its
unfinished file, so that the others wait for it rather than fetch it too; a killed fetcher's lock is gone with it, and
the next begins the file anew. What was not used for the longest time goes when the bound is reached; who still reads in
it holds a mapping, which stays.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ofa_ds.storage.sizes import size_text

PART = ".part"
_USED = "used"
"""File that holds how many bytes the batches take, and whose lock orders who changes that."""

_COUNT = struct.Struct("<q")
_KEPT_SHARE = 0.9
"""Of the bound, what is left after room was made."""


class BatchCache:
    """Files under `folder`, of at most about `max_bytes` together, whatever processes use it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        with self._used() as descriptor:
            self._set(descriptor, self._count())

    def get(self, name: str, num_bytes: int, fetch: Callable[[], bytes]) -> Path | bytes:
        """The file of a batch, fetched where it is not there. Its bytes alone where the disk has no room for it.

        name: a path below the folder. fetch: gives its checked bytes, and raises what is wrong with them.
        """
        path = self.folder / name
        with suppress(FileNotFoundError):
            os.utime(path)  # used now
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone(path) as part:
            if path.exists():  # another process fetched it meanwhile
                return path
            data = fetch()
            if len(data) > self.max_bytes:
                return data
            try:
                self._reserve(num_bytes)
                self._write(part, data)
                os.rename(part, path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._tell_full(error)
                self._make_room(self.max_bytes // 2)
                return data
        return path

    def drop(self, name: str) -> None:
        """Forget a batch that turned out to be damaged here, so that it is fetched again."""
        (self.folder / name).unlink(missing_ok=True)  # the count is put right when room is made

    @contextmanager
    def _alone(self, path: Path) -> Iterator[Path]:
        """The unfinished file of a batch, of which this process has the lock."""
        part = path.with_name(path.name + PART)
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                if os.stat(part).st_ino == os.fstat(descriptor).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(descriptor)  # whoever had it has finished the file, or it was cleared away
            if path.exists():
                yield part
                return
        try:
            yield part
        finally:
            with suppress(OSError):
                if os.stat(part).st_ino == os.fstat(descriptor).st_ino:
                    part.unlink()
            os.close(descriptor)

    def _write(self, part: Path, data: bytes) -> None:
        with open(part, "r+b", buffering=0) as file:
            file.truncate(0)  # what a killed process had begun
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())  # or after a power cut the name may be there without the data

    def _reserve(self, num_bytes: int) -> None:
        """Count a new file, after others went where they are too many."""
        with self._used() as descriptor:
            used = self._get(descriptor) + num_bytes
            if used > self.max_bytes:
                used = self._evict(int(self.max_bytes * _KEPT_SHARE) - num_bytes) + num_bytes
            self._set(descriptor, used)

    def _make_room(self, left: int) -> None:
        with self._used() as descriptor:
            self._set(descriptor, self._evict(left))

    def _evict(self, left: int) -> int:
        """Remove what was used longest ago until at most `left` bytes are there. -> the bytes that are."""
        found = []
        for path in self._files():
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.name.endswith(PART):
                    _clear_if_nobodys(path)
                else:
                    found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda each: each[0]):
            if total <= max(left, 0):
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _count(self) -> int:
        total = 0
        for path in self._files():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                if name != _USED:
                    yield Path(folder, name)

    @contextmanager
    def _used(self) -> Iterator[int]:
        descriptor = os.open(self.folder / _USED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    @staticmethod
    def _get(descriptor: int) -> int:
        data = os.pread(descriptor, _COUNT.size, 0)
        return _COUNT.unpack(data)[0] if len(data) == _COUNT.size else 0

    @staticmethod
    def _set(descriptor: int, used: int) -> None:
        os.pwrite(descriptor, _COUNT.pack(max(used, 0)), 0)

    def _tell_full(self, error: OSError) -> None:
        free = size_text(shutil.disk_usage(self.folder).free)
        what = f"{self.folder}: {error.strerror}, {free} are free of a cache of {size_text(self.max_bytes)}"
        print(f"{what}; half of it is given back; OFA_DS_CACHE_BYTES makes it smaller", file=sys.stderr, flush=True)


def _clear_if_nobodys(part: Path) -> None:
    """An unfinished file whose fetcher was killed."""
    with suppress(OSError):
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
        finally:
            os.close(descriptor)

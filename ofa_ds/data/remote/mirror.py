"""The small files of remote shards, kept on this machine for all its processes: manifest, index, negatives, answers.

A mirror is a directory for each location and content of its manifest. Who uses it holds a shared lock in it. When
remote shards are opened, mirrors that were not opened for `KEPT_S` and that nobody holds are removed, with their record
batches in the cache.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ofa_ds.data.remote.cache import is_at

KEPT_S = 30 * 24 * 3600
"""Seconds that a mirror stays after it was opened last."""

_LOCK = ".open"
"""File of a mirror that is locked by who uses it; its time is that of the last opening."""

_FORGOTTEN_S = 3600.0
"""An unfinished file that nobody wrote to for so long is one of a killed process."""


class Mirror:
    """The directory `base / name`, which stays while this object or a fork's copy of it does."""

    def __init__(self, base: Path, name: str) -> None:
        self.folder = base / name
        self._descriptor = -1
        self._descriptor = _hold(self.folder)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def place(self, name: str, data: bytes) -> None:
        with self.partial(name) as partial, writing(partial):
            partial.write_bytes(data)

    @contextmanager
    def partial(self, name: str) -> Iterator[Path]:
        """A file beside `name` that takes its name: whole or not there, also where several processes make it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _FORGOTTEN_S:
                    left.unlink()
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            yield partial
            with partial.open("rb") as file, writing(partial):
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def named(self, location: str) -> Iterator[None]:
        """Errors about files of this mirror tell where they are from, and how they come anew."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            if str(self.folder) not in (text := str(error)):
                raise
            text = text.replace(str(self.folder), location).partition("; copy or build")[0].partition("; build")[0]
            raise (ValueError if isinstance(error, ValueError) else RuntimeError)(
                f"{text}; upload the shards again, or where they are right there remove their copy {self.folder}"
            ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What this machine's disk does not take is one line, a RuntimeError: it is not the service's to try again."""
    try:
        yield
    except OSError as error:
        way = "make room there, or name another directory with OFA_DS_CACHE"
        raise RuntimeError(f"{path}: {error.strerror}; {way}") from error


def remove_forgotten(base: Path, also: Callable[[str], None]) -> None:
    """also: is told the name of each mirror before it goes, while nobody can open it."""
    for folder in base.iterdir():
        if folder.name.startswith("."):  # who removed it was killed
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with suppress(OSError):
            if _is_forgotten(folder):
                _remove(folder, also)


def _remove(folder: Path, also: Callable[[str], None]) -> None:
    """Raises BlockingIOError where somebody has it open."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_at(descriptor, folder / _LOCK):
            also(folder.name)
            os.rename(folder, gone := folder.with_name(f".{folder.name}.{os.getpid()}"))
            shutil.rmtree(gone, ignore_errors=True)
    finally:
        os.close(descriptor)


def _is_forgotten(folder: Path) -> bool:
    try:
        opened = (folder / _LOCK).stat().st_mtime
    except FileNotFoundError:  # it is just being made, or by a version that had no locks
        opened = folder.stat().st_mtime
    return time.time() - opened > KEPT_S


def _hold(folder: Path) -> int:
    """A descriptor with the shared lock of a mirror, which is made where it is not there."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # it was removed in between
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.utime(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if is_at(descriptor, folder / _LOCK):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

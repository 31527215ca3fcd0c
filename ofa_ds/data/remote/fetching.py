"""Bytes of remote files, tried again where a service or the way to it fails."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from ofa_ds.storage import file_systems

TRIES = 6
FIRST_WAIT_S = 0.2
"""Doubled with each further try, and drawn between half of it and all, so that many readers do not come together."""

MAX_SMALL_BYTES = 1 << 30
"""Largest manifest, list of answers or file of negatives that is read whole."""

_BLOCK_BYTES = 1 << 23

T = TypeVar("T")


def persistent(what: str, attempt: Callable[[], T]) -> T:
    """attempt(), tried TRIES times where it raises OSError; each failure is told. Raises the last one.

    What is not there, or not allowed, is not tried again.
    """
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if number == TRIES or _is_final(error):
                raise
            wait_s = FIRST_WAIT_S * 2 ** (number - 1) * random.uniform(0.5, 1.0)  # of time, never of data
            text = " ".join(str(error).split())
            print(f"{what}: {text:.300}; try {number + 1} of {TRIES} in {wait_s:.1f} s", file=sys.stderr, flush=True)
            time.sleep(wait_s)
    raise AssertionError("not reached")


def _is_final(error: OSError) -> bool:
    return any(each in str(error) for each in ("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY"))


class RemoteFile:
    """One file, of which pieces are read. Its connection is opened when first needed, and anew after a failure."""

    def __init__(self, location: str, num_bytes: int, promise: str) -> None:
        self.location, self._num_bytes, self._promise = location, num_bytes, promise
        self._file: pa.NativeFile | None = None

    def read(self, start: int, size: int) -> bytes:
        """Raises RuntimeError where the file has another size than `promise` says; OSError."""
        return persistent(f"{self.location}, bytes {start} ... {start + size - 1}", lambda: self._attempt(start, size))

    def _attempt(self, start: int, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = file_systems.open_input(self.location)
                if (found := self._file.size()) != self._num_bytes:
                    raise RuntimeError(
                        f"{self.location}: want {self._num_bytes} bytes as in {self._promise}, got {found}; upload it "
                        "again, and do not write it in place"
                    )
            data = self._file.read_at(size, start)
        except BaseException:
            self._file = None
            raise
        if len(data) != size:
            self._file = None
            raise OSError(f"{self.location}: got {len(data)} of {size} bytes")
        return data


def read_small(location: str) -> bytes:
    """A whole file. Raises FileNotFoundError, OSError, ValueError where it is too large."""
    return persistent(location, lambda: file_systems.read_bytes(location, MAX_SMALL_BYTES))


def download(location: str, path: Path) -> None:
    """A file of any size. Raises as `read_small`."""
    persistent(location, lambda: _download(location, path))


def _download(location: str, path: Path) -> None:
    with file_systems.open_input(location) as source, path.open("wb") as file:
        while block := source.read(_BLOCK_BYTES):
            file.write(block)
        if (want := source.size()) != file.tell():
            raise OSError(f"{location}: got {file.tell()} of {want} bytes")

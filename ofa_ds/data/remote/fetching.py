"""Bytes of remote files, tried again where a service or the way to it fails, for a bounded time."""

from __future__ import annotations

import random
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from ofa_ds.data.remote.cache import TELL_S, write_whole
from ofa_ds.data.remote.mirror import writing
from ofa_ds.storage import file_systems

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 30.0
"""Doubled with each further try, and drawn between half of it and all, so that many readers do not come together."""

OPENING_S, READING_S = 10.0, 300.0
"""How long a service may fail before it is given up: where nothing was read yet, a wrong name is likelier."""

ATTEMPT_S, SLOWEST = 60.0, 100_000.0
"""An attempt is given up after so many seconds, and one more for each SLOWEST bytes that it wants."""

MAX_SMALL_BYTES = 1 << 30
"""Largest manifest, list of answers or file of negatives that is read whole."""

_BLOCK_BYTES = 1 << 23
_DENIED = re.compile("ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|HTTP status 40[0-3]|ExpiredToken")
"""pyarrow gives no more of an expired token, or of another region, than a status of 400."""
_GONE = re.compile("NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND")

T = TypeVar("T")


def persistent(what: str, attempt: Callable[[], T], patience_s: float, limit_s: float = ATTEMPT_S) -> T:
    """attempt(), tried again where it raises OSError, with growing waits; each failure is told.

    What is not there, or not allowed, is not tried again. Raises FileNotFoundError; the last OSError, with `what` and
    the way out, after patience_s. Whatever the service does, this ends: an attempt is abandoned after limit_s.
    """
    began, wait_s, tries = time.monotonic(), FIRST_WAIT_S, 0
    while True:
        tries += 1
        try:
            return _within(limit_s, attempt, what)
        except FileNotFoundError:
            raise
        except OSError as error:
            text = " ".join(str(error).split())
            _, found, code = text.rpartition("AWS Error ")  # before it are names, which may say anything
            code = code if found else ""
            text = text[:400] if text.startswith(what) else f"{what}: {text[:400]}"
            if isinstance(error, PermissionError) or _DENIED.search(code):
                way = "the service refuses these credentials, or they expired: see AWS_ACCESS_KEY_ID, AWS_SESSION_TOKEN"
                raise OSError(f"{text}; {way}; or AWS_REGION is another") from error
            if _GONE.search(code):
                raise OSError(f"{text}; upload the shards again") from error
            passed_s = time.monotonic() - began
            if passed_s + wait_s > patience_s:
                way = "see whether the service is up and AWS_ENDPOINT_URL is right, and start again"
                raise OSError(f"{text}; given up after {tries} tries in {passed_s:.0f} s: {way}") from error
            pause_s = wait_s * random.uniform(0.5, 1.0)  # of time, never of data
            print(f"{text}; try {tries + 1} in {pause_s:.1f} s", file=sys.stderr, flush=True)
            time.sleep(pause_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _within(limit_s: float, attempt: Callable[[], T], what: str) -> T:
    """attempt() in a thread that nobody waits for any longer: so Ctrl-C ends this too. Raises OSError then."""
    future: futures.Future[T] = futures.Future()
    _under_way.add(future)

    def run() -> None:
        try:
            future.set_result(attempt())
        except BaseException as error:
            future.set_exception(error)
        _under_way.discard(future)

    threading.Thread(target=run, daemon=True, name="shards-fetch").start()
    left_s = limit_s
    while futures.wait([future], min(left_s, TELL_S)).not_done:
        left_s -= TELL_S
        if left_s <= 0:
            raise OSError(f"no answer in {limit_s:.0f} s")
        print(f"{what}: slow; given up in {left_s:.0f} s", file=sys.stderr, flush=True)
    return future.result()


_under_way: set[futures.Future] = set()


def under_way() -> bool:
    """Whether requests run that nobody waits for any longer: Python's own end would wait for them, for a minute."""
    return bool(_under_way)


class RemoteFile:
    """One file, of which pieces are read. Its connection is opened when first needed, and anew after a failure."""

    def __init__(self, location: str, num_bytes: int, promise: str) -> None:
        self.location, self._num_bytes, self._promise = location, num_bytes, promise
        self._file: pa.NativeFile | None = None

    def read(self, start: int, size: int) -> bytes:
        """Raises RuntimeError where the file is not there, or has another size than `promise` says; OSError."""
        what = f"{self.location}, bytes {start} ... {start + size - 1}"
        try:
            return persistent(what, lambda: self._attempt(start, size), READING_S, ATTEMPT_S + size / SLOWEST)
        except FileNotFoundError as error:
            raise RuntimeError(f"{self.location}: is not there; upload the shards again") from error
        except OSError:
            self._file = None  # also where an attempt was abandoned
            raise

    def _attempt(self, start: int, size: int) -> bytes:
        try:
            file = self._file or self._opened()
            data = file.read_at(size, start)
        except BaseException:
            self._file = None
            raise
        if len(data) != size:
            self._file = None
            raise OSError(f"got {len(data)} of {size} bytes")
        self._file = file
        return data

    def _opened(self) -> pa.NativeFile:
        file = file_systems.open_input(self.location)
        if (found := file.size()) != self._num_bytes:
            raise RuntimeError(
                f"{self.location}: want {self._num_bytes} bytes as in {self._promise}, got {found}; upload it again, "
                "and do not write it in place"
            )
        return file


def read_small(location: str) -> bytes:
    """A whole file. Raises FileNotFoundError, OSError, ValueError where it is too large."""
    size = persistent(location, lambda: file_systems.info(location).size, OPENING_S, ATTEMPT_S)
    limit_s = ATTEMPT_S + (size or 0) / SLOWEST
    return persistent(location, lambda: file_systems.read_bytes(location, MAX_SMALL_BYTES), OPENING_S, limit_s)


def download(location: str, path: Path, num_bytes: int) -> None:
    """A file of this size. Raises FileNotFoundError, RuntimeError where it has another or is not written, OSError."""
    limit_s = ATTEMPT_S + num_bytes / SLOWEST
    persistent(location, lambda: _download(location, path, num_bytes), READING_S, limit_s)


def _download(location: str, path: Path, num_bytes: int) -> None:
    with writing(path):
        file = path.open("wb", buffering=0)
    with file, file_systems.open_input(location) as source:
        if (found := source.size()) != num_bytes:
            raise RuntimeError(f"{location}: want {num_bytes} bytes, got {found}; upload the shards again")
        while block := source.read(_BLOCK_BYTES):
            with writing(path):
                write_whole(file, block)
        if file.tell() != num_bytes:
            raise OSError(f"got {file.tell()} of {num_bytes} bytes")

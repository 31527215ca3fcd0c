"""Descriptors of any number of files, of which only so many are open at a time."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ofa_ds.storage.direct import set_direct

_SPARE = 32
"""Descriptors that are left to everything else."""
_LEAST, _MOST = 4, 4096


def descriptor_share() -> int:
    """How many files one of two parties, who read and who write, may have open in this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = limit - _open_now() - _SPARE if limit != resource.RLIM_INFINITY else 2 * _MOST
    return max(_LEAST, min(_MOST, free // 2))


def _open_now() -> int:
    """How many this process has; none where the system does not say: half of what is free is left to others anyway."""
    for place in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(os.listdir(place))
    return 0


class OpenFiles:
    """Opens a file when it is used, and closes the one that was used longest ago. For several threads."""

    def __init__(self, limit: int, *, direct: bool) -> None:
        """direct: past the page cache, where the file system has that."""
        self._limit, self._direct = limit, direct
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[Path, int] = {}

    @contextmanager
    def use(self, path: Path, flags: int) -> Iterator[int]:
        """A descriptor that stays open in the block. flags: as `os.open` takes them, where it has to open."""
        with self._lock:
            if path not in self._open:
                self._make_room()
                self._open[path] = os.open(path, flags, 0o644)
                if self._direct:
                    set_direct(self._open[path], True)
            self._open.move_to_end(path)
            self._users[path] = self._users.get(path, 0) + 1
            descriptor = self._open[path]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[path] -= 1
                if not self._users[path]:
                    del self._users[path]

    def _make_room(self) -> None:
        idle = [path for path in self._open if path not in self._users] if len(self._open) >= self._limit else []
        if idle:
            os.close(self._open.pop(idle[0]))

    def close(self, path: Path) -> None:
        """Close one that nobody uses, where it is open."""
        with self._lock:
            if path in self._open:
                os.close(self._open.pop(path))

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

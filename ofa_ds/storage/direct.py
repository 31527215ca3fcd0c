"""Reading and writing past the page cache."""

from __future__ import annotations

import fcntl
import os

BLOCK_BYTES = 4096
"""Offsets, sizes and addresses of direct reads and writes are multiples of it."""


def set_direct(descriptor: int, on: bool) -> bool:
    """Have reads and writes pass by the page cache, or not any more.

    Returns whether it is on; a file system in memory, for one, does not have it.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return on

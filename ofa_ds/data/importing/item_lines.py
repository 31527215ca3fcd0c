"""A list of items on the disk, a line of JSON each, written once; pieces of a build are runs of its lines."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ofa_ds.storage import file_systems

PIECE_ROWS = 5_000
MAX_PICTURE_BYTES = 1 << 28

_NO_PICTURE = (None, 0, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL)
"""What a name that is none of a picture leads to; other errors are the machine's."""


class Lines(NamedTuple):
    """Lines start ... stop - 1 (in bytes) of a list."""

    path: str
    start: int
    stop: int

    def read(self) -> Iterator[tuple[int, bytes, Any]]:
        """(number from 1, the line, the item)."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            number = 0
            while file.tell() < self.stop:
                line = file.readline()
                number += 1
                yield number, line.rstrip(b"\n"), json.loads(line)


def write_lines(path: Path, items: Iterable[Any]) -> list[Lines]:
    """PIECE_ROWS items each; none of no items."""
    cuts = [0]
    with path.open("wb") as file:
        for number, item in enumerate(items):
            if number and number % PIECE_ROWS == 0:
                cuts.append(file.tell())
            file.write(json.dumps(item, sort_keys=True).encode() + b"\n")
        cuts.append(file.tell())
    return [Lines(str(path), start, stop) for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]


def read_picture(location: str) -> bytes:
    """Raises ValueError "image: reason" where the name is not that of a picture, OSError."""
    try:
        return file_systems.read_bytes(location, MAX_PICTURE_BYTES)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"image: {error}") from error
    except OSError as error:
        if error.errno not in _NO_PICTURE:
            raise
        raise ValueError(f"image: {location}: {error.strerror or error}") from error

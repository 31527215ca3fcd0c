"""What a builder of shards reads: pieces of sources, and the records in them.

A piece is a function of the sources alone, never of who builds it, so that the shards are the same bytes with any
number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ofa_ds.storage import file_systems


class SourceError(ValueError):
    """A source that is wrong as a whole: it stops a build whatever a bad record does."""

    def __init__(self, message: str, number: int | None = None) -> None:
        """number: of the record within its part, where the message is about one and does not say where it is."""
        super().__init__(message)
        self.number = number


class Row(NamedTuple):
    """A checked record."""

    row: dict[str, Any]
    """As `Shards.row` gives it back."""
    doubts: Sequence[str] = ()
    """What looks like a mistake in it, each "column: reason"."""


class Record(NamedTuple):
    """One record of a part, not yet looked at."""

    number: int
    """From 1, counted from where the part begins."""
    raw: bytes | None
    """As it came, for the quarantine; None where that is no line."""
    read: Callable[[], Row]
    """Raises ValueError "column: reason"."""
    place: str = ""
    """Where it is, in place of its number: the name of a member."""
    num_bytes: int = 0
    """Of its line, which is never less than what its row takes in an Arrow file; 0 where the row is measured."""


@dataclass(frozen=True)
class SourceFile:
    """A file that is read, and what shows whether it is still the same."""

    location: str
    num_bytes: int
    stamp: int
    """Time of its last change in nanoseconds; 0 where a file system does not say."""

    @property
    def name(self) -> str:
        return self.location.rstrip("/").rpartition("/")[2]


class Piece(Protocol):
    """Some of the records; picklable. `key` is JSON and says which they are, contents of the files included."""

    @property
    def files(self) -> Sequence[SourceFile]:
        """Of each part, in order; a file may go on in the next piece."""

    @property
    def num_bytes(self) -> int:
        """For progress."""

    def key(self) -> Any: ...

    def records(self, part: int) -> Iterator[Record]:
        """Of one part, in order. Raises SourceError, OSError."""


@dataclass(frozen=True)
class OneFile:
    """Of a `Piece` that is a file, or a part of one."""

    file: SourceFile

    @property
    def files(self) -> Sequence[SourceFile]:
        return [self.file]

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes


def source_file(location: str) -> SourceFile:
    """Raises SourceError where no file is there."""
    if not file_systems.is_remote(location):
        path = Path(file_systems.local_path(location))
        if not path.is_file():
            raise SourceError(f"{location}: no such file")
        found = path.stat()
        return SourceFile(str(path), found.st_size, found.st_mtime_ns)
    remote = file_systems.info(location)
    if not remote.is_file:
        raise SourceError(f"{location}: no such file")
    return SourceFile(location, remote.size, remote.mtime_ns or 0)

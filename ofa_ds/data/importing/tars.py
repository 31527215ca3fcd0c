"""WebDataset: tars whose members with one name before the first dot are one record. Nothing is ever unpacked."""

from __future__ import annotations

import functools
import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import pyarrow as pa

from ofa_ds.data.building.source import Record, Row, SourceError, SourceFile
from ofa_ds.data.building.tsv_source import CODECS
from ofa_ds.data.importing.item import Into
from ofa_ds.data.importing.loose import item_of
from ofa_ds.storage import file_systems

COLUMNS = {
    "image": "jpg jpeg png webp", "caption": "txt caption", "text": "txt text", "question": "json:question",
    "answers": "json:answers", "names": "json:objects", "box": "json:box", "objects": "json:boxes",
}  # fmt: skip
"""Field -> ends of member names, the first that is there; `json:key` is a key of the member that ends in json."""

MAX_MEMBER_BYTES = 1 << 28
"""Largest member that is read."""

MAX_HEADER_BYTES = 1 << 20
"""Most that may be read to reach a member: long names and other headers have sizes of their own, which may lie."""

MAX_NAME_CHARACTERS = 4096

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class TarPiece:
    """All records of one tar."""

    file: SourceFile
    into: Into
    columns: tuple[tuple[str, str], ...]

    @property
    def files(self) -> Sequence[SourceFile]:
        return [self.file]

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes

    def key(self) -> Any:
        return ["tar", asdict(self.file), repr(self.into), self.columns]

    def records(self, part: int) -> Iterator[Record]:
        for number, (key, members) in enumerate(groups(self.file.location), 1):
            size = sum(map(len, members.values())) + 256
            yield Record(number, None, size, functools.partial(self._read, key, members), key)

    def _read(self, key: str, members: Mapping[str, bytes]) -> Row:
        found = {name: _field(name, ends, members) for name, ends in self.columns}
        return self.into.row(item_of(key, found))


def _field(name: str, ends: str, members: Mapping[str, bytes]) -> Any:
    for end in ends.split():
        kind, _, key = end.partition(":")
        if kind not in members:
            continue
        data = members[kind]
        if key:
            try:
                table = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name}: the member .{kind} is not JSON: {error}") from error
            if isinstance(table, dict) and key in table:
                return table[key]
            continue
        if name == "image":
            return data
        try:
            return data.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: the member .{kind} is not UTF-8: {error.reason} at {error.start}") from error
    return None


def groups(location: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, end of the name -> content) of each record, in order. Raises SourceError with the member's name."""
    key, members = "", {}
    for name, data in _members(location):
        folder, _, base = name.rpartition("/")
        stem, _, end = base.partition(".")
        mine = f"{folder}/{stem}" if folder else stem
        if mine != key and members:
            yield key, members
            members = {}
        key = mine
        if end.lower() in members:
            raise SourceError(f"{location}: member {name}: the record {mine} has two of .{end}")
        members[end.lower()] = data
        if sum(map(len, members.values())) > MAX_MEMBER_BYTES:
            raise SourceError(f"{location}: member {name}: the record {mine} has more than {MAX_MEMBER_BYTES} bytes")
    if members:
        yield key, members


class _Bounded:
    """A stream that gives no more than it is allowed to: `tarfile` holds a header of any size in memory."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location = file, location
        self.allow(0)

    def allow(self, num_bytes: int) -> None:
        """From here on; a header may follow."""
        self._left = num_bytes + MAX_HEADER_BYTES

    def read(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        self._left -= len(data)
        if self._left < 0:
            raise SourceError(f"{self._location}: headers of a member have more than {MAX_HEADER_BYTES} bytes")
        return data


def _members(location: str) -> Iterator[tuple[str, bytes]]:
    try:
        with _opened(location) as raw, tarfile.open(fileobj=(file := _Bounded(raw, location)), mode="r|") as tar:
            for member in tar:
                file.allow(0)
                if member.isdir():
                    continue
                _check(location, member)
                file.allow(member.size)
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
                if len(data) != member.size:
                    raise SourceError(f"{location}: member {member.name}: got {len(data)} of {member.size} bytes")
                file.allow(0)
                yield member.name, data
    except RecursionError as error:
        raise SourceError(f"{location}: a member has headers without end") from error
    except (tarfile.TarError, EOFError, pa.ArrowException) as error:
        raise SourceError(f"{location}: not a whole tar: {' '.join(str(error).split())}; copy it again") from error
    except OSError as error:
        if error.errno:
            raise
        raise SourceError(f"{location}: damaged: {' '.join(str(error).split())}; copy it again") from error


def _check(location: str, member: tarfile.TarInfo) -> None:
    name = member.name
    if len(name) > MAX_NAME_CHARACTERS:
        raise SourceError(f"{location}: member {name!r:.100}: its name has {len(name)} characters")
    if not member.isreg() or member.issparse():
        raise SourceError(f"{location}: member {name!r:.100}: want plain files, got a link, a device or a sparse file")
    if posixpath.isabs(name) or ".." in name.split("/") or "\x00" in name:
        raise SourceError(f"{location}: member {name!r:.100}: its name leads out of the tar")
    if member.size > MAX_MEMBER_BYTES:
        raise SourceError(f"{location}: member {name!r:.100}: {member.size} bytes, at most {MAX_MEMBER_BYTES} are read")


def _opened(location: str) -> BinaryIO:
    raw = file_systems.open_input(location)
    codec = next((codec for suffix, codec in CODECS.items() if location.endswith(suffix)), None)
    codec = "gzip" if location.endswith(".tgz") else codec
    return io.BufferedReader(pa.CompressedInputStream(raw, codec) if codec else raw, _BUFFER_BYTES)

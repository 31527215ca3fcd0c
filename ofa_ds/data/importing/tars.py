"""WebDataset: tars whose members with one name before the first dot are one record. Nothing is ever unpacked."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from ofa_ds.data.building.source import OneFile, Record, Row, SourceError
from ofa_ds.data.importing.item import Into
from ofa_ds.data.importing.loose import item_of
from ofa_ds.data.importing.tar_stream import MAX_MEMBER_BYTES, members_of
from ofa_ds.storage import strict_json

COLUMNS = {
    "image": "jpg jpeg png webp", "caption": "txt caption", "text": "txt text", "question": "json:question",
    "answers": "json:answers", "names": "json:objects", "box": "json:box", "objects": "json:boxes",
}  # fmt: skip
"""Field -> ends of member names, the first that is there; `json:key` is a key of the member that ends in json."""


@dataclass(frozen=True)
class TarPiece(OneFile):
    """All records of one tar."""

    into: Into
    columns: tuple[tuple[str, str], ...]

    def key(self) -> Any:
        return ["tar", asdict(self.file), repr(self.into), self.columns]

    def records(self, part: int) -> Iterator[Record]:
        for number, (key, members) in enumerate(groups(self.file.location), 1):
            yield Record(number, None, functools.partial(self._read, key, members), key)

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
                table = strict_json.loads(data)
            except ValueError as error:
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
    seen: set[int] = set()
    for name, data in members_of(location):
        folder, _, base = name.rpartition("/")
        stem, _, end = base.partition(".")
        mine = f"{folder}/{stem}" if folder else stem
        if mine != key and members:
            yield key, members
            members = {}
        if not members:
            _check_new(location, name, mine, seen)
        key = mine
        if end.lower() in members:
            raise SourceError(f"{location}: member {name}: the record {mine} has two of .{end}")
        members[end.lower()] = data
        if sum(map(len, members.values())) > MAX_MEMBER_BYTES:
            raise SourceError(f"{location}: member {name}: the record {mine} has more than {MAX_MEMBER_BYTES} bytes")
    if members:
        yield key, members


def _check_new(location: str, name: str, key: str, seen: set[int]) -> None:
    """`seen`: 64 bits of each key, about 80 bytes of memory."""
    bits = xxhash.xxh3_64_intdigest(key.encode())
    if bits in seen:
        raise SourceError(
            f"{location}: member {name}: the record {key} was there before; members of a record follow each other: "
            "write the tar again in the order of names (tar --sort=name)"
        )
    seen.add(bits)

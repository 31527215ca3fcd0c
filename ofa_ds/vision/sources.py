"""Pictures by number, of a folder, of a TSV of OFA's, or of shards. Nothing is decoded before it is asked for."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ofa_ds.data.picture import decode_rgb
from ofa_ds.data.shards import Shards
from ofa_ds.data.tsv import decode_base64

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""How the names of a folder's pictures end, whatever the case."""

_WITHOUT_PICTURES = "text"
_IMAGE_COLUMN = 1
"""Of every TSV of OFA's that has pictures: they stand behind the row's id."""


class Pictures(ABC):
    """`len(pictures)` and `pictures[i]`: uint8 RGB [H, W, 3]. Safe to use from several threads."""

    fingerprint: str
    """The same pictures have the same; from names and sizes, not from the bytes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, i: int) -> bytes:
        """As it is stored. Raises ValueError or OSError."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Where it is, for messages."""

    @abstractmethod
    def piece(self, first: int, stop: int) -> Pictures:
        """Those `first` ... `stop` - 1, numbered from 0. Picklable: another process need not look at the others."""

    def __getitem__(self, i: int) -> np.ndarray:
        """Raises ValueError with the picture's place where it cannot be decoded."""
        try:
            return decode_rgb(self.encoded(i))
        except ValueError as error:
            raise ValueError(f"{self.name(i)}: {error}") from error


def open_pictures(path: Path) -> Pictures:
    """Raises ValueError where no pictures are there."""
    if path.is_file():
        found: Pictures = _Tsv(path)
    elif (path / "manifest.json").is_file():
        found = ShardPictures(path)
    elif path.is_dir():
        found = _Folder(path)
    else:
        raise ValueError(f"{path}: no such folder or file; want pictures: a folder, a TSV or a directory of shards")
    if not len(found):
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{path}: no pictures there; want a folder with {kinds}, a TSV or shards with pictures")
    return found


class _Folder(Pictures):
    """In the order of their names; folders inside count too."""

    def __init__(self, path: Path) -> None:
        self._files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        self.fingerprint = _digest([f"{file.relative_to(path)} {file.stat().st_size}" for file in self._files])

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, i: int) -> bytes:
        return self._files[i].read_bytes()

    def name(self, i: int) -> str:
        return str(self._files[i])

    def piece(self, first: int, stop: int) -> Pictures:
        return _with(self, _files=self._files[first:stop])


class _Tsv(Pictures):
    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            ends = np.cumsum([len(line) for line in file], dtype=np.int64)
        self._ends = np.concatenate([np.zeros(1, np.int64), ends])
        self._first_line = 1
        self.fingerprint = _digest([f"{len(ends)} lines, {self._ends[-1]} bytes"])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def encoded(self, i: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self._ends[i])
            columns = file.read(self._ends[i + 1] - self._ends[i]).rstrip(b"\r\n").split(b"\t")
        if len(columns) <= _IMAGE_COLUMN:
            raise ValueError(f"want a picture in base64 in column 2, got {len(columns)} column")
        return decode_base64(columns[_IMAGE_COLUMN])

    def name(self, i: int) -> str:
        return f"{self.path} line {self._first_line + i}"

    def piece(self, first: int, stop: int) -> Pictures:
        return _with(self, _ends=self._ends[first : stop + 1], _first_line=self._first_line + first)


class ShardPictures(Pictures):
    """Of all families that have pictures, one after the other, or of some."""

    def __init__(self, path: Path, families: Collection[str] | None = None) -> None:
        self.path = path
        counts = {
            family: rows
            for family, rows in self.shards.families.items()
            if (family != _WITHOUT_PICTURES if families is None else family in families)
        }
        self._families = list(counts)
        self._starts = np.cumsum([0, *counts.values()])
        self._rows = range(int(self._starts[-1]))
        self.fingerprint = self.shards.fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def shards(self) -> Shards:
        """A piece that comes from another process opens them when it is asked."""
        return Shards(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shards"}

    def encoded(self, i: int) -> bytes:
        family, row = self._place(i)
        image = bytes(self.shards.fields(family, row, ["image"])["image"])
        if not image:
            raise ValueError("the row has no picture")
        return image

    def name(self, i: int) -> str:
        return self.shards.named(*self._place(i))

    def piece(self, first: int, stop: int) -> Pictures:
        return _with(self, _rows=self._rows[first:stop])

    def _place(self, i: int) -> tuple[str, int]:
        row = self._rows[i]
        k = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._families[k], row - int(self._starts[k])


_Some = TypeVar("_Some", bound=Pictures)


def _with(pictures: _Some, **changed: Any) -> _Some:
    found = copy.copy(pictures)
    vars(found).update(changed)
    return found


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]

"""Rows of shards with codes in them, as pieces of a build."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ofa_ds.data.building.source import OneFile, Piece, Record, Row, source_file
from ofa_ds.data.shards import Shards
from ofa_ds.vision.code_rows import CodeTask
from ofa_ds.vision.encoding.journal import Journal


@dataclass(frozen=True)
class RowsPiece(OneFile):
    """Rows `first` ... `stop` - 1 of a family: those of one Arrow file."""

    folder: Path
    family: str
    first: int
    stop: int
    journal: Journal | None
    """Of the family that has codes."""
    code_key: str

    def key(self) -> Any:
        return ["codes", self.family, self.first, self.stop, self.file.name, self.code_key]

    def records(self, part: int) -> Iterator[Record]:
        shards = Shards(self.folder)
        texts = self.journal.texts(self.first, self.stop) if self.journal else None
        for number, i in enumerate(range(self.first, self.stop), 1):
            row = shards.row(self.family, i)
            if texts is not None:
                row = _with_codes(row, next(texts))
            yield Record(number, None, functools.partial(Row, row))


def _with_codes(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    if "codes" in row:
        return {**row, "codes": np.array(text.split(), np.int16)}
    return {**row, "answers": [(text, 1.0)]}


def pieces_of(shards: Shards, task: CodeTask, journal: Journal, code_key: str) -> dict[str, list[Piece]]:
    """A piece of each Arrow file, those of other families as they are."""
    pieces: dict[str, list[Piece]] = {}
    for family, part in shards.manifest.families.items():
        first = 0
        for shard in part.shards:
            file = source_file(str(shards.path / shard.file))
            mine = journal if family == task.family else None
            piece = RowsPiece(file, shards.path, family, first, first + shard.rows, mine, code_key)
            pieces.setdefault(family, []).append(piece)
            first += shard.rows
    return pieces

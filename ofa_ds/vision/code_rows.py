"""Rows that have image codes, of TSV files and of shards: which column they are in, and what they are of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ofa_ds.data import tsv
from ofa_ds.data.building.tsv_source import count_lines, cut, lines_of
from ofa_ds.data.shards import Shards


@dataclass(frozen=True, kw_only=True)
class CodeTask:
    """Where a task has its codes."""

    name: str
    family: str
    """Of its rows in shards."""
    columns: Mapping[int, int] = field(hash=False)
    """Columns of a TSV -> the place of the codes, from 0."""


INFILLING = CodeTask(name="image_infilling", family="image", columns={3: 2})
TEXT_TO_IMAGE = CodeTask(name="text_to_image", family="downstream", columns={3: 1, 4: 3})
"""(id, codes, caption), or (id, picture, caption, codes)."""

CODE_TASKS = {task.name: task for task in (INFILLING, TEXT_TO_IMAGE)}


class CodeRow(NamedTuple):
    place: str
    """For messages."""
    id: str
    codes: np.ndarray
    """int64 [n], of a square picture, row by row."""


def code_rows(source: Path, task: CodeTask) -> Iterator[CodeRow]:
    """Of a TSV file, plain or compressed, or of shards. Raises ValueError "place: ..." for what has no codes."""
    return _of_shards(source, task) if source.is_dir() else _of_tsv(source, task)


def count_rows(source: Path, task: CodeTask) -> int:
    """For progress. Raises ValueError as `code_rows`."""
    if not source.is_dir():
        return count_lines(cut([str(source)], 1 << 62)[0][0])
    return _opened(source, task).families[task.family]


def given_row(text: str) -> CodeRow:
    """Of codes on the command line. Raises ValueError."""
    try:
        return CodeRow("--codes", "codes", codes_of(text))
    except ValueError as error:
        raise ValueError(f"--codes: {error}") from error


def codes_of(text: str) -> np.ndarray:
    """Numbers with blanks between, as many as a square has -> int64 [n]. Raises ValueError."""
    words = text.split()
    for place, word in enumerate(words):
        if not (word.isascii() and word.isdigit() and len(word) <= 9):
            got = f"{tsv.short(word)} at place {place}"
            raise ValueError(f"want whole numbers of at least 0 with blanks between, got {got}")
    if not words or math.isqrt(len(words)) ** 2 != len(words):
        raise ValueError(f"want as many codes as a square has, such as 64, 256 or 1024, got {len(words)}")
    return np.array([int(word) for word in words], np.int64)


def column_of(task: CodeTask, width: int) -> int:
    """Place of the codes in a line of `width` columns. Raises ValueError."""
    if width not in task.columns:
        wanted = " or ".join(map(str, task.columns))
        raise ValueError(f"columns: want {wanted} with tabs between for {task.name}, got {width}")
    return task.columns[width]


def _of_tsv(source: Path, task: CodeTask) -> Iterator[CodeRow]:
    for number, line in lines_of(cut([str(source)], 1 << 62)[0][0]):
        place = f"{source}:{number}"
        try:
            columns = line.split(b"\t")
            text = tsv.decode_column("code", columns[column_of(task, len(columns))])
            yield CodeRow(place, tsv.decode_column("id", columns[0]), codes_of(text))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _opened(source: Path, task: CodeTask) -> Shards:
    shards = Shards(source)
    if task.family not in shards.families:
        raise ValueError(f"{source}: has no rows of {task.name}, only {', '.join(shards.families)}")
    return shards


def _of_shards(source: Path, task: CodeTask) -> Iterator[CodeRow]:
    shards = _opened(source, task)
    for i in range(shards.families[task.family]):
        row = shards.row(task.family, i)
        place = shards.named(task.family, i, row)
        try:
            yield CodeRow(place, row["id"], codes_of(_text(row)))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _text(row: Mapping[str, Any]) -> str:
    if "codes" in row:
        return " ".join(map(str, row["codes"].tolist()))
    return row["answers"][0][0] if row["answers"] else ""

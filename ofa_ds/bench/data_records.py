"""The rows that every format of `bench data` is given, and the form in which what they give back is compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ofa_ds.bench.photo_rows import SIZE, WORDS, photograph
from ofa_ds.data.columns import SCHEMAS, to_columns
from ofa_ds.data.shard_writer import row_digest
from ofa_ds.data.tsv import parse

FAMILY = "vision_language"
PHOTOGRAPHS = 400
"""Different ones; of more records several show the same."""
LISTS = ("answer_text", "answer_confidence", "box", "gt_objects")
"""Columns that formats without lists keep as JSON."""

Columns = dict[str, Any]
"""A row by the columns of `SCHEMAS[FAMILY]`, of plain Python values."""


class Records:
    """`records[i]` -> Columns; drawn from a seed, or lines of a TSV file. Picklable."""

    def __init__(self, number: int, source: Path | None = None, seed: int = 1) -> None:
        """source: a TSV file of vision-language rows; its first `number` lines count."""
        self._photographs: list[bytes] = []
        self._lines: list[Columns] = []
        self._seed = seed
        if source is None:
            rng = np.random.default_rng(seed)
            self._photographs = [photograph(rng) for _ in range(min(PHOTOGRAPHS, number))]
            self._number = number
        else:
            with source.open("rb") as file:
                for line, _ in zip(file, range(number), strict=False):
                    self._lines.append(to_columns(FAMILY, parse(FAMILY, line.rstrip(b"\n"))))
            self._number = len(self._lines)
        if not self._number:
            raise ValueError(f"{source or 'records'}: want at least one row")

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, i: int) -> Columns:
        return self._lines[i] if self._lines else self._drawn(i)

    def __iter__(self) -> Iterator[Columns]:
        return (self[i] for i in range(len(self)))

    def _drawn(self, i: int) -> Columns:
        draw = np.random.default_rng((self._seed, i)).integers(0, 1000, 20).tolist()
        words = [WORDS[k % len(WORDS)] for k in draw]
        kind = ("caption", "qa", "visual_grounding")[i % 3]
        x, y = draw[0] % (SIZE[0] // 2), draw[1] % (SIZE[1] // 2)
        box = (x, y, x + 100, y + 90) if kind == "visual_grounding" else (math.nan,) * 4
        return {
            "id": f"record{i}", "image": self._photographs[i % len(self._photographs)], "width": SIZE[0],
            "height": SIZE[1], "caption": "" if kind == "qa" else " ".join(words[:10]),
            "question": f"what is {' '.join(words[:6])}?" if kind == "qa" else "",
            "answer_text": words[10:12] if kind == "qa" else [],
            "answer_confidence": [1.0, 0.6] if kind == "qa" else [],
            "box": box, "gt_objects": words[12 : 12 + draw[2] % 4], "dataset": "photographs", "type": kind,
        }  # fmt: skip


def flat(row: Columns) -> Columns:
    """For formats without lists: those are one JSON text."""
    return {name: value for name, value in row.items() if name not in LISTS} | {
        "lists": json.dumps([list(row[name]) for name in LISTS])
    }


def unflat(row: Columns) -> Columns:
    """The other way round. Takes `row` over."""
    row.update(zip(LISTS, json.loads(row.pop("lists")), strict=True))
    return row


def digest(row: Columns) -> int:
    """Of a row however its format spells it: as columns, or as `Shards.row` gives it."""
    columns = to_columns(FAMILY, row) if "answers" in row else row
    found: Columns = {name: columns[name] for name in SCHEMAS[FAMILY].names}
    found["image"] = bytes(found["image"])
    found["width"], found["height"] = int(found["width"]), int(found["height"])
    for name in ("answer_text", "gt_objects"):
        found[name] = [str(value) for value in found[name]]
    found["answer_confidence"] = [float(value) for value in found["answer_confidence"]]
    found["box"] = [float(np.float32(value)) for value in found["box"]]
    return row_digest(found)


def checksum(digests: Iterator[int]) -> str:
    """Of rows in their order."""
    return xxhash.xxh3_64_hexdigest(np.fromiter(digests, np.uint64))

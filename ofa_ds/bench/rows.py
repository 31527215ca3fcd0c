"""Time to read one row of shards at random: our reader beside Arrow's own ways, and what else a picture costs."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.columns import from_columns
from ofa_ds.data.image import decode, resize
from ofa_ds.data.manifest import read_manifest
from ofa_ds.data.scenes import write_scenes
from ofa_ds.data.shards import Shards

ROWS = 2000
"""Of each family and repeat, drawn with replacement."""

SIDE = 384

Read = Callable[[int], Any]


class Mapped:
    """Rows of a family by Arrow alone, from mapped files; every record batch that was touched is kept."""

    def __init__(self, folder: Path, family: str) -> None:
        self.family = family
        shards = read_manifest(folder).families[family].shards
        self._readers = [pa.ipc.open_file(pa.memory_map(str(folder / shard.file))) for shard in shards]
        counts = [[reader.get_batch(k).num_rows for k in range(reader.num_record_batches)] for reader in self._readers]
        self._places = [(k, batch) for k, rows in enumerate(counts) for batch in range(len(rows))]
        self._ends = list(accumulate(number for rows in counts for number in rows))
        self._batches: dict[int, pa.RecordBatch] = {}

    def _batch(self, i: int, *, keep: bool = True) -> tuple[pa.RecordBatch, int]:
        number = bisect_right(self._ends, i)
        batch = self._batches.get(number) if keep else None
        if batch is None:
            k, at = self._places[number]
            batch = self._batches[number] = self._readers[k].get_batch(at)
        return batch, i - (self._ends[number - 1] if number else 0)

    def by_slice(self, i: int) -> dict[str, Any]:
        batch, j = self._batch(i)
        return from_columns(self.family, batch.slice(j, 1).to_pylist()[0])

    def by_scalar(self, i: int) -> dict[str, Any]:
        batch, j = self._batch(i)
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return from_columns(self.family, {name: column[j].as_py() for name, column in columns})

    def fetched(self, i: int) -> dict[str, Any]:
        """With nothing kept, as our reader keeps nothing."""
        batch, j = self._batch(i, keep=False)
        return from_columns(self.family, batch.slice(j, 1).to_pylist()[0])


def bench_rows(folder: Path | None, repeats: int) -> dict[str, dict[str, float]]:
    """Family -> way -> microseconds a row, median of `repeats` in turn. folder: shards; without it scenes are drawn."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            scenes = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_scenes(scenes / "tsv", rows=ROWS, seed=1)
            names = ("vision_language", "text", "image", "detection")
            sources = {name: [scenes / "tsv" / f"{name}_examples.tsv"] for name in names}
            build_shards(folder := scenes / "shards", **sources, workers=1)
        shards = Shards(folder)
        return {family: _one(shards, family, repeats) for family in shards.families}


def _one(shards: Shards, family: str, repeats: int) -> dict[str, float]:
    mapped = Mapped(shards.path, family)
    ways: dict[str, Read] = {
        "ours": lambda i: shards.row(family, i),
        "Arrow, slice of a kept batch": mapped.by_slice,
        "Arrow, scalars of a kept batch": mapped.by_scalar,
        "Arrow, batch fetched each time": mapped.fetched,
    }
    rows = np.random.default_rng(0).integers(shards.families[family], size=ROWS).tolist()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first finds the batches and fills the page cache
        for name, read in ways.items():
            taken[name].append(_per_row_us(read, rows))
    result = {name: statistics.median(times[1:]) for name, times in taken.items()}
    if "image" in shards.row(family, 0):
        few = rows[:100]
        view: Read = lambda i: resize(decode(shards.row(family, i)["image"]), SIDE, SIDE)  # noqa: E731
        result[f"row, decoded, {SIDE} px"] = statistics.median(_per_row_us(view, few) for _ in range(repeats))
    return result


def _per_row_us(read: Read, rows: list[int]) -> float:
    began = time.perf_counter()
    for i in rows:
        read(i)
    return (time.perf_counter() - began) / len(rows) * 1e6


def table(result: dict[str, dict[str, float]]) -> str:
    ways = dict.fromkeys(way for times in result.values() for way in times)
    lines = [f"{'microseconds a row':32}" + "".join(f"{family:>17}" for family in result)]
    for way in ways:
        cells = (f"{times[way]:17.1f}" if way in times else f"{'-':>17}" for times in result.values())
        lines.append(f"{way:32}" + "".join(cells))
    return "\n".join(lines)

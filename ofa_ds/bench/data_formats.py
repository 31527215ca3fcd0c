"""Our shards beside the formats that others keep training data in: the same rows, written, opened and read in one run.

Every format is written once, opened, and read in rounds that go through all formats in turn, so that the members of a
ratio meet the same machine. The first round of each order is not timed: it fills the page cache, and what it reads is
compared field by field with what was written. While times are taken each picture is hashed, so that a reader that does
not copy pays for its pages as well. CPU time is that of the process and of those it waited for.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ofa_ds.bench.data_peers import BLOCK, FORMATS, OURS, Format, Opened, installed
from ofa_ds.bench.data_records import Columns, Records, checksum, digest
from ofa_ds.progress import Progress

FEW = 200
"""Rows at random of a format that takes milliseconds for each."""

AT_RANDOM, BLOCKS, IN_ORDER = "at random", f"at random by {BLOCK}", "in order"


class Taken(NamedTuple):
    """Of one row, in microseconds."""

    wall_us: float
    cpu_us: float


def _cpu_s() -> float:
    mine, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return mine.ru_utime + mine.ru_stime + others.ru_utime + others.ru_stime


def _timed(work: Callable[[], object], rows: int) -> Taken:
    cpu, began = _cpu_s(), time.perf_counter()
    work()
    return Taken((time.perf_counter() - began) / rows * 1e6, (_cpu_s() - cpu) / rows * 1e6)


def _touch(rows: Iterable[Columns]) -> int:
    """Reads every picture."""
    found = 0
    for row in rows:
        found ^= xxhash.xxh3_64_intdigest(row["image"])
    return found


class Way(NamedTuple):
    """One way of reading one format: which rows, and a function that gives them anew at each call."""

    format: str
    order: str
    numbers: Sequence[int]
    rows: Callable[[], Iterable[Columns]]


def _ways(kind: Format, opened: Opened, permutation: list[int]) -> Iterator[Way]:
    numbers = permutation[:FEW] if kind.few else permutation
    if (row := opened.row) is not None:
        yield Way(kind.name, AT_RANDOM, numbers, lambda: map(row, numbers))
    if (block := opened.block) is not None:
        blocks = [numbers[k : k + BLOCK] for k in range(0, len(numbers), BLOCK)]
        yield Way(kind.name, BLOCKS, numbers, lambda: (row for part in blocks for row in block(part)))
    if opened.rows is not None:
        yield Way(kind.name, IN_ORDER, range(len(permutation)), opened.rows)


def bench_formats(number: int, repeats: int, source: Path | None = None, folder: Path | None = None) -> dict[str, Any]:
    """Writing, opening and reading of `number` rows by every format that is installed; medians of `repeats`.

    source: a TSV file of vision-language rows in place of drawn ones. folder: where it is written, seven times the
    pictures' size. Raises RuntimeError where a format gives back other rows than it was given.
    """
    records = Records(number, source)
    formats = [kind for kind in FORMATS if installed(kind.module)]
    with tempfile.TemporaryDirectory(dir=folder) as made, contextlib.ExitStack() as stack:
        steps = len(formats) * (repeats + 2)
        progress = stack.enter_context(contextlib.closing(Progress(steps, "bench data", "passes")))
        written, opening, ways = {}, {}, []
        permutation = np.random.default_rng(0).permutation(len(records)).tolist()
        for k, kind in enumerate(formats):
            place = Path(made) / str(k)
            place.mkdir()
            written[kind.name] = _written(kind, records, place)
            opened, opening[kind.name] = _opened(kind, place, repeats)
            ways += _ways(kind, opened, permutation)
            progress.add(1)
        _compare(ways, records)
        taken = _rounds(ways, repeats, progress)
    return {
        "rows": len(records), "repeats": repeats, "missing": [kind.name for kind in FORMATS if kind not in formats],
        "written": written, "opening_ms": opening,
        "read": {order: {name: found[order] for name, found in taken.items() if order in found}
                 for order in (AT_RANDOM, BLOCKS, IN_ORDER)},
        "ratios": _ratios(taken),
    }  # fmt: skip


def _written(kind: Format, records: Records, place: Path) -> dict[str, float]:
    taken = _timed(lambda: kind.write(records, place), len(records))
    drawing = _timed(lambda: [None for _ in records], len(records))  # making the rows is no format's work
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    wall_us, cpu_us = (max(a - b, 0.0) for a, b in zip(taken, drawing, strict=True))
    return {"wall_us": wall_us, "cpu_us": cpu_us, "bytes": size}


def _opened(kind: Format, place: Path, repeats: int) -> tuple[Opened, float]:
    """What it is opened as, and the milliseconds that takes once its modules are imported."""
    opened, times = kind.open(place), []
    for _ in range(repeats):
        began = time.perf_counter()
        opened = kind.open(place)
        times.append((time.perf_counter() - began) * 1e3)
    return opened, statistics.median(times)


def _compare(ways: Sequence[Way], records: Records) -> None:
    right = [digest(row) for row in records]
    for way in ways:
        want = checksum(right[i] for i in way.numbers)
        found = checksum(digest(row) for row in way.rows())
        if found != want:
            raise RuntimeError(f"{way.format}, {way.order}: checksum {found}, the rows that were written have {want}")


def _rounds(ways: Sequence[Way], repeats: int, progress: Progress) -> dict[str, dict[str, Taken]]:
    times: dict[tuple[str, str], list[Taken]] = {}
    for k in range(repeats + 1):
        for way in ways:
            taken = _timed(lambda way=way: _touch(way.rows()), len(way.numbers))  # type: ignore[misc]
            if k:
                times.setdefault((way.format, way.order), []).append(taken)
        progress.add(len({way.format for way in ways}))
    found: dict[str, dict[str, Taken]] = {}
    for (name, order), all_taken in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*all_taken, strict=True))
        found.setdefault(name, {})[order] = Taken(wall, cpu)
    return found


def _ratios(taken: dict[str, dict[str, Taken]]) -> dict[str, dict[str, float]]:
    """How many times as long as ours another takes, wall clock and CPU."""
    found: dict[str, dict[str, float]] = {}
    for order in (AT_RANDOM, BLOCKS, IN_ORDER):
        others = {name: each[order] for name, each in taken.items() if name != OURS and order in each}
        # Blocks of others are compared with our rows one by one.
        mine = taken[OURS][AT_RANDOM if order == BLOCKS else order]
        for name, other in others.items():
            found[f"{name}, {order}"] = {"wall": other.wall_us / mine.wall_us, "cpu": other.cpu_us / mine.cpu_us}
    return found


def table(result: dict[str, Any]) -> str:
    head = (
        "format",
        "write us",
        "write CPU",
        "MB",
        "open ms",
        "random",
        "CPU",
        f"by {BLOCK}",
        "CPU",
        "in order",
        "CPU",
    )
    lines = [
        f"{result['rows']} rows, medians of {result['repeats']}; reading in microseconds a row, wall clock and CPU"
    ]
    lines.append(f"{head[0]:26}" + "".join(f"{name:>11}" for name in head[1:]))
    for name, written in result["written"].items():
        cells = [written["wall_us"], written["cpu_us"], written["bytes"] / 1e6, result["opening_ms"][name]]
        for each in result["read"].values():
            cells += each.get(name, (None, None))
        lines.append(f"{name:26}" + "".join(f"{'-':>11}" if cell is None else f"{cell:11.1f}" for cell in cells))
    lines += ["", f"{'takes, of what ours takes':44}{'wall':>8}{'CPU':>8}"]
    lines += [f"{name:44}{each['wall']:7.1f}x{each['cpu']:7.1f}x" for name, each in result["ratios"].items()]
    lines.append("All gave back the rows that were written, field by field.")
    if result["missing"]:
        lines.append(f"Not installed, left out: {', '.join(result['missing'])} (pip install 'ofa-ds[bench]').")
    return "\n".join(lines)

"""Opening and reading shards at the scale of a billion rows, and what their order costs.

The billion rows are real: one file of small rows under as many names as there are shards (hard links), each with its
entries in the index and in the manifest.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ofa_ds.data.batch_index import index_file
from ofa_ds.data.columns import SCHEMAS
from ofa_ds.data.manifest import Family, Manifest, Source, fingerprint
from ofa_ds.data.order import BLOCK, Permutation
from ofa_ds.data.shard_writer import ShardWriter, Written
from ofa_ds.data.shards import Shards

FAMILY = "vision_language"
ROWS_A_SHARD = 100_000
READ = 2_000
"""Rows that a worker reads, each in another place."""
PHOTOGRAPHS, DECODED, SIDE = 20_000, 800, 384
FEWER = (1_000, 5_000)
"""Rows, the first of them, whose order is compared too: what of them is not pictures fits in a cache."""
PERMUTED = 1 << 24


@dataclass(frozen=True)
class Opened:
    """What one process saw."""

    open_ms: float
    first_and_last_us: float
    row_us: float
    private_MiB: float
    """Memory of its own after opening and two rows; a mapped file's pages are not."""
    share_MiB: float
    """Its share of all memory (PSS) after reading, less what it had before."""


def _row(i: int, image: bytes) -> dict[str, Any]:
    return {
        "id": str(i), "image": image, "width": 480, "height": 360, "caption": f"a picture of {i}", "question": "",
        "answers": [], "box": None, "gt_objects": ["dog"], "dataset": "scale", "type": "caption",
    }  # fmt: skip


def _write(path: Path, images: Sequence[bytes], rows: int) -> Written:
    writer = ShardWriter(path, FAMILY)
    for i in range(rows):
        writer.add(_row(i, images[i % len(images)]), len(images[0]))
    written = writer.close()
    assert written is not None
    return written


def _finish(folder: Path, written: Written, shards: int) -> None:
    """Index and manifest of a file that is there under this many names."""
    first = written.shard
    files = [replace(first, file=f"{FAMILY}-{number:05d}.arrow") for number in range(shards)]
    for shard in files[1:]:
        os.link(folder / files[0].file, folder / shard.file)
    with index_file(folder, FAMILY).open("wb") as file:
        for _ in files:
            file.write(written.entries.tobytes())
    rows = shards * first.rows
    family = Family(
        rows=rows, types={"caption": rows}, quarantined=0, digest=first.digest, sources=(Source("made", rows, 0),),
        shards=tuple(files),
    )  # fmt: skip
    families = {FAMILY: family}
    Manifest(families=families, negatives={}, fingerprint=fingerprint(families, {})).write(folder)


def make(folder: Path, shards: int, rows: int = ROWS_A_SHARD) -> Path:
    """`shards` shards of `rows` small rows each; their ids are numbers within a shard."""
    folder.mkdir()
    _finish(folder, _write(folder / f"{FAMILY}-00000.arrow", [b"0123456789"], rows), shards)
    return folder


def _memory_MiB(name: str) -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _open(folder: Path, seed: int, barrier: Any, results: Any) -> None:
    """Runs in a process of its own. All have read before any looks at its share."""
    private, share = _memory_MiB("Anonymous"), _memory_MiB("Pss")
    barrier.wait()
    began = time.perf_counter()
    shards = Shards(folder)
    opened = time.perf_counter()
    last = shards.families[FAMILY] - 1
    shards.row(FAMILY, 0), shards.row(FAMILY, last)
    both = time.perf_counter()
    private = _memory_MiB("Anonymous") - private
    rows = shards.manifest.families[FAMILY].shards[0].rows
    numbers = [random.Random(seed).randrange(last) for _ in range(READ)]
    started = time.perf_counter()
    for i in numbers:
        assert shards.row(FAMILY, i)["id"] == str(i % rows)
    row_us = (time.perf_counter() - started) / READ * 1e6
    barrier.wait()
    share = _memory_MiB("Pss") - share
    barrier.wait()
    results.put(Opened((opened - began) * 1e3, (both - opened) * 1e6, row_us, private, share))


def opened(folder: Path, workers: int) -> list[Opened]:
    """What each of `workers` processes saw that opened the same shards at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=_open, args=(folder, k, barrier, results)) for k in range(workers)]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return found


def permutation() -> dict[str, float]:
    """Million rows a second and MiB of a permutation of a billion, beside numpy's of an array as long as is timed."""
    order = Permutation(1_000_000_000, seed=1, epoch=0)
    index = np.arange(PERMUTED)

    def ours() -> None:
        for start in range(0, PERMUTED, BLOCK):
            order.at(index[start : start + BLOCK])

    generator = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"ours": [], "numpy": []}
    for _ in range(3):
        for name, way in (("ours", ours), ("numpy", lambda: generator.permutation(PERMUTED))):
            rates[name].append(PERMUTED / _seconds(way) / 1e6)
    tracemalloc.start()
    ours()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return {name: statistics.median(values) for name, values in rates.items()} | {"peak_MiB": peak}


def _seconds(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def photographs(folder: Path, rows: int) -> Path:
    """Shards of JPEG pictures of noise on a gradient, 480 x 360, about 40 kB each."""
    folder.mkdir()
    generator, images = np.random.default_rng(0), []
    ramp = np.linspace(0, 160, 480)[None, :, None] + np.linspace(0, 60, 360)[:, None, None]
    for _ in range(64):
        noise = generator.normal(0, 14, (360, 480, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
        images.append(file.getvalue())
    _finish(folder, _write(folder / f"{FAMILY}-00000.arrow", images, rows), 1)
    return folder


def orders(folder: Path, repeats: int) -> dict[str, tuple[float, float]]:
    """What is done -> CPU microseconds a row, in the order of the files and in that of an epoch, from memory.

    Each is the median of `repeats`, in which both orders take turns.
    """
    from ofa_ds.data.image import decode, resize  # torch: not in the processes whose memory is measured

    shards = Shards(folder)
    count = shards.families[FAMILY]
    others = [name for name in SCHEMAS[FAMILY].names if name != "image"]

    def prepare(rows: Sequence[int]) -> None:
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            shards.announce((FAMILY, i) for i in part)
            for i in part:
                resize(decode(shards.row(FAMILY, i)["image"]), SIDE, SIDE)

    def read(rows: Sequence[int]) -> None:
        for i in rows:
            shards.row(FAMILY, i)

    def read_of_each(names: Sequence[str]) -> Callable[[Sequence[int]], None]:
        def way(rows: Sequence[int]) -> None:
            for i in rows:
                shards.fields(FAMILY, i, names)

        return way

    cases = [(f"{few:,} rows", read, few, few) for few in FEWER if few < count]
    cases += [
        (f"{count:,} rows", read, count, count), ("their pictures alone", read_of_each(["image"]), count, count),
        ("all but their pictures", read_of_each(others), count, count),
        ("rows, decoded and resized", prepare, min(count, DECODED), count),
    ]  # fmt: skip
    read(range(count))
    return {name: _in_both_orders(way, few, among, repeats) for name, way, few, among in cases}


def _in_both_orders(way: Callable[[Sequence[int]], None], few: int, among: int, repeats: int) -> tuple[float, float]:
    """few: rows that are read; when shuffled, of the first `among`."""
    shuffled = Permutation(among, seed=1, epoch=0).at(np.arange(few)).tolist()
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for times, rows in zip(taken, (list(range(few)), shuffled), strict=True):
            began = time.process_time()
            way(rows)
            times.append((time.process_time() - began) / few * 1e6)
    return statistics.median(taken[0]), statistics.median(taken[1])


def bench_scale(
    shards: int, workers: int, repeats: int, folder: Path | None = None, *, rows: int = ROWS_A_SHARD
) -> dict[str, Any]:
    """rows: of each shard. folder: where two gigabytes may be written for a while."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        small, large = make(Path(place) / "small", 10, rows), make(Path(place) / "large", shards, rows)
        result: dict[str, Any] = {"shards": shards, "rows": shards * rows, "workers": workers}
        result["small"] = [vars(each) for each in opened(small, 1)]
        result["large"] = [vars(each) for each in opened(large, workers)]
        result["permutation"] = permutation()
        result["orders"] = orders(photographs(Path(place) / "photographs", PHOTOGRAPHS), repeats)
    return result


def table(result: dict[str, Any]) -> str:
    lines = [f"{'':38}{'10 shards':>12}{result['shards']:>10} shards, {result['workers']} workers at once"]
    names = {
        "open_ms": "opening, ms", "first_and_last_us": "first and last row, us", "row_us": "a row at random, us",
        "private_MiB": "memory of its own, MiB",
    }  # fmt: skip
    for key, name in names.items():
        small, large = (max(each[key] for each in result[size]) for size in ("small", "large"))
        lines.append(f"{name:38}{small:12.2f}{large:17.2f}")
    share = [sum(each["share_MiB"] for each in result[size]) for size in ("small", "large")]
    lines.append(f"{'memory of all workers together, MiB':38}{share[0]:12.1f}{share[1]:17.1f}")
    rates = result["permutation"]
    ratio = rates["ours"] / rates["numpy"]
    lines.append(
        f"permutation of 10^9: {rates['ours']:.0f} M rows/s in {rates['peak_MiB']:.1f} MiB, numpy's array "
        f"{rates['numpy']:.0f} M rows/s ({ratio:.1f} x)"
    )
    for name, (straight, shuffled) in result["orders"].items():
        lines.append(
            f"{name}: {straight:.1f} us of CPU in order, {shuffled:.1f} shuffled ({shuffled / straight - 1:+.1%})"
        )
    return "\n".join(lines)

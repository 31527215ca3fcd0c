"""How fast `ofa-ds shards verify --no-decode` reads shards, beside a plain read of the same files, by turns."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ofa_ds.data.manifest import read_manifest
from ofa_ds.data.shards_verify import verify_shards
from ofa_ds.storage.direct import set_direct

BLOCK = 4 << 20
WORKERS = (1, 2)


def bench_verify(shards: Path, repeats: int) -> dict[str, Any]:
    """Bytes a second by way. Raises ValueError for what is no shards, or damaged ones."""
    families = read_manifest(shards).families.values()
    files = [shards / shard.file for family in families for shard in family.shards]
    num_bytes = sum(path.stat().st_size for path in files)
    ways: dict[str, Callable[[], None]] = {}
    for workers in WORKERS:
        ways[f"plain read, {workers} threads"] = lambda workers=workers: _read(files, workers)
        ways[f"verify, {workers} workers"] = lambda workers=workers: _verify(shards, workers)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            _drop(files)
            began = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - began)
    rates = {way: num_bytes / statistics.median(each) for way, each in seconds.items()}
    return {"num_bytes": num_bytes, "files": len(files), "seconds": seconds, "bytes_per_second": rates}


def _drop(files: list[Path]) -> None:
    """From the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that are not written yet stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _verify(shards: Path, workers: int) -> None:
    if problems := verify_shards(shards, workers=workers, decode=False):
        raise ValueError(problems[0])


def _read(files: list[Path], threads: int) -> None:
    """As `dd iflag=direct bs=4M` does, of each file as many parts as there are threads."""
    parts = []
    for path in files:
        each = -(-path.stat().st_size // BLOCK // threads) * BLOCK
        parts += [(path, each * k, each * (k + 1) if k + 1 < threads else path.stat().st_size) for k in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_read_part, parts))


def _read_part(part: tuple[Path, int, int]) -> None:
    path, at, stop = part
    buffer = mmap.mmap(-1, BLOCK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        set_direct(descriptor, True)
        while at < stop and (got := os.preadv(descriptor, [buffer], at)):
            at += got
    finally:
        os.close(descriptor)


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['num_bytes'] / 1e9:.2f} GB in {result['files']} files, none of it in the page cache"]
    rates = result["bytes_per_second"]
    for way, rate in rates.items():
        plain = rates[f"plain read, {way.split()[-2]} threads"] if way.startswith("verify") else rate
        lines.append(f"{way:26}{rate / 1e6:>8.0f} MB/s{rate / plain:>8.0%}")
    return "\n".join(lines)

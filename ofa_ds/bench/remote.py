"""Rows of shards in an object store far away: in order and shuffled, cold and warm, with and without reading ahead.

The store is moto's S3 server behind `slow_link`, which adds latency and caps the bandwidth; what is read ahead well
takes as long as the cap says, whatever the latency.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ofa_ds.bench.photo_rows import photograph
from ofa_ds.bench.s3_server import make_bucket, s3_server, settings
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.remote.folder import CACHE
from ofa_ds.data.shards import Shards
from ofa_ds.storage import file_systems

PHOTOGRAPHS, TEXTS = 1600, 20_000
"""Rows: record batches of 10 MB, and of 60 kB."""
AT_ONCE, AHEAD = 20, 256
"""Rows that are read together, and announced before they are: those of a step of a rank."""


@contextmanager
def _behind_a_link(address: str, delay_ms: float, mb_per_s: float) -> Iterator[str]:
    """The address of the same service behind the link."""
    service = address.removeprefix("http://")
    command = [sys.executable, "-m", "ofa_ds.bench.slow_link", service, str(delay_ms), str(mb_per_s)]
    link = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(link.stdout.readline())}"
    finally:
        link.kill()
        link.wait()


def _build(folder: Path) -> None:
    rng = np.random.default_rng(1)
    photographs = [base64.b64encode(photograph(rng)).decode() for _ in range(32)]
    pairs = (f"p{i}\t{photographs[i % 32]}\ta caption of it\t\t\t\tphotos\tcaption\n" for i in range(PHOTOGRAPHS))
    (folder / "vision_language.tsv").write_text("".join(pairs))
    letters = rng.integers(97, 123, (TEXTS, 220)).astype(np.uint8)
    (folder / "text.tsv").write_text("".join(f"t{i}\t{bytes(row).decode()}\n" for i, row in enumerate(letters)))
    sources = {family: [folder / f"{family}.tsv"] for family in ("vision_language", "text")}
    build_shards(folder / "shards", **sources, workers=1)


def bench_remote(delay_ms: float, mb_per_s: float) -> list[dict[str, Any]]:
    """Of each family, order and way: rows/s, and of a cold one the share of the bandwidth that it used."""
    with (
        tempfile.TemporaryDirectory() as base,
        s3_server() as near,
        _behind_a_link(near, delay_ms, mb_per_s) as far,
    ):
        folder = Path(base)
        _build(folder)
        os.environ |= settings(near) | {CACHE: str(folder / "cache")}
        bucket = make_bucket(near, "bench")
        for path in (path for path in (folder / "shards").rglob("*") if path.is_file()):
            file_systems.upload(path, f"{bucket}/set/{path.relative_to(folder / 'shards')}")
        os.environ["AWS_ENDPOINT_URL"] = far
        cases = [(family, shuffled) for family in ("vision_language", "text") for shuffled in (False, True)]
        return [found for case in cases for found in _case(folder / "cache", *case, mb_per_s)]


def _case(cache: Path, family: str, shuffled: bool, mb_per_s: float) -> Iterator[dict[str, Any]]:
    for way in ("cold", "cold, read ahead", "warm"):
        if way != "warm":
            shutil.rmtree(cache, ignore_errors=True)
        shards = Shards("s3://bench/set")
        order = np.arange(shards.families[family])
        rows = (np.random.default_rng(1).permutation(order) if shuffled else order).tolist()
        began = time.perf_counter()
        _read(shards, family, rows, AHEAD if way == "cold, read ahead" else 0)
        took_s = time.perf_counter() - began
        found = {"rows": family, "order": "shuffled" if shuffled else "in order", "way": way}
        num_bytes = sum(path.stat().st_size for path in (cache / "batches").rglob("*.arrow.*"))
        share = num_bytes / 1e6 / took_s / mb_per_s if way != "warm" else None
        yield found | {"rows_per_s": len(rows) / took_s, "share_of_bandwidth": share}


def _read(shards: Shards, family: str, rows: list[int], ahead: int) -> None:
    to_announce = iter(rows)
    shards.announce((family, i) for i in islice(to_announce, ahead))
    for start in range(0, len(rows), AT_ONCE):
        if ahead:
            shards.announce((family, i) for i in islice(to_announce, AT_ONCE))
        for i in rows[start : start + AT_ONCE]:
            shards.row(family, i)


def table(result: list[dict[str, Any]]) -> str:
    lines = [f"{'rows':18}{'order':10}{'way':18}{'rows/s':>10}{'of the bandwidth':>18}"]
    for found in result:
        share = "" if found["share_of_bandwidth"] is None else f"{found['share_of_bandwidth']:.0%}"
        lines.append(f"{found['rows']:18}{found['order']:10}{found['way']:18}{found['rows_per_s']:10.0f}{share:>18}")
    return "\n".join(lines)

"""Readers of remote shards are killed at random instants, several at once: the next reads the same rows."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_sources import write_sources

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.remote.cache import CACHE_BYTES, USED, BatchCache
from ofa_ds.data.remote.folder import CACHE
from ofa_ds.data.shard_writer import row_digest
from ofa_ds.data.shards import Shards
from ofa_ds.storage import file_systems

READER = [sys.executable, str(Path(__file__).with_name("remote_reader.py"))]


def check(line: str, digests: dict[tuple[str, int], int]) -> None:
    family, i, digest = line.split()
    assert digests[family, int(i)] == int(digest)


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_readers_that_are_killed_leave_a_cache_that_gives_the_same_rows(
    kills: int, bucket: str, tmp_path: Path
) -> None:
    build_shards(tmp_path / "shards", **write_sources(tmp_path), workers=1, rows_per_shard=2)
    local = Shards(tmp_path / "shards")
    keys = [(family, i) for family, count in local.families.items() for i in range(count)]
    digests = {key: row_digest(local.row(*key)) for key in keys}
    size = 0
    for path in (path for path in (tmp_path / "shards").rglob("*") if path.is_file()):
        file_systems.upload(path, f"{bucket}/set/{path.relative_to(tmp_path / 'shards')}")
        size += path.stat().st_size
    cache = tmp_path / "cache"
    environment = os.environ | {CACHE: str(cache), CACHE_BYTES: str(size // 2)}  # so that room is made all the time
    draw, read = random.Random(kills), 0
    for number in range(0, kills, 3):
        readers = [
            subprocess.Popen([*READER, f"{bucket}/set", str(number + k), "100000"], env=environment,
                             stdout=subprocess.PIPE, text=True)
            for k in range(3)
        ]  # fmt: skip
        assert all(reader.stdout.readline() == "ready\n" for reader in readers)
        for reader in readers:
            wanted = draw.choice([0, draw.randrange(1, 60)])  # while it opens them, or after so many rows
            lines = [reader.stdout.readline() for _ in range(wanted)]
            time.sleep(draw.uniform(0, 0.02 if wanted else 0.5))
            reader.send_signal(signal.SIGKILL)
            lines += reader.communicate()[0].splitlines(keepends=True)
            assert reader.returncode == -signal.SIGKILL
            for line in (line for line in lines if line.endswith("\n")):
                check(line, digests)
                read += 1
    assert read > kills
    done = subprocess.run([*READER, f"{bucket}/set", "0", "300"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == 300
    for line in lines:
        check(line, digests)
    files = (path for path in (cache / "batches").rglob("*") if path.is_file() and path.name != USED)
    kept = sum(path.stat().st_size for path in files)
    counted = BatchCache(cache / "batches", size // 2).used()
    assert kept <= counted <= size // 2, "not a byte above the bound, and none that is not counted"

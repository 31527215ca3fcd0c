"""`bench verify` and `bench remote`, small: every figure is there, every way gives the rows that are in the files."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from tiny_sources import write_sources

from ofa_ds.bench import __main__ as command
from ofa_ds.bench import remote, slow_link, verify
from ofa_ds.bench.photo_rows import photograph
from ofa_ds.bench.s3_server import settings
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.remote.folder import CACHE
from ofa_ds.data.shard_writer import row_digest
from ofa_ds.data.shards import Shards


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    command.main()
    return capsys.readouterr().out


def test_shards_are_verified_and_read_by_as_many_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_shards(tmp_path / "shards", **write_sources(tmp_path), workers=1)
    result = json.loads(run(monkeypatch, capsys, "verify", "--shards", tmp_path / "shards", "--repeats", 1, "--json"))
    files = list((tmp_path / "shards").glob("*.arrow"))
    assert result["files"] == len(files) and result["num_bytes"] == sum(path.stat().st_size for path in files)
    ways = [way for n in verify.WORKERS for way in (f"plain read, {n} threads", f"verify, {n} workers")]
    assert list(result["bytes_per_second"]) == ways and min(result["bytes_per_second"].values()) > 0
    assert all(len(each) == 1 for each in result["seconds"].values())
    assert [line.split("  ")[0] for line in verify.table(result).splitlines()[1:]] == ways


def test_damaged_shards_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_shards(tmp_path / "shards", **write_sources(tmp_path), workers=1)
    path = next((tmp_path / "shards").glob("*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for folder, message in ((tmp_path / "shards", f"{path}: record batch 0"), (tmp_path, "no shards there")):
        with pytest.raises(SystemExit):
            run(monkeypatch, capsys, "verify", "--shards", folder, "--repeats", 1)
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("num_bytes", [0, 1, 3 * 4096 + 5])
def test_a_plain_read_reads_every_byte_once(num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "file").write_bytes(bytes(num_bytes))
    monkeypatch.setattr(verify, "BLOCK", 4096)
    read: list[int] = []

    def preadv(descriptor: int, buffers: list, at: int) -> int:
        got = real(descriptor, buffers, at)
        read.append(got)
        return got

    real = verify.os.preadv
    monkeypatch.setattr(verify.os, "preadv", preadv)
    for threads in verify.WORKERS:
        read.clear()
        verify._read([path], threads)
        assert sum(read) == num_bytes


def test_every_way_to_read_from_afar_gives_the_rows_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*settings(""), CACHE):
        monkeypatch.setenv(name, "")  # so that what the bench sets goes with the test
    monkeypatch.setattr(remote, "PHOTOGRAPHS", 3)
    monkeypatch.setattr(remote, "TEXTS", 30)
    seen: dict[tuple[str, int], list[int]] = defaultdict(list)

    class Recorded(Shards):
        def row(self, family: str, i: int) -> dict:
            row = super().row(family, i)
            seen[family, i].append(row_digest(row))
            return row

    monkeypatch.setattr(remote, "Shards", Recorded)
    result = json.loads(run(monkeypatch, capsys, "remote", "--latency-ms", 1, "--mb-per-s", 1000, "--json"))
    remote._build(tmp_path)
    here = Shards(tmp_path / "shards")
    assert here.families == {"vision_language": 3, "text": 30}
    rows = [(family, i) for family, number in here.families.items() for i in range(number)]
    wanted = {place: [row_digest(here.row(*place))] * 6 for place in rows}
    assert seen == wanted
    assert len({(each["rows"], each["order"], each["way"]) for each in result}) == len(result) == 2 * 2 * 3
    assert all(each["rows_per_s"] > 0 for each in result)
    assert all((each["share_of_bandwidth"] is None) == (each["way"] == "warm") for each in result)
    lines = remote.table(result).splitlines()
    assert len(lines) == 13 and lines[2].startswith("vision_language   in order  cold, read ahead")


def test_a_link_changes_no_byte_and_takes_what_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the link's own: it counts what was waited for."""
    data = photograph(np.random.default_rng(0))
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await real(0)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(len(data)))
        await writer.drain()
        writer.close()

    async def through() -> tuple[bytes, float]:
        service = await asyncio.start_server(echo, "127.0.0.1", 0)
        link = slow_link.Link("127.0.0.1", service.sockets[0].getsockname()[1], 1000.0, 1e4)
        server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        began = asyncio.get_running_loop().time()
        writer.write(data)
        got = await reader.readexactly(len(data))
        writer.close()
        server.close()
        service.close()
        return got, link._free_at - began

    real = asyncio.sleep
    monkeypatch.setattr(slow_link.asyncio, "sleep", sleep)
    got, taken_s = asyncio.run(through())
    assert got == data
    assert taken_s >= len(data) / 1e4, "the cap"
    assert waited[0] == 1000.0, "the handshake"
    assert max(waited[1:]) > 900.0, "an answer takes the latency too"

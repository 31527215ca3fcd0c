"""Shards in an object store give the same rows as here, from a bounded cache, whatever happens on the way."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
from tiny_sources import write_sources

from ofa_ds.bench.s3_server import write_bytes
from ofa_ds.cli import main
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.remote import fetching, folder
from ofa_ds.data.remote.cache import CACHE_BYTES, BatchCache
from ofa_ds.data.shards import Shards
from ofa_ds.storage import file_systems


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("remote")
    build_shards(base / "shards", **write_sources(base), workers=1, rows_per_shard=4)
    return base / "shards"


@pytest.fixture
def remote(local: Path, bucket: str) -> str:
    """The same shards in a bucket."""
    for path in local.rglob("*"):
        if path.is_file():
            file_systems.upload(path, f"{bucket}/set/{path.relative_to(local)}")
    return f"{bucket}/set"


def rows(shards: Shards) -> list[str]:
    found = [(family, shards.row(family, i)) for family, count in shards.families.items() for i in range(count)]
    return [repr(row) for row in found]


def test_rows_negatives_and_fingerprint_are_those_of_the_same_shards_here(local: Path, remote: str) -> None:
    here, there = Shards(local), Shards(remote)
    assert rows(there) == rows(here) and there.fingerprint == here.fingerprint
    assert list(there.negatives.captions) == list(here.negatives.captions)
    kinds = ["caption"]
    assert list(there.rows_of_types("vision_language", kinds)) == list(here.rows_of_types("vision_language", kinds))
    assert rows(pickle.loads(pickle.dumps(there))) == rows(here)
    assert there.where("text", 5) == here.where("text", 5)


def test_building_into_a_bucket_is_building_here(local: Path, bucket: str, tmp_path: Path) -> None:
    given = write_sources(tmp_path)
    for family, paths in given.items():
        file_systems.upload(paths[0], f"{bucket}/tsv/{family}.tsv")
    remote = {family: [f"{bucket}/tsv/{family}.ts*"] for family in given}
    build_shards(f"{bucket}/built", **remote, workers=2, rows_per_shard=4, work=tmp_path / "work")
    for path in (path for path in local.rglob("*") if path.is_file()):
        found = file_systems.read_bytes(f"{bucket}/built/{path.relative_to(local)}", 1 << 30)
        assert found == path.read_bytes(), path.name
    with pytest.raises(ValueError, match="shards are there already"):
        build_shards(f"{bucket}/built", **remote, work=tmp_path / "work")
    with pytest.raises(ValueError, match="--work.*want one"):
        build_shards(f"{bucket}/other", **remote)
    with pytest.raises(ValueError, match="--work.*want none"):
        build_shards(str(tmp_path / "other"), **remote, work=tmp_path / "work")


def test_the_command_line_builds_and_reads_and_names_what_is_not_there(bucket: str, tmp_path: Path, capsys) -> None:
    (path := tmp_path / "a.tsv").write_text("1\tone\n2\ttwo\n")
    build = ["shards", "build", "--out", f"{bucket}/x", "--work", str(tmp_path / "w"), "--text", str(path)]
    (tmp_path / "w" / "mine").mkdir(parents=True)
    assert main(build) == 0 and list((tmp_path / "w").iterdir()) == [tmp_path / "w" / "mine"], "a user's own is kept"
    assert main(["vocab", "train", "--shards", f"{bucket}/x", "--size", "260", "--out", str(tmp_path / "v")]) == 0
    capsys.readouterr()
    assert main(["vocab", "train", "--shards", f"{bucket}/y", "--size", "260", "--out", str(tmp_path / "w")]) != 0
    assert f"{bucket}/y: no shards there" in "".join(capsys.readouterr())


def test_what_was_fetched_once_is_read_from_the_cache(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows(Shards(remote))
    again = Shards(remote)
    monkeypatch.setattr(fetching.RemoteFile, "read", lambda *_: pytest.fail("fetched again"))
    assert rows(again) == first


def wait(shards: Shards) -> None:
    """Until what was announced is there."""
    ahead = shards._remote._ahead
    while ahead._waiting or ahead._running:
        time.sleep(0.005)


def test_announced_rows_are_fetched_ahead(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(remote)
    wanted = [("text", 0), ("detection", 4), ("vision_language", 20)]
    shards.announce([*wanted, ("text", 10**9)])
    wait(shards)
    monkeypatch.setattr(fetching.RemoteFile, "read", lambda *_: pytest.fail("fetched when it was read"))
    assert [shards.row(family, i)["id"] for family, i in wanted] == ["t0", "d4", "vl20"]


def test_the_cache_keeps_within_its_bound(remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    everything = rows(Shards(remote))
    cache = tmp_path / "cache" / "batches"
    size = sum(path.stat().st_size for path in cache.rglob("*.arrow.*"))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv(CACHE_BYTES, str(size // 3))
    assert rows(Shards(remote)) == everything
    assert 0 < sum(path.stat().st_size for path in cache.rglob("*.arrow.*")) <= size // 3
    monkeypatch.setenv(CACHE_BYTES, "100")
    assert rows(Shards(remote)) == everything, "larger than the cache: from memory"
    monkeypatch.setenv(CACHE_BYTES, "much")
    with pytest.raises(ValueError, match="OFA_DS_CACHE_BYTES: want a number of bytes, got 'much'"):
        Shards(remote)


def test_a_changed_file_is_refused_by_name(remote: str, local: Path, tmp_path: Path) -> None:
    path = local / "text-00000.arrow"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    write_bytes(f"{remote}/{path.name}", bytes(data))
    with pytest.raises(RuntimeError, match=f"set/{path.name}: record batch 0 has checksum .*upload the shards again"):
        Shards(remote).row("text", 0)
    write_bytes(f"{remote}/{path.name}", bytes(data) + b"more")
    with pytest.raises(RuntimeError, match=f"{path.name}: want {len(data)} bytes as in manifest.json"):
        Shards(remote).row("text", 0)


def test_a_failing_service_is_tried_again_and_told(remote: str, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.001)
    opened, fails = file_systems.open_input, iter([True, True, False])

    def sometimes(location):
        if str(location).endswith(".arrow") and next(fails, False):
            raise OSError("the way is closed")
        return opened(location)

    monkeypatch.setattr(file_systems, "open_input", sometimes)
    assert Shards(remote).row("text", 0)["id"] == "t0"
    assert capfd.readouterr().err.count("the way is closed; try ") == 2
    monkeypatch.setattr(file_systems, "open_input", lambda location: (_ for _ in ()).throw(OSError("closed for good")))
    monkeypatch.setattr(fetching, "OPENING_S", 0.0)
    with pytest.raises(OSError, match=f"{remote}/manifest.json: closed for good; given up after 1 tries in 0 s: see"):
        Shards(remote)


def cached(tmp_path: Path, name: str) -> Path:
    return next((tmp_path / "cache").rglob(name))


def test_a_batch_that_was_cut_in_the_cache_is_fetched_again(remote: str, tmp_path: Path, capfd) -> None:
    want = rows(Shards(remote))
    os.truncate(path := cached(tmp_path, "text-00000.arrow.0"), 0)
    assert rows(Shards(remote)) == want and path.stat().st_size
    assert f"{path}: want" in (told := capfd.readouterr().err) and "damaged in the cache; fetched again" in told


def test_verifying_readers_heal_a_batch_that_was_changed_in_the_cache(remote: str, tmp_path: Path, capfd) -> None:
    right = Shards(remote).row("text", 0)
    path = cached(tmp_path, "text-00000.arrow.0")
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    assert Shards(remote, verify=True).row("text", 0) == right and path.read_bytes() == whole
    assert f"{path}: has checksum" in capfd.readouterr().err


def test_indices_are_checked_when_they_come_and_fetched_again_when_cut(remote: str, tmp_path: Path) -> None:
    want = rows(Shards(remote))
    os.truncate(path := cached(tmp_path, "text.index"), 3)
    left = path.with_name(f".{path.name}.1.1")
    left.write_bytes(b"of a killed process")
    os.utime(left, (0, 0))
    assert rows(Shards(remote)) == want and not left.exists()
    whole = path.read_bytes()
    write_bytes(f"{remote}/{path.name}", bytes(len(whole)))
    path.unlink()
    with pytest.raises(RuntimeError, match="set/text.index: .*upload the shards again"):
        Shards(remote)
    assert not path.exists()


def test_batches_without_room_on_the_disk_take_bounded_memory(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_BYTES, "100")
    monkeypatch.setattr(folder, "MAX_IN_MEMORY", 2000)
    shards = Shards(remote)
    rows(shards)
    held = [len(each.data) for each in shards._remote._mapped.values()]
    assert len(held) == 1 or sum(held) <= 2000


def test_threads_that_want_one_batch_fetch_it_once(tmp_path: Path) -> None:
    cache, fetched = BatchCache(tmp_path, 1000), []

    def fetch() -> bytes:
        fetched.append(1)
        return b"x" * 10

    threads = [threading.Thread(target=cache.get, args=("a/b.0", fetch)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1 and (tmp_path / "a/b.0").read_bytes() == b"x" * 10
    assert not list(tmp_path.rglob("*.part"))


def test_what_killed_processes_left_is_cleared_and_never_read(tmp_path: Path) -> None:
    cache = BatchCache(tmp_path, 30)
    for name in ("a.0.part", "b.0.part"):
        (tmp_path / name).write_bytes(b"half of it")
    assert cache.get("a.0", lambda: b"y" * 10).read_bytes() == b"y" * 10
    for number in range(5):
        cache.get(f"c.{number}", lambda: b"z" * 10)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "used")[0][0] == "c"
    assert not list(tmp_path.glob("*.part")) and sum(p.stat().st_size for p in tmp_path.glob("c.*")) <= 30


def test_locations_are_told_apart() -> None:
    assert file_systems.is_remote("s3://a/b") and file_systems.is_remote("hdfs://a/b")
    assert not file_systems.is_remote("/a/b") and not file_systems.is_remote("file:///a/b")
    assert str(file_systems.local_path("file:///a/b")) == "/a/b"
    for location, message in (("ftp://a/b", "want a path or one of s3://"), ("s3:///x", "want s3://BUCKET/NAME")):
        with pytest.raises(ValueError, match=message):
            file_systems.file_system(location)
    with pytest.raises(ValueError, match="fits no file"):
        file_systems.expand([f"{os.sep}nowhere-at-all/*.tsv"])

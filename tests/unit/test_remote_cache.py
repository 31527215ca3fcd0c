"""The cache of remote shards counts its bytes exactly and keeps its bound; what nobody uses any longer goes."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ofa_ds.data.remote import cache as cache_file
from ofa_ds.data.remote import mirror as mirror_file
from ofa_ds.data.remote.cache import PART, USED, BatchCache
from ofa_ds.data.remote.mirror import KEPT_S, Mirror, remove_forgotten

CHANGES = ("pwrite", "truncate", "ftruncate", "rename", "unlink", "utime", "fsync", "close")
"""Calls of the system before any of which a process may be killed."""


def kept(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != USED)


def in_a_process(work: Callable[[], None]) -> int:
    """Its pid. It ends with 0 where `work` raises nothing."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def end_of(pid: int) -> int:
    """0, or minus the signal that it was killed by."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def used_in_all_ways(folder: Path) -> None:
    cache = BatchCache(folder, 100)
    for name in "abc":  # the third makes room
        cache.get(f"set/{name}", lambda: b"x" * 40)
    cache.drop("set/c")
    with pytest.raises(ValueError):
        cache.get("set/d", lambda: int("not fetched"))


def test_a_process_killed_at_any_instant_leaves_a_count_that_is_never_too_low_and_heals(tmp_path: Path) -> None:
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()

        def killed(folder: Path = folder, number: int = number) -> None:
            left = itertools.count(number, -1)

            def counted(call: Callable, *given: object, **named: object) -> object:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*given, **named)

            for name in CHANGES:
                setattr(os, name, partial(counted, getattr(os, name)))
            used_in_all_ways(folder)

        end = end_of(in_a_process(killed))
        cache = BatchCache(folder, 100)
        assert kept(folder) <= cache.used() <= 100 + 40 and kept(folder) <= 100
        for name in "efg":
            assert cache.get(f"set/{name}", lambda: b"y" * 40).read_bytes() == b"y" * 40
        assert cache.used() == kept(folder) <= 100 and not list(folder.rglob(f"*{PART}"))
        if end == 0:
            break
        assert end == -signal.SIGKILL
    assert 30 < number < 199, "all instants were tried"


def test_two_processes_at_once_keep_an_exact_count_within_the_bound(tmp_path: Path) -> None:
    def work(seed: int) -> None:
        draw, cache = random.Random(seed), BatchCache(tmp_path, 1000)
        for _ in range(300):
            name = draw.randrange(60)
            cache.get(f"set/{name}", lambda name=name: b"x" * (name + 1))
            with cache._counter():  # the other one changes no size meanwhile
                assert kept(tmp_path) <= 1000
            if draw.random() < 0.1:
                cache.drop(f"set/{name}")

    assert [end_of(pid) for pid in [in_a_process(lambda seed=seed: work(seed)) for seed in (1, 2)]] == [0, 0]
    assert BatchCache(tmp_path, 1000).used() == kept(tmp_path) > 700


def test_who_waits_for_another_process_that_fetches_tells_so_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data worker that says nothing is taken to hang."""
    monkeypatch.setattr(cache_file, "TELL_S", 0.1)
    monkeypatch.setattr(cache_file, "TOLD", 2)
    (asked, asks), (goes_on, go_on) = os.pipe(), os.pipe()

    def fetch() -> bytes:
        os.write(asks, b"!")
        return os.read(goes_on, 1)

    other = in_a_process(lambda: BatchCache(tmp_path, 100).get("set/a", fetch))
    os.read(asked, 1)
    said, twice = [], threading.Event()

    def end() -> None:
        twice.wait(60)
        for thread in threading.enumerate():
            if thread.name == "shards-wait":
                thread.join(60)  # it tells no more
        os.write(go_on, b"x")

    monkeypatch.setattr(
        cache_file, "print", lambda line, **_: (said.append(line), twice.set() if len(said) > 1 else 0), raising=False
    )
    threading.Thread(target=end, daemon=True).start()
    assert BatchCache(tmp_path, 100).get("set/a", lambda: int("not fetched")).read_bytes() == b"x"
    assert BatchCache(tmp_path, 100).get("set/b", lambda: b"y") and end_of(other) == 0
    assert said == 2 * [f"{tmp_path}/set/a{PART}: waits for who fetches it, for 0 s"]


@pytest.mark.parametrize("damage", [b"", b"12345678", b"x" * 32, None])
def test_files_are_counted_where_the_count_is_missing_or_damaged_alone(
    damage: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BatchCache(tmp_path, 100).get("a", lambda: b"x" * 7)
    with monkeypatch.context() as patch:
        patch.setattr(BatchCache, "_sizes", lambda _: pytest.fail("counted anew"))
        assert BatchCache(tmp_path, 100).used() == 7
    (tmp_path / USED).unlink() if damage is None else (tmp_path / USED).write_bytes(damage)
    assert BatchCache(tmp_path, 100).used() == 7
    monkeypatch.setattr(cache_file, "_boot", lambda: b"another start...")
    (tmp_path / "b").write_bytes(b"put there while nobody counted")
    assert BatchCache(tmp_path, 100).used() == 7 + 30


def test_on_a_full_disk_batches_are_read_from_memory_and_the_count_stays_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = BatchCache(tmp_path, 100)
    for name in "abc":
        cache.get(name, lambda: b"x" * 30)

    def full(part: Path, data: bytes) -> None:
        part.write_bytes(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_file, "_write", full)
    assert cache.get("d", lambda: b"y" * 10) == b"y" * 10
    assert cache.used() == kept(tmp_path) == 30 and not list(tmp_path.glob(f"*{PART}"))
    assert "half of it is given back; OFA_DS_CACHE_BYTES makes it smaller" in capfd.readouterr().err
    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *given: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert cache.used() == 30
    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.undo()
    assert cache.get("e", lambda: b"z" * 10) == tmp_path / "e" and cache.used() == kept(tmp_path) == 40


@pytest.mark.parametrize("fails", ["is_at", "_remove", "flock"])
def test_an_error_in_the_middle_leaves_no_lock_behind(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, before = BatchCache(tmp_path / "batches", 100), os.listdir("/proc/self/fd")

    def failing(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    owners = {"is_at": (cache_file, mirror_file), "_remove": (BatchCache,), "flock": (fcntl,)}[fails]
    with monkeypatch.context() as patch:
        for owner in owners:
            patch.setattr(owner, fails, failing)
        with pytest.raises(OSError, match="Stale file handle"):
            cache.get("a", lambda: int("not fetched"))
        if fails != "_remove":
            with pytest.raises(OSError, match="Stale file handle"):
                Mirror(tmp_path / "mirrors", "a")
    assert os.listdir("/proc/self/fd") == before
    assert cache.get("a", lambda: b"x") == tmp_path / "batches/a" and cache.used() == 1


def test_the_machines_start_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_file._boot.cache_clear()
    read, times = Path.read_text, itertools.count()
    monkeypatch.setattr(Path, "read_text", lambda *given: (next(times), read(*given))[1])
    cache = BatchCache(tmp_path, 100)
    for name in "abc":
        cache.get(name, lambda: b"x" * 10)
    assert cache.used() == 30 and next(times) == 1


def test_without_room_beside_what_others_are_fetching_a_batch_stays_in_memory(tmp_path: Path) -> None:
    cache = BatchCache(tmp_path, 100)
    (tmp_path / f"other{PART}").write_bytes(b"o" * 95)
    (tmp_path / USED).unlink(missing_ok=True)
    with open(tmp_path / f"other{PART}") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cache.get("a", lambda: b"x" * 10) == b"x" * 10 and cache.used() == kept(tmp_path) == 95
    assert cache.get("a", lambda: b"x" * 10) == tmp_path / "a" and cache.used() == 10, "its fetcher is gone"


def test_the_bound_that_nobody_gave_does_not_shrink_as_the_cache_fills(tmp_path: Path, monkeypatch) -> None:
    disk = 1000
    usage = cache_file.shutil.disk_usage(tmp_path)
    free = lambda folder: usage._replace(free=disk - kept(folder))  # noqa: E731
    monkeypatch.setattr(cache_file.shutil, "disk_usage", free)
    assert BatchCache(tmp_path).max_bytes == disk // 2
    BatchCache(tmp_path).get("a", lambda: b"x" * 400)
    assert BatchCache(tmp_path).max_bytes == disk // 2


def age(mirror: Path) -> None:
    long_ago = time.time() - KEPT_S - 60
    os.utime(mirror / ".open", (long_ago, long_ago))


def test_mirrors_that_nobody_opened_for_long_go_with_their_batches(tmp_path: Path) -> None:
    cache, base = BatchCache(tmp_path / "batches", 1000), tmp_path / "mirrors"
    held, reopened, gone = (Mirror(base, name) for name in ("held", "reopened", "gone"))
    for mirror in (held, reopened, gone):
        mirror.place("a.index", b"index")
        cache.get(f"{mirror.folder.name}/a.0", lambda: b"x" * 10)
        age(mirror.folder)
    folder = gone.folder
    del reopened, gone, mirror
    again = Mirror(base, "reopened")
    (base / ".half.1").mkdir()
    remove_forgotten(base, cache.drop_folder)
    assert sorted(path.name for path in base.iterdir()) == ["held", "reopened"] and not folder.exists()
    assert (held.folder / "a.index").read_bytes() == (again.folder / "a.index").read_bytes() == b"index"
    assert sorted(path.name for path in cache.folder.iterdir() if path.is_dir()) == ["held", "reopened"]
    assert cache.used() == 20


def test_a_mirror_that_is_removed_while_it_is_opened_is_made_anew(tmp_path: Path) -> None:
    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            if draw.random() < 0.5:
                mirror = Mirror(tmp_path, "a")
                mirror.place("x", b"x")
                age(mirror.folder)
                assert (mirror.folder / "x").read_bytes() == b"x"
                del mirror
            else:
                remove_forgotten(tmp_path, lambda name: None)

    assert [end_of(pid) for pid in [in_a_process(lambda seed=seed: work(seed)) for seed in (1, 2, 3)]] == [0, 0, 0]

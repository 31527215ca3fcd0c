"""Building shards, whatever happens: killed at any instant, twice at once, a full disk, little memory, any workers."""

from __future__ import annotations

import base64
import errno
import gzip
import io
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from peak_memory import peak_MiB
from PIL import Image

from ofa_ds.data.building import build
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards

WORKER = [sys.executable, str(Path(__file__).with_name("building_worker.py"))]
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and text in plain files, large and many small ones, and a packed one; some lines are bad."""
    folder = tmp_path_factory.mktemp("sources")
    with (folder / "vl.tsv").open("w") as file:
        for k in range(150):
            pixels = np.random.default_rng(k).integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(picture := io.BytesIO(), "PNG")
            image = base64.b64encode(picture.getvalue()).decode()
            file.write(f"vl{k}\t{image}\ta cat {k} on a mat\t\t\tcat\tcoco\t{'caption' if k % 37 else 'wrong'}\n")
    for number in range(12):
        lines = [f"{number}-{k}\tsmall file {number}, line {k}" if k % 50 else "bad" for k in range(1, 130)]
        (folder / f"{number:02}.text.tsv").write_text("\n".join(lines))
    packed = "".join(f"p{k}\tpacked line {k}\n" for k in range(2000))
    (folder / "packed.tsv.gz").write_bytes(gzip.compress(packed.encode(), mtime=0))
    return folder


@pytest.fixture(scope="module")
def wanted(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed build by one worker writes."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    process = started(sources, out, 1)
    process.communicate("\n", timeout=TIMEOUT_S)
    assert process.returncode == 0 and verify_shards(out, workers=1) == []
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def started(sources: Path, out: Path, workers: int, **options) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*WORKER, str(sources), str(out), str(workers)], text=True, **pipes, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def kill_again_and_again(sources: Path, out: Path, workers: int, kills: int, draw: random.Random) -> int:
    """Start the build, kill it at a random instant, start it again, until it was let end. -> builds that ended."""
    longest_s, ended = 0.5, 0
    for _ in range(kills):
        process = started(sources, out, workers)
        began = time.monotonic()
        process.stdin.write("\n")
        process.stdin.flush()
        try:
            process.wait(draw.uniform(0, longest_s))
            longest_s = min(longest_s, time.monotonic() - began)
            ended += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=TIMEOUT_S)
        if out.exists() and not (out / ".journal").exists():  # complete: begin anew
            put_aside(out)
    return ended


def put_aside(out: Path) -> None:
    """Keep what was built beside, to be compared."""
    number = len(list(out.parent.glob("complete-*")))
    out.rename(out.parent / f"complete-{number}")


def assert_all_are_the_same(sources: Path, out: Path, workers: int, wanted: dict[str, bytes]) -> None:
    process = started(sources, out, workers)
    _, errors = process.communicate("\n", timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    put_aside(out)
    complete = list(out.parent.glob("complete-*"))
    assert complete and all(content(folder) == wanted for folder in complete)
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(path.name for path in complete)


@pytest.mark.parametrize("workers, kills", [(1, 12), (3, 3)])
def test_a_build_that_is_killed_at_any_instant_goes_on_to_the_same_bytes(
    workers: int, kills: int, sources: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    kill_again_and_again(sources, tmp_path / "out", workers, kills, random.Random(workers))
    assert_all_are_the_same(sources, tmp_path / "out", workers, wanted)


@pytest.mark.slow
def test_a_hundred_kills_change_no_byte(sources: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    kill_again_and_again(sources, tmp_path / "out", 1, 100, random.Random(7))
    assert_all_are_the_same(sources, tmp_path / "out", 1, wanted)


def test_what_was_done_is_not_done_again(sources: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".building_out"
    process = started(sources, out, 1)
    process.stdin.write("\n")
    process.stdin.flush()
    until = time.monotonic() + TIMEOUT_S
    while not (done := [path.stem for path in work.glob(".journal/vision_language-*.done")]):
        assert process.poll() is None and time.monotonic() < until, "the first piece is done long before the last"
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not out.exists(), "it is killed in the middle"
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.arrow") if path.name.startswith(tuple(done))}
    assert_all_are_the_same(sources, out, 1, wanted)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "complete-0").glob("*.arrow")}
    assert before and before.items() <= after.items()


def test_two_at_once_are_one_build_and_one_line(sources: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    first, second = (started(sources, tmp_path / "out", 1) for _ in range(2))
    for process in (first, second):
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=TIMEOUT_S)[1] for process in (first, second)]
    codes = [first.returncode, second.returncode]
    assert sorted(codes) == [0, 1], said
    assert content(tmp_path / "out") == wanted and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert re.search("another process|is not an empty directory", said[codes.index(1)])


def test_a_source_that_changed_meanwhile_is_read_again(sources: Path, tmp_path: Path) -> None:
    (path := tmp_path / "a.tsv").write_bytes(b"".join(b"%d\tgood\n" % k for k in range(100)))
    (bad := tmp_path / "b.tsv").write_bytes(b"1\n")
    given = {"text": [path, bad], "workers": 1, "shard_bytes": 300}
    with pytest.raises(ValueError, match="b.tsv:1: columns"):
        build_shards(tmp_path / "out", **given)
    done = len(list((tmp_path / ".building_out" / ".journal").glob("*.done")))
    assert done > 1
    bad.write_bytes(b"1\tfine now\n")
    path.write_bytes(path.read_bytes().replace(b"99\tgood", b"99\tbest"))
    assert build_shards(tmp_path / "out", **given).families["text"].rows == 101
    shards = Shards(tmp_path / "out")
    assert [shards.row("text", i)["text"] for i in (98, 99, 100)] == ["good", "best", "fine now"]
    assert not (tmp_path / ".building_out").exists()


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 8), Path.unlink])
def test_a_piece_whose_index_was_cut_or_is_gone_is_built_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    (path := tmp_path / "a.tsv").write_bytes(b"".join(b"%d\tgood\n" % k for k in range(100)))
    (bad := tmp_path / "b.tsv").write_bytes(b"1\n")
    given = {"text": [path, bad], "workers": 1, "shard_bytes": 300}
    with pytest.raises(ValueError, match="b.tsv:1: columns"):
        build_shards(tmp_path / "out", **given)
    damage(tmp_path / ".building_out/.journal/text-00000.0.index")
    bad.write_bytes(b"1\tfine now\n")
    build_shards(tmp_path / "out", **given)
    build_shards(tmp_path / "undisturbed", **given)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_the_first_process_keeps_next_to_nothing_of_a_record_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    finish = build._finish
    monkeypatch.setattr(build, "_finish", lambda *given: (kept.append(len(pickle.dumps(given[2]))), finish(*given))[1])
    monkeypatch.setattr("ofa_ds.data.shard_writer.MAX_BATCH_ROWS", 1)
    for number in (10, 1000):
        (path := tmp_path / f"{number}.tsv").write_bytes(b"".join(b"%d\tgood\n" % k for k in range(number)))
        build_shards(tmp_path / f"{number}.out", text=[path], workers=1)
    assert kept[1] - kept[0] < 100, "990 more record batches"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    (folder := tmp_path / "disk").mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_an_error_and_nothing_is_lost(
    sources: Path, wanted: dict[str, bytes], small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "out"
    process = started(sources, out, 1)
    _, errors = process.communicate("\n", timeout=TIMEOUT_S)
    assert process.returncode == 1 and os.strerror(errno.ENOSPC) in errors and not out.exists()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert_all_are_the_same(sources, out, 1, wanted)


def test_a_worker_takes_little_memory_whatever_the_size_of_the_sources(sources: Path, tmp_path: Path) -> None:
    """256 MB of rows, in one process that does nothing else: what they add to what an empty build takes."""
    line = b"1\t" + b"word " * 400 + b"\n"
    with gzip.open(tmp_path / "large.tsv.gz", "wb", compresslevel=1) as file:
        for _ in range(256):
            file.write(line * 512)
    (tmp_path / "small.tsv").write_bytes(line)
    code = "import sys; from ofa_ds.data.building.build import build_shards as build; "
    code += "build(sys.argv[2], text=[sys.argv[1]], workers=1)"
    names = "small.tsv", "large.tsv.gz"
    peaks = [peak_MiB("-c", code, str(tmp_path / name), str(tmp_path / f"{name}.out")) for name in names]
    assert peaks[1] < 400 and peaks[1] - peaks[0] < 150, peaks

"""`ofa-ds scenes` and `shards recast` overwrite nothing and leave nothing half; after a kill they are run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ofa_ds.cli import main
from ofa_ds.data.building.build import build_shards

COMMANDS = ("scenes", "scenes --task vqa", "recast")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    lines = (f"{k}\tthe {['good', 'bad'][k % 2]} dog of house {k} ran away" for k in range(9))
    (folder / "text.tsv").write_text("".join(f"{line}\n" for line in lines))
    build_shards(folder / "shards", text=[folder / "text.tsv"], workers=1)
    return folder / "shards"


def words(command: str, texts: Path, out: Path, *more: str) -> list[str]:
    given = ["shards", "recast", str(texts), "--task", "sst2"] if command == "recast" else command.split()
    return [*given, "--out", str(out), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_another_file_that_is_there_is_named_with_the_way_out_and_nothing_is_written(command, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(command, texts, out, "--rows", "8")) == 0
    before = contents(out)
    assert before and not any(name.startswith(".") for name in before)
    name = next(name for name in before if name.endswith(".tsv") and "/" not in name)
    for path in out.rglob("*"):
        if path.is_file() and path.name != name:
            path.unlink()
    capsys.readouterr()
    assert main(words(command, texts, out, "--rows", "5", "--seed", "2")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out / name}: is there already, and is another; remove it, or give another directory" in line
    assert contents(out) == {name: before[name]}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_command_again_says_that_all_is_there_and_makes_what_is_missing(command, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(command, texts, out, "--rows", "8")) == 0
    before = contents(out)
    times = {name: (out / name).stat().st_mtime_ns for name in before}
    capsys.readouterr()
    assert main(words(command, texts, out, "--rows", "8")) == 0
    told = capsys.readouterr().err
    assert all(f"{out / name}: is there already, as it would be made" in told for name in before)
    assert {name: (out / name).stat().st_mtime_ns for name in contents(out)} == times
    missing = max(before)
    (out / missing).unlink()
    assert main(words(command, texts, out, "--rows", "8")) == 0 and contents(out) == before


@pytest.mark.parametrize("command", COMMANDS[:2])
def test_a_killed_command_leaves_no_file_and_the_next_one_takes_its_leftovers_away(command, texts, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "ofa_ds.cli", *words(command, texts, out, "--rows", "1000000")], env=os.environ
    )
    while not any(path.stat().st_size for path in out.glob(".new_*/*.tsv")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name[:5] for path in out.iterdir()] == [".new_"]
    assert main(words(command, texts, out, "--rows", "8")) == 0
    assert not list(out.glob(".*"))

"""What a rank leaves for whoever watches it: beats, its first error, its stacks. Real ranks of `ofa-ds pretrain`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import old_checkpoint
import pytest

from ofa_ds import beat

pytestmark = pytest.mark.long

TIMEOUT_S = 240


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(old_checkpoint.FIXTURE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "beats").mkdir()
    return tmp_path


def start(folder: Path, *overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "ofa_ds.pretrain", "run/recipe.toml", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", beat.DIRECTORY: str(folder / "beats")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.02)


def test_beats_come_from_before_torch_is_imported_to_the_end(old):
    process = start(old)
    wait_until(process, lambda: len(beat.read(old / "beats")) == 2)
    found = beat.read(old / "beats")
    assert {each.phase for each in found.values()} == {"start"} and {each.step for each in found.values()} == {0}
    maps = Path(f"/proc/{found[0].pid}/maps").read_text()
    assert "libtorch" not in maps
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    last = beat.read(old / "beats")
    assert [(each.phase, each.step) for _, each in sorted(last.items())] == [("end", 6), ("end", 6)]
    assert not list((old / "beats").glob("*.error"))


def test_sigusr2_writes_the_stacks_of_a_rank_that_waits_in_a_collective_and_the_run_goes_on(old):
    process = start(old, "train.num_steps=12")
    wait_until(process, lambda: any(each.step > 4 for each in beat.read(old / "beats").values()))
    found = beat.read(old / "beats")
    os.kill(found[1].pid, signal.SIGSTOP)
    try:
        time.sleep(2)  # rank 0 comes to where it needs rank 1
        os.kill(found[0].pid, beat.STACKS_SIGNAL)
        stacks = old / "beats" / "rank-0.stacks"
        wait_until(process, lambda: "trainer.py" in stacks.read_text())
        assert "most recent call first" in stacks.read_text() and "distributed_c10d.py" in stacks.read_text()
    finally:
        os.kill(found[1].pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0 and "done: 12 steps" in output, output


@pytest.mark.parametrize(
    ("overrides", "kind", "text"),
    [
        (["train.no_such_key=1"], "UsageError", "unknown key train.no_such_key"),
        (["data.vocab=nowhere"], "ValueError", "nowhere"),
    ],
)
def test_the_first_error_of_a_rank_is_kept_with_its_traceback(old, overrides, kind, text):
    process = start(old, *overrides, ranks=1)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode, output
    error = json.loads((old / "beats" / "rank-0.error").read_text())
    assert error["type"] == kind and text in error["message"]
    assert "Traceback" in error["traceback"] and "ofa_ds" in error["traceback"]

"""One job at a time in a run directory, and the same command again and again. Real processes of `ofa-ds pretrain`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import scenes_shards

pytestmark = pytest.mark.long

TIMEOUT_S = 240


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes_shards.build(tmp_path_factory.mktemp("scenes"), rows=64)


def start(data: Path, run_dir: Path, *overrides: str) -> subprocess.Popen:
    """One rank of the nano recipe."""
    command = [
        sys.executable, "-m", "ofa_ds.pretrain", "pretrain-nano", f"run_dir={run_dir}",
        f"data.shards={data / 'shards'}", f"data.vocab={data / 'vocab'}", "data.workers=0", "batch.global_rows=8",
        "batch.micro_rows=8", "train.log_every=1", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear in {TIMEOUT_S} s"
        time.sleep(0.02)


def stop(process: subprocess.Popen) -> list[psutil.Process]:
    """SIGSTOP for the process and what it started, the writer of checkpoints too, until each thread stands.

    One that is writing a file finishes its call first.
    """
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in processes:
        each.suspend()
    deadline = time.monotonic() + TIMEOUT_S
    threads = [thread for each in processes for thread in Path(f"/proc/{each.pid}/task").iterdir()]
    while any("\nState:\tT" not in (thread / "status").read_text() for thread in threads):
        assert time.monotonic() < deadline, f"{processes} did not stop in {TIMEOUT_S} s"
        time.sleep(0.02)
    return processes


def tree(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_second_job_is_refused_touches_nothing_and_follows_when_the_first_was_killed(data, tmp_path):
    steps = ("train.num_steps=1000", "train.save_every=1", "train.keep=2")
    first = start(data, tmp_path, *steps)
    wait_for(tmp_path / "latest", first)
    stopped = stop(first)  # in the midst of whatever it does: nothing moves but what the second one does
    before = tree(tmp_path)
    second = start(data, tmp_path, *steps)
    output, errors = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 1 and "Traceback" not in errors and "step 1/" not in output
    (line,) = [line for line in errors.splitlines() if "another job is at work" in line]
    assert f"host {os.uname().nodename}, pid {first.pid}, since " in line and str(tmp_path) in line
    after = tree(tmp_path)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == set()
    first.send_signal(signal.SIGKILL)
    for process in stopped[1:]:
        process.resume()  # each sees that its parent is gone
    first.communicate()
    reached = max(int(path.name[5:]) for path in tmp_path.glob("step_????????"))
    third = start(data, tmp_path, f"train.num_steps={reached + 1}", "train.keep=2")
    output, errors = third.communicate(timeout=TIMEOUT_S)
    assert third.returncode == 0, errors
    assert f"the job before (host {os.uname().nodename}, pid {first.pid}, since " in errors
    assert f"done: {reached + 1} steps" in output
    assert not list(tmp_path.glob(".partial_step*")) and len(list(tmp_path.glob(".lease_*_free"))) == 1


@pytest.mark.parametrize("times", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_a_finished_run_started_again_ends_cleanly_each_time_and_changes_no_checkpoint(data, tmp_path, times):
    overrides = ("train.num_steps=1",)
    process = start(data, tmp_path, *overrides)
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 0, errors
    before = {name: each for name, each in tree(tmp_path).items() if name.startswith("step_")}
    for _ in range(times):
        process = start(data, tmp_path, *overrides)
        output, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0 and "terminate called" not in errors and "done: 1 steps" in output, errors
        assert not re.search("lease|Traceback", errors)
    assert {name: each for name, each in tree(tmp_path).items() if name.startswith("step_")} == before


def test_a_disk_that_takes_no_metrics_ends_no_run(data, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "tensorboard").symlink_to("/dev/full")
    (tmp_path / "recipe.toml" / "x").mkdir(parents=True)
    process = start(data, tmp_path, "train.num_steps=2")
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0 and "done: 2 steps" in output, errors
    for name in ("metrics.jsonl", "tensorboard", "recipe.toml"):
        assert f"metrics: {tmp_path / name}" in errors
    assert (tmp_path / "step_00000002" / "manifest.json").exists()

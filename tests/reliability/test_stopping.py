"""A run is stopped, told to save, or told to leave steps out; it goes on to the same bytes. Real ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import old_checkpoint
import pytest
from safetensors.numpy import load_file

from ofa_ds import beat

pytestmark = pytest.mark.long

TIMEOUT_S = 240


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return copy(tmp_path / "old")


def copy(folder: Path) -> Path:
    shutil.copytree(old_checkpoint.FIXTURE, folder)
    (folder / "beats").mkdir()
    return folder


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "ofa_ds.pretrain", "run/recipe.toml", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", beat.DIRECTORY: str(folder / "beats")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode == 0) == (code == 0), output
    return output


def wait_until(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.01)


def training(folder: Path) -> Callable[[], bool]:
    return lambda: any(each.phase == "step" for each in beat.read(folder / "beats").values())


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run").glob("step_????????"))


def tensors(folder: Path, step: int) -> dict[str, bytes]:
    files = sorted((folder / f"run/step_{step:08}").glob("*.safetensors"))
    assert len(files) == 2
    return {f"{file.name}:{name}": array.tobytes() for file in files for name, array in load_file(file).items()}


def test_sigusr1_to_one_rank_saves_and_ends_with_130(old):
    process = start(old, "train.num_steps=100000", "train.save_every=100000", "train.log_every=100000")
    wait_until(process, training(old))
    os.kill(beat.read(old / "beats")[1].pid, signal.SIGUSR1)
    output = finish(process, 130)
    assert re.search(r"exitcode *: 130", output), output
    (step,) = [step for step in checkpoints(old) if step > 4]
    assert f"stopped at step {step}" in output


def test_an_old_stop_file_is_removed_a_save_file_is_served_and_a_new_stop_file_ends_the_run_with_130(old):
    (old / "run/STOP").touch()
    os.utime(old / "run/STOP", (1e9, 1e9))
    process = start(old, "train.num_steps=100000", "train.save_every=100000", "train.log_every=100000")
    wait_until(process, training(old))
    assert not (old / "run/STOP").exists()
    (old / "run/SAVE").touch()
    wait_until(process, lambda: not (old / "run/SAVE").exists())
    (saved,) = [step for step in checkpoints(old) if step > 4]
    before = max(each.step for each in beat.read(old / "beats").values())
    wait_until(process, lambda: min(each.step for each in beat.read(old / "beats").values()) > before + 2)
    (old / "run/STOP").touch()
    output = finish(process, 130)
    assert re.search(r"exitcode *: 130", output), output
    last = checkpoints(old)[-1]
    assert last > saved and not (old / "run/STOP").exists()
    assert "run/STOP: was there before this run began" in output
    assert f"run/SAVE: step {saved} is saved; the file is removed" in output
    assert f"run/STOP: the run ends at step {last}, which is saved; the file is removed" in output


def test_steps_are_passed_over_as_if_absent_from_learning_and_a_resume_at_any_point_gives_the_same_bytes(tmp_path):
    skip, every = "train.skip_steps=[6,8]", ("train.save_every=1", "train.keep=9", "train.save_in_background=false")
    every += ("train.max_spike_sigma=6", "train.check_every_steps=3")
    whole = copy(tmp_path / "whole")
    output = finish(start(whole, skip, *every, "train.num_steps=9"))
    assert output.count("is passed over") == 2 and "step 6 is passed over, as train.skip_steps says" in output
    assert checkpoints(whole) == [4, 5, 6, 7, 8, 9]
    for step in (6, 8):  # each rank's generator, too: nothing drew from it
        assert tensors(whole, step) == tensors(whole, step - 1)
    assert tensors(whole, 7) != tensors(whole, 6)
    records = [json.loads(line) for line in (whole / "run/metrics.jsonl").read_text().splitlines()]
    assert [record.get("skipped_steps", 0) for record in records] == [0, 0, 0, 0, 0, 1, 0, 1, 0]
    losses = json.loads((whole / "run/step_00000009/manifest.json").read_text())["extra"]["losses"]
    assert losses == pytest.approx([record["loss"] for record in records[4:] if record["loss"] is not None], rel=1e-6)
    for cut in (5, 6):
        parts = copy(tmp_path / f"cut_{cut}")
        for step in range(5, cut + 1):
            shutil.copytree(whole / f"run/step_{step:08}", parts / f"run/step_{step:08}")
        finish(start(parts, skip, *every, "train.num_steps=9"))
        assert tensors(parts, 9) == tensors(whole, 9), cut
        manifest = json.loads((parts / "run/step_00000009/manifest.json").read_text())
        assert manifest["extra"]["losses"] == losses

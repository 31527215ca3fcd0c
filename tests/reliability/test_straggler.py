"""Of three real ranks under ZeRO-3 the one that is held up again and again is named, although all wait for it alike."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import old_checkpoint

from ofa_ds import beat

TIMEOUT_S = 240
BUSY_S, STOPPED_S = 0.05, 0.15
STEPS_ON_A_BUSY_MACHINE = 100
"""Ranks that share cores with other programs are noise; tests/unit/test_stragglers.py demands 20."""
SLOW = 1


def hold_up(pid: int, done: threading.Event) -> None:
    """Three quarters of the time the process stands still."""
    while not done.wait(BUSY_S):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(STOPPED_S)
        os.kill(pid, signal.SIGCONT)


def test_a_rank_that_is_stopped_again_and_again_is_named_with_its_host(tmp_path: Path):
    shutil.copytree(old_checkpoint.FIXTURE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "beats").mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m",
        "ofa_ds.pretrain", "run/recipe.toml", "batch.micro_rows=8", "train.num_steps=100000", "train.log_every=1000",
        "train.save_every=100000",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", beat.DIRECTORY: str(tmp_path / "beats")}
    log = tmp_path / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
    done, slowed_at, deadline = threading.Event(), None, time.monotonic() + TIMEOUT_S
    try:
        while not (named := re.findall(r"step (\d+): rank (\d) on (\S+) is \d+% slower", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            beats = beat.read(tmp_path / "beats")
            if slowed_at is None and len(beats) == 3 and min(each.step for each in beats.values()) > 10:
                slowed_at = beats[SLOW].step
                threading.Thread(target=hold_up, args=(beats[SLOW].pid, done), daemon=True).start()
            time.sleep(0.02)
    finally:
        done.set()
        (tmp_path / "run/STOP").touch()
        time.sleep(2 * STOPPED_S)
        process.wait(timeout=TIMEOUT_S)
    assert slowed_at is not None, named
    (step, rank, host), *_ = named
    assert int(rank) == SLOW and host == os.uname().nodename
    assert int(step) <= slowed_at + STEPS_ON_A_BUSY_MACHINE

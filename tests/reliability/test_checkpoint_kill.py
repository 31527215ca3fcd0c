"""A save that dies by SIGKILL, at any file operation or any moment, leaves a checkpoint that loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

WORKER = Path(__file__).with_name("kill_worker.py")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path_factory.mktemp("kill"))],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_save_killed_at_each_file_operation_leaves_a_valid_checkpoint(outcome):
    assert outcome["problems"] == []
    new_step, same_step = outcome["operations"]
    assert len(new_step) > 60 and len(same_step) > len(new_step)
    assert new_step[0] == 2 and new_step[-1] == 3, "the step before the save, until the new one is complete"
    assert new_step == sorted(new_step)
    assert set(same_step) == {3}


def test_saves_killed_at_two_hundred_moments_leave_a_valid_checkpoint(outcome):
    assert outcome["timed"] >= 200
    assert outcome["problems"] == []


def test_a_writing_process_that_dies_is_told_and_the_next_save_works(outcome):
    found = outcome["writer"]
    assert found["finished"] == "None" and "step_00000012 was not written" in found["failure"]
    assert "ended with code -9" in found["failure"] and found["newest"] == "step_00000011"
    assert (found["again"], found["failure again"]) == ("step_00000013", None)


def test_the_next_save_removes_what_killed_ones_left(outcome):
    lease, *after = outcome["after"]
    assert after == ["latest", "step_00000006"] and re.fullmatch(r"\.lease_\d{8}_free", lease)


def test_a_save_that_the_disk_cannot_take_is_an_error_and_harms_nothing(outcome):
    message = outcome["refusals"]["full disk"]
    assert message.startswith("RuntimeError") and "step_00000009 was not written" in message and "rank 0" in message
    assert outcome["refusals"]["after full disk"] == "step_00000008"


def test_another_model_or_a_damaged_file_is_refused_and_resume_takes_the_one_before(outcome):
    refusals = outcome["refusals"]
    assert refusals["another model"].startswith("ValueError") and "model's (blocks.2" in refusals["another model"]
    assert re.match(
        r"DamagedError: .*/rank_00000\.safetensors: (weight|exp_avg|exp_avg_sq)\|blocks\.\S+ has checksum",
        refusals["damaged"],
    )
    assert refusals["resumed step"] == "7"

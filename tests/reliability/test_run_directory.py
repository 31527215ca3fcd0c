"""What a run does with damaged, unreadable, foreign and newer checkpoints; errors after a save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("run_directory_worker.py")
EXITS = Path(__file__).with_name("exit_worker.py")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path_factory.mktemp("runs"))],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_where_all_checkpoints_are_damaged_the_run_refuses_each_time_names_why_for_each_and_deletes_none(outcome):
    first, second = outcome["all_damaged"]
    assert first == second
    assert first["names"] == ["latest", "step_00000001", "step_00000002", "step_00000003"]
    for step in (1, 2, 3):
        assert f"step_0000000{step}/" in first["result"]
    assert first["result"].startswith("ValueError") and "another run_dir, or move" in first["result"]


def test_a_damaged_newest_is_skipped_with_a_word_and_outlives_the_saves_that_follow(outcome):
    found = outcome["newest_damaged"]
    assert found["result"] == "1"
    for step in (2, 3):
        assert f"step_0000000{step}/rank" in found["stderr"]
    assert found["stderr"].count("skipped") == 2
    assert found["after"] == ["latest", "step_00000002.aside", "step_00000003.damaged", "step_00000004"]


@pytest.mark.parametrize(
    "story, word",
    [
        ("newest_of_newer_version", "written by a newer ofa-ds"),
        ("newest_on_a_disk_that_is_not_there", "leads nowhere"),
        ("disk_fails", "Input/output error"),
    ],
)
def test_a_newer_version_or_an_error_of_the_disk_is_refused_at_once_though_an_older_one_is_fine(outcome, story, word):
    found = outcome[story]
    assert found["result"].split(":")[0] in ("FormatVersionError", "OSError")
    assert "step_00000002" in found["result"] and word in found["result"]
    assert found["names"] == ["latest", "step_00000001", "step_00000002"]


def test_a_directory_without_checkpoints_begins_at_0(outcome):
    assert outcome["nothing_there"] == {"result": "begins at 0", "stderr": "", "names": []}


def test_what_fails_after_the_publication_is_a_warning_and_the_save_has_succeeded(outcome):
    found = outcome["tidying_fails"]
    assert found["result"].endswith("/step_00000003") and found["background"]["result"].endswith("/step_00000004")
    assert found["failure"] is None
    for told in (found["stderr"], found["background"]["stderr"]):
        assert "is whole, but latest may not name the right one" in told and "was not written" not in told
    assert {"step_00000001", "step_00000004"} <= set(found["names"]) and "step_00000003" not in found["names"]


def test_an_owner_that_lost_its_lease_publishes_and_deletes_nothing_and_stops(outcome):
    for found in outcome["lease_taken_meanwhile"]:
        assert found["result"].startswith("LeaseError") and "another job" in found["result"]
        assert not found["changed"] and "step_00000003" not in found["names"]


def test_a_manifest_holds_null_for_what_json_has_no_word_for(outcome):
    extra = outcome["no_numbers"]
    assert extra["loss"] is None and extra["x"] == [None, 1]


def test_a_process_ends_cleanly_thirty_times_wherever_its_snapshot_is_and_leaves_no_process(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXITS), "30"], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert json.loads(done.stdout) == [0] * 30, done.stderr
    assert "terminate called" not in done.stderr

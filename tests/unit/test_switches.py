"""STOP and SAVE in a run's directory: seen by rank 0, served once, removed, told in one line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ofa_ds.train import switches as module
from ofa_ds.train.switches import Switches


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)


def touch(path: Path, at_s: float) -> None:
    path.touch()
    os.utime(path, (at_s, at_s))


@pytest.mark.parametrize("name", ["STOP", "SAVE"])
def test_a_file_from_before_the_job_is_removed_and_told_and_asks_nothing(tmp_path, capsys, name):
    touch(tmp_path / name, time.time() - 60)
    switches = Switches(tmp_path, 0, time.time())
    assert not switches.stop and not switches.save and not (tmp_path / name).exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / name) in line and "before this run began" in line and "removed" in line


def test_a_stop_that_came_while_the_job_was_starting_is_honoured(tmp_path):
    began_s = time.time() - 60
    touch(tmp_path / "STOP", time.time())
    switches = Switches(tmp_path, 0, began_s)
    assert switches.stop
    switches.ended(7)
    assert not (tmp_path / "STOP").exists() and not switches.stop


def test_a_save_is_served_once_and_a_second_touch_meanwhile_is_a_second_request(tmp_path, capsys):
    switches = Switches(tmp_path, 0, 0.0)
    assert not switches.save
    touch(tmp_path / "SAVE", 1000)
    assert switches.save and switches.save
    switches.serve_save(5)
    assert not switches.save, "it is under way"
    switches.settle({4: True})
    assert not switches.save and (tmp_path / "SAVE").exists()
    touch(tmp_path / "SAVE", 2000)
    assert not switches.save
    switches.settle({5: True})
    assert "step 5 is saved" in capsys.readouterr().err
    assert switches.save
    switches.serve_save(9)
    switches.settle({9: False})
    assert "step 9 could not be saved" in capsys.readouterr().err
    assert not switches.save and not (tmp_path / "SAVE").exists()


def test_what_cannot_be_removed_is_told_once_and_asks_no_more_until_it_is_touched(tmp_path, capsys):
    (tmp_path / "SAVE").mkdir()
    switches = Switches(tmp_path, 0, 0.0)
    assert switches.save
    switches.serve_save(5)
    switches.settle({5: True})
    assert "cannot be removed" in capsys.readouterr().err
    assert not switches.save and not switches.save
    os.utime(tmp_path / "SAVE", (5000, 5000))
    assert switches.save


def test_other_ranks_neither_look_nor_touch(tmp_path, capsys):
    touch(tmp_path / "STOP", 1000)
    switches = Switches(tmp_path, 1, time.time())
    assert not switches.stop and not switches.save
    switches.serve_save(3)
    switches.settle({3: True})
    switches.ended(3)
    assert (tmp_path / "STOP").exists() and capsys.readouterr().err == ""


def test_a_directory_that_is_gone_asks_nothing(tmp_path):
    switches = Switches(tmp_path / "gone", 0, 0.0)
    assert not switches.stop and not switches.save


def test_it_looks_at_most_once_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_EVERY_S", 1000.0)
    switches = Switches(tmp_path, 0, 0.0)
    assert not switches.stop
    (tmp_path / "STOP").touch()
    assert not switches.stop

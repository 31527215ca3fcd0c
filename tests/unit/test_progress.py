"""Long work says how far it is, also where it comes in parts of a unit."""

from __future__ import annotations

import pytest

from ofa_ds import progress
from ofa_ds.progress import Progress


@pytest.fixture
def always_told(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)


def test_parts_of_a_unit_add_up(always_told, capsys):
    meter = Progress(3, "writing", "MiB")
    for _ in range(10):
        meter.add(0.25)
    meter.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("writing: 0 of 3 MiB") and lines[-1].startswith("writing: 2 of 3 MiB")


def test_a_bar_moves_by_whole_units(monkeypatch):
    moved = []

    class Bar:
        def update(self, count):
            moved.append(count)

    meter = Progress(3, "writing", "MiB")
    monkeypatch.setattr(meter, "_bar", Bar())
    for _ in range(10):
        meter.add(0.25)
    assert sum(moved) == 2 and set(moved) == {0, 1}


def test_short_work_says_nothing(capsys):
    meter = Progress(3, "writing", "MiB")
    meter.add(3)
    meter.close()
    assert capsys.readouterr().err == ""


def test_slow_work_has_digits_too(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ofa_ds.progress.time.monotonic", lambda: now[0])
    meter = Progress(1000, "encoding", "pictures")
    for seconds, count in ((20, 8), (20, 992)):
        now[0] += seconds
        meter.add(count)
    lines = capsys.readouterr().err.splitlines()
    assert "0.4 a second" in lines[0] and "25 a second" in lines[1]

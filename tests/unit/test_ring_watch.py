"""A data worker that is stopped, or hangs: it is told with its row, then replaced; one that reads slowly is not."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import closing

import pytest
import torch
from ring_batches import Making

from ofa_ds.train import ring as rings
from ofa_ds.train import ring_watch
from ofa_ds.train.packed_buffer import packing
from ofa_ds.train.ring import Ring
from ofa_ds.train.ring_watch import Places, Seen, Silence, seen


@pytest.fixture
def hasty(monkeypatch):
    for name, value in (("TELL_S", 0.4), ("REPLACE_S", 3), ("POLL_S", 0.05)):
        monkeypatch.setattr(rings, name, value)


def all_are_the_same(source: Ring, steps: Iterable[int]) -> bool:
    """Bit for bit those that are made here."""
    for step in steps:
        found, wanted = packing(source.take().batch()), packing(Making()(step, 0)[0])
        if found.layout != wanted.layout or not all(map(torch.equal, found.tensors, wanted.tensors)):
            return False
        source.release()
    return True


@pytest.mark.parametrize("fault, does", [("stopped", r"it is stopped \(SIGSTOP\)"), ("endless", "it computes")])
def test_a_worker_that_hangs_is_told_with_its_row_and_replaced(fault, does, tmp_path, capfd, hasty):
    making = Making(faults={(3, 0): fault}, folder=tmp_path)
    with closing(Ring(making, ((step, 0) for step in range(6)), workers=2, held=1, name="worker")) as source:
        assert all_are_the_same(source, range(6)) and source.num_restarts == 1
    told, ended, replaced = [line for line in capfd.readouterr().err.splitlines() if "step 4" in line]
    assert told.endswith("it is replaced after 3 s without a sign of life")
    place = "step 4, micro-batch 0, text row 30"
    with_row = rf"worker \(process \d+\) is at {place}, for 0.4 s: {does};"
    assert re.match(with_row, told)
    assert f"gave no sign of life for 3 s at {place}: it is ended" in ended
    assert "hung, and was ended, at step 4, micro-batch 0: another one is started, which makes the same" in replaced


def test_a_worker_whose_service_fails_for_longer_is_not_replaced(tmp_path, hasty):
    making = Making(faults={(2, 0): "no service"}, folder=tmp_path)
    with closing(Ring(making, ((step, 0) for step in range(4)), workers=1, held=1, name="worker")) as source:
        assert all_are_the_same(source, range(4)) and source.num_restarts == 0
    assert (tmp_path / "no service").exists()


def test_a_row_that_hangs_every_worker_is_one_error_with_the_row(monkeypatch, hasty):
    monkeypatch.setattr(rings, "MAX_DEATHS", 2)
    making = Making(faults={(0, 0): "stopped"})
    with closing(Ring(making, ((step, 0) for step in range(2)), workers=1, held=1, name="worker")) as source:
        with pytest.raises(
            RuntimeError, match=r"hung, .* text row 0, the 2th .* this batch: see whether the row decodes"
        ):
            source.take()
        source.release()
        assert all_are_the_same(source, [1])


def test_a_worker_that_is_stopped_for_a_while_is_told_and_keeps_its_work(tmp_path, capfd, monkeypatch, hasty):
    monkeypatch.setattr(rings, "REPLACE_S", 1e9)
    told: list[str] = []

    def goes_on(line: str) -> None:
        told.append(line)
        os.kill(int(line.partition("process ")[2].partition(")")[0]), signal.SIGCONT)

    monkeypatch.setattr(rings, "_tell", goes_on)
    making = Making(faults={(1, 0): "stopped"}, folder=tmp_path)
    with closing(Ring(making, ((step, 0) for step in range(3)), workers=1, held=1, name="worker")) as source:
        assert all_are_the_same(source, range(3)) and source.num_restarts == 0
    assert len(told) == 1


LIVES = {"reads": True, "disk": True, "tells": True, "computes": False, "sleeps": False}


def test_what_reads_or_waits_for_a_disk_lives_and_what_computes_may_hang() -> None:
    """Row 7 takes 100 s; nothing but the clock differs between these."""
    for number, (kind, lives) in enumerate(LIVES.items()):
        silence = Silence()
        for second in range(101):
            now = {
                "reads": Seen("S", (0, 4096 * second), 5), "disk": Seen("D", (0, 0), 5),
                "tells": Seen("S", (0, 0, 80 * second), 5),
                "computes": Seen("R", (0, 0), 100 * second), "sleeps": Seen("S", (0, 0), 5),
            }[kind]  # fmt: skip
            silence.add(1.0, (number, 7), now)
        assert silence.row_s == 100 and silence.dead_s == (0 if lives else 100), kind
        silence.told = True
        silence.add(1.0, (number, 8), now)
        assert silence.row_s == silence.dead_s == 0 and not silence.told, "the next row begins anew"


def test_a_worker_that_still_starts_may_compute() -> None:
    silence = Silence()
    for second in range(100):
        silence.add(1.0, (0, 0), Seen("R", (0, 0), second))
    assert silence.dead_s == 0 and silence.row_s == 99
    silence.add(1.0, (0, 0), Seen("R", (0, 0), 99))
    assert silence.dead_s == 1


def test_what_the_system_says_of_a_process_is_what_it_does() -> None:
    before = seen(os.getpid())
    assert before.state == "R"
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    with open("/dev/null", "wb", buffering=0) as file:
        file.write(b"line\n")
    assert seen(os.getpid()).moved[2] >= before.moved[2] + 5
    assert seen(os.getpid()).cpu > before.cpu and seen(1 << 22) == Seen()


def test_rows_are_counted_and_named_in_memory_of_both() -> None:
    places = Places(3)
    other = Places(3, os.dup(places._file))
    assert places.of(2) == (0, "before its first row")
    other.begin(2, "vision_language", 10**12)
    other.begin(2, "vision_language", 7)
    assert places.of(2) == (2, "vision_language row 7") and places.of(1)[0] == 0
    places.clear(2)
    assert other.of(2)[0] == 0
    places.close()
    other.close()
    assert ring_watch.REPLACE_S > ring_watch.TELL_S

"""The ring: batches in order and bit for bit whatever happens to the workers; nothing is left of it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from ring_batches import Making

from ofa_ds.train.packed_buffer import packing
from ofa_ds.train.pinned_copies import PinnedCopies
from ofa_ds.train.ring import MAX_DEATHS, Parcel, Ring
from ofa_ds.train.ring_worker import announced
from ofa_ds.train.slots import Slots

PER_STEP = 4
UNIT = Path(__file__).parent
WITH_US = os.environ | {"PYTHONPATH": os.pathsep.join([str(UNIT), os.environ.get("PYTHONPATH", "")])}


def keys(steps: int | None = None) -> Iterator[tuple[int, int]]:
    counted = itertools.count() if steps is None else range(steps)
    return ((step, number) for step in counted for number in range(PER_STEP))


def ring(making: Making, *, workers: int = 1, held: int = 1, steps: int | None = None) -> closing[Ring]:
    return closing(Ring(making, keys(steps), workers=workers, held=held, name="worker"))


def assert_is(parcel: Parcel, making: Making, key: tuple[int, int]) -> None:
    """Bit for bit the batch of `key`, made here."""
    batch, notes = Making(making.sides)(*key)
    assert parcel.notes == notes
    there, here = packing(parcel.batch()), packing(batch)
    assert there.layout == here.layout == parcel.layout
    assert all(torch.equal(one, other) for one, other in zip(there.tensors, here.tensors, strict=True))


@pytest.mark.parametrize("workers, held", [(1, 1), (3, 1), (2, 5)])
def test_batches_come_in_order_and_each_is_the_same_as_made_here(workers, held):
    making = Making(sides=(16, 64, 8))
    with ring(making, workers=workers, held=held, steps=5) as source:
        for count, key in enumerate(keys(5), 1):
            assert_is(source.take(), making, key)
            if count % held == 0:
                source.release()
        with pytest.raises(StopIteration):
            source.take()


def test_what_was_taken_stays_until_it_is_released_however_far_workers_are(monkeypatch):
    making = Making()
    with ring(making, workers=2, held=PER_STEP) as source:
        for step in range(6):
            held = [source.take() for _ in range(PER_STEP)]
            time.sleep(0.05)  # workers fill whatever they may
            for number, parcel in enumerate(held):
                assert_is(parcel, making, (step, number))
            source.release()


def test_a_whole_step_is_made_while_the_one_before_is_computed(tmp_path):
    making = Making(folder=tmp_path)
    with closing(Ring(making.made, keys(), workers=1, held=PER_STEP, announce=making.announce)) as source:
        for step in range(3):
            for _ in range(PER_STEP):
                source.take()
            until = time.monotonic() + 10
            while len(list(tmp_path.glob("made *"))) < (step + 2) * PER_STEP:
                assert time.monotonic() < until, "the next step would wait"
                time.sleep(0.01)
            source.release()


def test_slots_grow_with_the_batches_and_are_used_again():
    making = Making(sides=(8, 256, 16, 512, 8))
    with ring(making) as source:
        for key in itertools.islice(keys(), 10 * PER_STEP):
            assert_is(source.take(), making, key)
            source.release()
        assert len(source._free) + 2 == source._slots.count == 3
        file = os.fstat(source._slots._file)
        largest = packing(making(3, PER_STEP - 1)[0]).size
        assert file.st_blocks * 512 <= 3 * (largest + 8192), "memory is of what was written, not of the addresses"


def test_workers_are_killed_a_hundred_times_and_no_bit_differs(capfd):
    making, chance, kills = Making(sides=(64, 16)), random.Random(5), 0
    with ring(making, workers=2, held=2) as source:
        for key in keys():
            if kills == 100:
                break
            assert_is(source.take(), making, key)
            if key[1] % 2:
                source.release()
                time.sleep(chance.random() * 0.005)
                victims = multiprocessing.active_children()
                if victims:
                    with suppress(ProcessLookupError):  # of one that was killed, and is not replaced yet
                        os.kill(chance.choice(victims).pid, signal.SIGKILL)
                        kills += 1
        started = source.num_restarts
    told = [line for line in capfd.readouterr().err.splitlines() if "was ended by SIGKILL" in line]
    assert len(told) >= started > 0, "one that had nothing to do is replaced when there is something"
    assert all("makes the same batch" in line or "nothing to do" in line for line in told)


def test_batches_are_announced_before_those_in_front_of_them_are_made(tmp_path):
    making = Making(delay_s=0.2, folder=tmp_path)
    with closing(Ring(making.made, keys(), workers=1, held=1, announce=making.announce)) as source:
        source.take()
        time.sleep(0.05)  # the second one is being made
        assert (tmp_path / "announced 0 1").exists() and not (tmp_path / "made 0 2").exists()
        for _ in range(4):
            source.release()
            source.take()
    made, known = (len(list(tmp_path.glob(f"{what} *"))) for what in ("made", "announced"))
    assert made >= 5 and known >= made, "each of them, before it was made"


def test_an_announcement_that_fails_costs_no_batch_and_is_told_once(capsys):
    making = Making()  # has no folder for its marks
    with closing(Ring(making, keys(3), workers=1, held=1, announce=making.announce)) as source:
        for key in keys(3):
            assert_is(source.take(), making, key)
            source.release()
    assert announced(making.announce, (0, 0)) is None and announced(None, (0, 1)) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 1, micro-batch 0: no reading ahead: TypeError")


@pytest.mark.parametrize("fault, told", [("killed", "SIGKILL"), ("bus error", "SIGBUS"), ("crash", "SIGSEGV")])
def test_a_worker_that_is_ended_is_replaced_and_told_with_its_batch(tmp_path, capfd, fault, told):
    making = Making(faults={(1, 2): fault}, folder=tmp_path)
    with ring(making, workers=2, steps=3) as source:
        for key in keys(3):
            assert_is(source.take(), making, key)
            source.release()
        assert source.num_restarts == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("worker")]
    assert len(lines) == 1 and f"was ended by {told} at step 2, micro-batch 2: another" in lines[0]


def test_a_worker_that_ends_with_nothing_to_do_is_told_and_missed_by_nobody(capfd):
    with ring(Making(delay_s=0.5), workers=2, steps=1) as source:
        source._keys = iter([(0, (0, 0))])  # one batch for two workers
        os.kill(source._workers[1].process.pid, signal.SIGKILL)
        assert_is(source.take(), Making(), (0, 0))
        assert source._workers[1].connection is None and source.num_restarts == 0
    assert "while it had nothing to do: another one is started when there is" in capfd.readouterr().err


def test_a_batch_that_ends_every_worker_is_one_error_in_its_turn(capfd):
    making = Making(faults={(1, 1): "killed"})
    with ring(making, workers=2) as source:
        for key in itertools.islice(keys(), PER_STEP + 1):
            assert_is(source.take(), making, key)
            source.release()
        with pytest.raises(RuntimeError, match=r"SIGKILL at step 2, micro-batch 1, the 5th to do so .*lack of memory"):
            source.take()
        source.release()
        assert_is(source.take(), making, (1, 2))  # only that one is at fault
        assert source.num_restarts == MAX_DEATHS


@pytest.mark.parametrize(
    "fault, kind, message",
    [
        ("value error", ValueError, "^7: row 7 is at fault$"),
        ("full disk", RuntimeError, r"^\[Errno 28\] No space left on device: 'cache/a'$"),
        ("no memory", RuntimeError, "^step 1, micro-batch 2: no memory left; use smaller batch.micro_rows$"),
        ("bug", RuntimeError, "^step 1, micro-batch 2: ZeroDivisionError: division by zero$"),
    ],
)
def test_what_preparing_raises_is_raised_in_its_turn(fault, kind, message):
    with ring(Making(faults={(0, 2): fault})) as source:
        for number in range(2):
            assert_is(source.take(), Making(), (0, number))
            source.release()
        with pytest.raises(kind, match=message):
            source.take()
        source.release()
        assert_is(source.take(), Making(), (0, 3))
        assert source.num_restarts == 0


def test_copies_stay_valid_and_errors_come_through_them():
    making = Making(sides=(16, 32), faults={(5, 0): "value error"})
    copies = PinnedCopies(Ring(making, keys(), workers=2, held=1, name="worker"), 3, copy=torch.clone)
    taken = [copies.take() for _ in range(5 * PER_STEP)]
    for key, parcel in zip(keys(), taken, strict=False):
        assert_is(parcel, making, key)
    with pytest.raises(ValueError, match="row 7 is at fault"):
        copies.take()
    copies.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("delay_s", [0.0, 60.0], ids=["full", "waiting"])
def test_copies_end_at_once_whether_nobody_takes_them_or_none_comes(delay_s):
    copies = PinnedCopies(Ring(Making(delay_s=delay_s), keys(), workers=1, held=1, name="worker"), 2, copy=torch.clone)
    time.sleep(0.5)
    began = time.monotonic()
    copies.close()
    assert time.monotonic() - began < 10 and not multiprocessing.active_children()


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words, sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=UNIT, check=False
    )


SMALL = """
import os, sys
from pathlib import Path
from ofa_ds.train.slots import Slots
{before}
try:
    slots = Slots(2)
    slots.reserve(0, 1 << 19)
    slots.reserve(1, 1 << 21)
except RuntimeError as error:
    print(error, os.listdir("/dev/shm") if {has_own} else "")
"""


def test_shared_memory_that_is_full_is_one_line_with_the_way_out():
    """On a /dev/shm of 1 MiB of its own, where an old Python has no memory without a file system."""
    program = SMALL.format(before="del os.memfd_create", has_own=True)
    done = run(program, "unshare", "--mount", "--map-root-user", "sh", "-c",
               'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh")  # fmt: skip
    assert done.stdout == (
        "no memory for a batch of 2.10 MB that workers share with training: No space left on device; use smaller "
        "batch.micro_rows, fewer data.workers, or data.workers=0 []\n"
    ), done.stderr


@pytest.mark.parametrize(
    "limit, told",
    [("RLIMIT_FSIZE", "no memory that processes share: .*File too large"), ("RLIMIT_AS", "no room for a batch of")],
)
def test_limits_of_the_process_are_one_line_with_the_way_out(limit, told):
    here = "int(Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE') + (1 << 20)"
    size = here if limit == "RLIMIT_AS" else "1 << 20"
    before = f"import resource; resource.setrlimit(resource.{limit}, ({size},) * 2)"
    done = run(SMALL.format(before=before, has_own=False))
    assert len(done.stdout.splitlines()) == 1 and "data.workers=0" in done.stdout, done.stderr
    assert re.search(told, done.stdout)


def test_steps_of_more_batches_than_a_process_may_open_files_are_held_all_the_same():
    before = "from resource import *; setrlimit(RLIMIT_NOFILE, (64, getrlimit(RLIMIT_NOFILE)[1]))"
    program = SMALL.format(before=before, has_own=False).replace("slots = Slots(2)", "slots = Slots(300)")
    done = run(program + "views = [slots.reserve(slot, 1) for slot in range(300)]; print(len(views))")
    assert done.stdout == "300\n", done.stderr


def test_slots_have_no_name_and_are_gone_with_their_process():
    slots = Slots(3)
    slots.reserve(2, 1 << 20)[:] = 7
    assert os.fstat(slots._file).st_nlink == 0, "no directory knows it"
    view = slots.view(2, 1 << 20)
    slots.close()
    slots.close()
    assert view[-1] == 7, "what was handed out stays valid"


LEFT_OPEN = """
import itertools, multiprocessing
from ring_batches import Making
from ofa_ds.train.ring import Ring

if __name__ == "__main__":
    source = Ring(Making(), ((step, 0) for step in itertools.count()), workers=2, held=1)
    source.take()
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["", "1 / 0"])
def test_a_program_that_closes_nothing_ends_at_once_with_its_workers(tmp_path, end):
    (tmp_path / "main.py").write_text(LEFT_OPEN.format(end=end))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=100, env=WITH_US, check=False
    )
    assert time.monotonic() - began < 60, "not the time that workers outlive a SIGTERM"
    workers = done.stdout.split()
    assert len(workers) == 2, done.stderr
    assert not any(Path("/proc", worker).exists() for worker in workers)


SIGTERM_TO_ALL = """
import itertools, multiprocessing, os, signal, time
from ring_batches import Making
from ofa_ds.train.ring import Ring

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    source = Ring(Making(), ((step, 0) for step in itertools.count()), workers=2, held=1)
    source.take()
    os.killpg(0, signal.SIGTERM)  # a worker that has only just begun ends by it
    time.sleep(0.5)  # the fork server, which knows how workers end, is gone too
    for _ in range(20):
        source.release()
        source.take()
    before = source.num_restarts
    for worker in source._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
    for _ in range(20):
        source.release()
        source.take()
    print(before <= 2, source.num_restarts - before)
    source.close()
"""


def test_training_goes_on_after_a_sigterm_to_all_and_still_replaces_workers(tmp_path):
    (tmp_path / "main.py").write_text(SIGTERM_TO_ALL)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=WITH_US, start_new_session=True,
    )  # fmt: skip
    out, errors = process.communicate(timeout=60)
    assert out == "True 2\n" and process.returncode == 0, errors
    assert "Traceback" not in errors

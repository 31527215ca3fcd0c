"""A directory is one job's at a time: of many that ask at once one gets it, and an owner that is gone is followed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ofa_ds.storage import lease as leases
from ofa_ds.storage.lease import LeaseError, give_back_for, held, take

HOLDER = """
import sys, time
from pathlib import Path
from ofa_ds.storage.lease import LeaseError, take
try:
    lease = take(Path(sys.argv[1]))
except LeaseError as error:
    print("refused", error)
    raise SystemExit(1)
print("held", lease.run, flush=True)
sys.stdin.read()  # until it is told to go
lease.release()
"""


def holder(directory: Path, program: str = HOLDER) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def elsewhere(directory: Path, number: int = 1) -> Path:
    """A lease whose owner is on another host."""
    with held(directory):
        pass
    path = directory / f".lease_{number:08d}"
    os.rename(directory / f".lease_{number:08d}_free", path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "host": "gpu7", "start": "another-boot 4026531836 77"}))
    return path


def test_a_second_job_is_told_who_the_first_is_and_leaves_no_trace(tmp_path):
    with held(tmp_path):
        before = sorted(os.listdir(tmp_path))
        done = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True)
        assert sorted(os.listdir(tmp_path)) == before
    assert done.returncode == 1 and f"pid {os.getpid()}, since " in done.stdout and os.uname().nodename in done.stdout
    assert "another run_dir" in done.stdout and done.stdout.count("\n") == 1


def test_a_lease_given_back_is_free_at_once_and_the_directory_stays_of_the_same_run(tmp_path, capsys):
    before = {*threading.enumerate()}
    runs = set()
    for _ in range(3):
        with held(tmp_path) as lease:
            lease.check()
            runs.add(lease.run)
            with pytest.raises(LeaseError):
                take(tmp_path)
    assert len(runs) == 1 and capsys.readouterr().err == ""
    assert os.listdir(tmp_path) == [".lease_00000003_free"]
    assert {*threading.enumerate()} <= before


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGTERM])
def test_the_lease_of_a_process_that_died_is_taken_over_and_that_is_said(tmp_path, capsys, harm):
    process = holder(tmp_path)
    run = process.stdout.readline().split()[1]
    process.send_signal(harm)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its launcher has not looked yet
    with held(tmp_path) as lease:
        assert lease.run == run
    process.communicate()
    assert f"pid {process.pid}" in capsys.readouterr().err


def test_a_suspended_owner_keeps_its_lease(tmp_path):
    process = holder(tmp_path)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(LeaseError, match=f"pid {process.pid}"):
        take(tmp_path, beat_s=0.01, limit_s=0.02)
    process.send_signal(signal.SIGCONT)
    process.communicate()
    assert process.returncode == 0
    with held(tmp_path):
        pass


def test_a_process_that_got_the_number_of_a_dead_owner_is_not_taken_for_it(tmp_path):
    with held(tmp_path) as lease:
        owner = lease.owner
    values = {**vars(owner), "start": f"{owner.start}1"}  # the same boot, namespace and pid, another start
    (tmp_path / ".lease_00000002").write_text(json.dumps(values))
    with held(tmp_path) as lease:
        assert lease.run == owner.run


def test_an_owner_elsewhere_that_beats_keeps_it_and_one_that_does_not_is_followed(tmp_path, capsys):
    path = elsewhere(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    began = time.monotonic()
    with pytest.raises(LeaseError, match="host gpu7"):
        take(tmp_path, beat_s=0.1, limit_s=60)
    assert time.monotonic() - began < 10, "one beat is enough to know that it lives"
    ended.set()
    thread.join()
    began = time.monotonic()
    take(tmp_path, beat_s=0.1, limit_s=1).release()
    assert time.monotonic() - began >= 0.5
    assert "host gpu7" in capsys.readouterr().err


@pytest.mark.parametrize("skew_s", [-1e6, 1e6])
def test_the_clock_of_another_host_is_not_believed(tmp_path, skew_s):
    """A file server may be days off the clock of this host: its own time is what ages are counted by."""
    path = elsewhere(tmp_path)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            now = time.time() + skew_s
            os.utime(path, (now, now))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(LeaseError):
        take(tmp_path, beat_s=0.2, limit_s=60)
    stop.set()
    thread.join()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"host": "a"}', '{"host":1,"pid":"x","start":1,"since":1,"run":1}']
)
def test_a_lease_that_cannot_be_understood_is_judged_by_its_age_alone(tmp_path, content):
    (tmp_path / ".lease_00000009").write_text(content)
    with pytest.raises(LeaseError, match="cannot be read"):
        thread = threading.Timer(0.05, os.utime, [tmp_path / ".lease_00000009"])
        thread.start()
        take(tmp_path, beat_s=0.5, limit_s=60)
    thread.join()
    take(tmp_path, beat_s=0.02, limit_s=0.02).release()
    assert os.listdir(tmp_path) == [".lease_00000010_free"]


def test_an_owner_whose_lease_was_taken_while_it_slept_notices_before_it_does_anything(tmp_path):
    slept = take(tmp_path)
    path = tmp_path / ".lease_00000001"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "start": "another-boot 1 1"}))  # as it looks from another host
    other = take(tmp_path, beat_s=0.02, limit_s=0.02)
    assert slept.is_lost and not other.is_lost
    with pytest.raises(LeaseError, match=f"another job .*pid {os.getpid()}"):
        slept.check()
    slept.release()
    other.check()
    other.release()


def test_a_lease_that_somebody_deleted_is_lost(tmp_path):
    with held(tmp_path) as lease:
        (tmp_path / ".lease_00000001").unlink()
        assert lease.is_lost
        with pytest.raises(LeaseError, match="gone"):
            lease.check()


def test_the_thread_beats_and_ends_with_the_lease(tmp_path):
    before = {*threading.enumerate()}
    lease = take(tmp_path, beat_s=0.02)
    path = tmp_path / ".lease_00000001"
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 20
    while path.stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lease.release()
    assert {*threading.enumerate()} <= before


def test_a_main_thread_that_ends_by_an_error_is_not_held_up(tmp_path):
    program = "import pathlib, sys; from ofa_ds.storage.lease import take; take(pathlib.Path(sys.argv[1])); 1 / 0"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    with held(tmp_path):
        pass


RACER = """
import os, sys, time
from pathlib import Path
from ofa_ds.storage.lease import LeaseError, take
directory, start, inside = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
time.sleep(max(0, start - time.time()))
wins = 0
until = time.time() + 2.5
while time.time() < until:
    try:
        lease = take(directory)
    except LeaseError:
        continue
    try:
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another one is inside
        lease.check()
        os.unlink(inside)
        wins += 1
    except FileExistsError:
        os._exit(9)
    if wins % 5 == 4:
        os._exit(7)  # dies as an owner: the others take over
    lease.release()
"""


@pytest.mark.parametrize("links", [True, False])
def test_of_eight_that_ask_again_and_again_at_once_one_at_a_time_gets_it(tmp_path, links):
    """Owners that give it back, owners that die, and all others fighting for what they left."""
    directory, inside = tmp_path / "run", tmp_path / "inside"
    program = RACER if links else f"import os\ndef no(*_): raise OSError(95, 'no links here')\nos.link = no\n{RACER}"
    command = [sys.executable, "-c", program, str(directory), str(time.time() + 1), str(inside)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    outputs = [racer.communicate(timeout=60) for racer in racers]
    assert {racer.returncode for racer in racers} <= {0, 7}, outputs  # 9: two were inside
    numbers = [int(name[7:15]) for name in os.listdir(directory) if leases._NAME.fullmatch(name)]
    assert max(numbers) >= 8, "it changed hands"


def test_who_saw_the_end_of_an_owner_elsewhere_gives_its_lease_back_and_nobody_waits(tmp_path):
    assert not give_back_for(tmp_path / "nowhere", host="gpu7", pid=1)
    elsewhere(tmp_path)
    assert not give_back_for(tmp_path, host="gpu8", pid=os.getpid())
    assert not give_back_for(tmp_path, host="gpu7", pid=os.getpid() + 1)
    assert give_back_for(tmp_path, host="gpu7", pid=os.getpid())
    assert not give_back_for(tmp_path, host="gpu7", pid=os.getpid())  # it is free
    begun = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - begun < 5


def test_an_owner_that_was_taken_for_dead_finds_its_lease_lost(tmp_path):
    lease = take(tmp_path)
    try:
        assert give_back_for(tmp_path, host=lease.owner.host, pid=lease.owner.pid)
        assert lease.is_lost
        with pytest.raises(LeaseError, match="its lease is gone"):
            lease.check()
    finally:
        lease.release()

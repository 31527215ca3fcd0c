"""Whatever ends, all ends: the supervisor on hosts of one machine, with ranks that only count. Seconds each.

Agents, ranks, their shims, signals and pipes are real; ssh is a script that runs the command here (stand_in.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import stand_in

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SSH = """#!/bin/sh
# Runs the command of a host here. A host whose name is in DOWN cannot be reached.
while [ "$1" != "--" ]; do shift; done
host=$2; shift 2
if grep -qsx "$host" "$OFA_DOWN"; then echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255; fi
echo $$ > "$OFA_SSH_PIDS/$host"
echo "Welcome to $host!" # as login shells do
exec sh -c "$1"
"""


@dataclass
class Launched:
    directory: Path
    process: subprocess.Popen[bytes] | None = None
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, *, stdout: int | None = None, **settings: object) -> None:
        tools = self.directory / "tools"
        if not tools.exists():
            tools.mkdir()
            (self.directory / "ssh_pids").mkdir()
            (tools / "ssh").write_text(SSH)
            (tools / "ssh").chmod(0o755)
        policy = {"hang_after_s": 3.0, "silence_s": 3.0, "backoff_s": 0.2, "grace_s": 20.0}
        policy |= settings.pop("policy", {})
        given = {"hosts": [["alpha", 1], ["beta", 2]], "steps": "40", "run_dir": str(self.directory), **settings}
        environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "OFA_DOWN": str(self.directory / "down"),
            "OFA_SSH_PIDS": str(self.directory / "ssh_pids"),
            stand_in.MARK: self.mark,
        }
        self.process = subprocess.Popen(
            [sys.executable, stand_in.__file__, "launch", json.dumps({**given, "policy": policy})],
            env=environment,
            stdout=stdout or open(self.directory / "stdout", "ab"),
            stderr=open(self.directory / "stderr", "ab"),
            start_new_session=True,
        )

    def fault(self, rank: int, text: str) -> None:
        (self.directory / f"fault-{rank}").write_text(text)

    def wait(self, limit_s: float = 40) -> int:
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"runs on after {limit_s} s:\n{self.said()}") from None

    def until_step(self, step: int, rank: int = 0) -> int:
        """Waits until the rank is there; returns its pid."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            for host in self.status().get("hosts", ()):
                for row in host["ranks"]:
                    if row["rank"] == rank and row["phase"] == "step" and row["step"] >= step:
                        return row["pid"]
            time.sleep(0.1)
        raise AssertionError(f"rank {rank} does not come to step {step}:\n{self.said()}")

    def status(self) -> dict:
        try:
            return json.loads((self.directory / "launch" / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.directory / "launch" / "attempts.jsonl").read_text().splitlines()]

    def report(self, attempt: int = 1) -> dict:
        return json.loads((self.directory / "launch" / "reports" / f"attempt-{attempt:03d}.json").read_text())

    def said(self) -> str:
        return (self.directory / "stderr").read_text() + (self.directory / "stdout").read_text()

    def living(self) -> set[int]:
        """Every process that has the mark of this launch in its environment, but zombies."""
        found = set()
        for name in os.listdir("/proc"):
            if name.isdecimal():
                try:
                    marked = f"{stand_in.MARK}={self.mark}".encode() in Path("/proc", name, "environ").read_bytes()
                    state = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if marked and state not in "ZX":
                    found.add(int(name))
        return found

    def assert_nothing_left(self, within_s: float) -> None:
        until = time.monotonic() + within_s
        while (left := self.living()) and time.monotonic() < until:
            time.sleep(0.05)
        what = {pid: Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ") for pid in left}
        assert not left, f"{what}\n{self.said()}"

    def agent(self, host: str) -> int:
        """Its pid: of what the stand-in for ssh became."""
        return int((self.directory / "ssh_pids" / host).read_text())


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    found = Launched(tmp_path)
    yield found
    for pid in found.living():
        os.kill(pid, signal.SIGKILL)
    if found.process is not None:
        found.process.wait(10)


def test_a_run_that_ends_well_leaves_its_logs_and_nothing_else(launched: Launched) -> None:
    launched.start(steps="10")
    assert launched.wait() == 0, launched.said()
    launched.assert_nothing_left(1)
    start, end = launched.events()
    assert (start["event"], start["hosts"], start["world_size"]) == ("start", [["alpha", 1], ["beta", 2]], 3)
    assert (end["outcome"], end["exit_code"]) == ("done", 0)
    log = (launched.directory / "launch" / "logs" / "attempt-001" / "beta.log").read_text()
    ranks = [f"[{rank}] rank {rank} goes on from step 0" for rank in (1, 2)]
    assert sorted(log.splitlines()) == ["Welcome to beta!", *ranks]
    assert "alpha [0] rank 0 goes on from step 0\n" in (launched.directory / "stdout").read_text()
    assert launched.status()["state"] == "ended"


@pytest.mark.parametrize(
    "fault, code, words",
    [
        ("5 raise", 1, "RuntimeError: the lamp is broken"),
        ("5 exit 7", 7, "exit code 7: the last words"),
        ("5 SIGKILL", 137, "killed by SIGKILL (signal 9)"),
        ("5 SIGSEGV", 139, "killed by SIGSEGV (signal 11)"),
    ],
)
def test_one_failing_rank_ends_all_with_its_own_exit_code(
    launched: Launched, fault: str, code: int, words: str
) -> None:
    launched.fault(1, fault)
    launched.start()
    assert launched.wait() == code, launched.said()
    launched.assert_nothing_left(1)
    report = launched.report()
    assert (report["host"], report["rank"], report["step"]) == ("beta", 1, 5)
    assert words in report["error"]
    if "raise" in fault:
        assert "in _fault" in report["first_error"]["traceback"]
    assert launched.events()[-1]["outcome"] == "failed"
    assert launched.said().count("attempt 1 failed") == 1


def test_the_cause_is_named_before_its_echoes(launched: Launched) -> None:
    launched.fault(0, "5 echo")
    launched.fault(2, "20 SIGKILL")
    launched.start(steps="400")
    assert launched.wait() == 137, launched.said()
    report = launched.report()
    assert (report["rank"], report["exit_code"]) == (2, 137)
    assert [other["rank"] for other in report["others"]] == [0]


def test_what_a_rank_has_let_go_of_is_found_as_well(launched: Launched) -> None:
    launched.fault(0, "5 daemon")
    launched.fault(1, "10 SIGKILL")
    launched.start()
    assert launched.wait() == 137
    launched.assert_nothing_left(1)


@pytest.mark.parametrize("who", ["launcher", "agent", "engine"])
def test_killed_without_warning_all_the_rest_ends(launched: Launched, who: str) -> None:
    launched.start(steps="4000")
    launched.until_step(3)
    victim = {"launcher": launched.process.pid, "agent": launched.agent("beta")}.get(who)
    if victim is None:
        children = Path(f"/proc/{launched.agent('beta')}/task/{launched.agent('beta')}/children").read_text()
        victim = int(children.split()[0])
    os.kill(victim, signal.SIGKILL)
    launched.assert_nothing_left(15)
    assert launched.wait() == {"launcher": -9, "agent": 1, "engine": 137}[who], launched.said()
    if who != "launcher":
        assert launched.report()["host"] == "beta"


def test_a_stopped_agent_is_lost_and_its_ranks_end(launched: Launched) -> None:
    launched.start(steps="4000")
    launched.until_step(3)
    os.kill(launched.agent("beta"), signal.SIGSTOP)
    assert launched.wait() == 1, launched.said()
    launched.assert_nothing_left(1)
    assert launched.events()[-1]["outcome"] == "lost" and launched.report()["host"] == "beta"


def test_a_stopped_launcher_is_lost_for_the_agents(launched: Launched) -> None:
    launched.start(steps="4000")
    pid = launched.until_step(3, rank=2)
    os.kill(launched.process.pid, signal.SIGSTOP)
    until = time.monotonic() + 15
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    os.kill(launched.process.pid, signal.SIGCONT)
    assert launched.wait() == 1
    launched.assert_nothing_left(1)


@pytest.mark.parametrize("fault", ["6 sleep", "6 SIGSTOP"])
def test_a_rank_that_hangs_is_named_with_the_stacks_of_all(launched: Launched, fault: str) -> None:
    launched.fault(1, fault)
    launched.start(steps="4000")
    assert launched.wait() == 1, launched.said()
    launched.assert_nothing_left(1)
    report = launched.report()
    assert (report["outcome"], report["host"], report["rank"]) == ("hang", "beta", 1)
    assert "in rank" in (Path(report["stacks"]) / "rank-0.stacks").read_text()
    assert ("state T" if "STOP" in fault else "it is the last, at step 6") in report["error"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_asked_to_stop_the_ranks_save_and_the_exit_code_is_130(launched: Launched, number: int) -> None:
    launched.start(steps="4000")
    launched.until_step(3)
    launched.process.send_signal(number)
    assert launched.wait() == 130, launched.said()
    launched.assert_nothing_left(1)
    assert list(launched.directory.glob("step_*"))
    assert launched.events()[-1]["outcome"] == "stopped"


def test_a_second_interrupt_ends_at_once(launched: Launched) -> None:
    launched.fault(0, "5 sleep")
    launched.start(steps="4000", policy={"hang_after_s": 100.0})
    launched.until_step(5)
    launched.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    launched.process.send_signal(signal.SIGINT)
    assert launched.wait(10) == 130, launched.said()
    launched.assert_nothing_left(1)
    assert "without a checkpoint" in launched.said()


def test_a_second_launch_is_refused_and_one_that_was_killed_is_followed(launched: Launched) -> None:
    launched.start(steps="4000")
    launched.until_step(3)
    first = launched.process
    launched.start()
    assert launched.wait() == 1
    refusal = [line for line in launched.said().splitlines() if "another job is at work here" in line]
    assert len(refusal) == 1 and refusal[0].startswith("ofa-ds launch: ")
    first.kill()
    first.wait()
    launched.assert_nothing_left(15)
    launched.start(steps="5")
    assert launched.wait() == 0, launched.said()
    assert [event["attempt"] for event in launched.events()] == [1, 2, 2]


def test_agents_of_a_central_runner_come_back_and_are_supervised(launched: Launched) -> None:
    launched.fault(2, "5 SIGKILL")
    launched.start(runner="mpich")
    assert launched.wait() == 137, launched.said()
    launched.assert_nothing_left(1)
    assert launched.report()["rank"] == 2
    launched.start(runner="mpich", steps="10")
    assert launched.wait() == 0, launched.said()


def test_a_failure_is_retried_from_the_newest_checkpoint_with_a_new_token_and_port(launched: Launched) -> None:
    (launched.directory / "step_00000010").mkdir()
    launched.fault(1, "12 SIGKILL")
    launched.start(steps="60", policy={"retries": 2})
    assert launched.wait() == 0, launched.said()
    launched.assert_nothing_left(1)
    starts = [event for event in launched.events() if event["event"] == "start"]
    assert [(start["attempt"], start["from_step"]) for start in starts] == [(1, 10), (2, 10)]
    assert [event["outcome"] for event in launched.events() if event["event"] == "end"] == ["failed", "done"]
    assert len({path.name.split("-")[1] for path in launched.directory.glob("up-*")}) == 2
    assert launched.report(1)["rank"] == 1


def test_retries_are_bounded(launched: Launched) -> None:
    launched.fault(1, "5 SIGKILL always")
    launched.start(policy={"retries": 2})
    assert launched.wait(60) == 137, launched.said()
    assert [event["attempt"] for event in launched.events() if event["event"] == "end"] == [1, 2, 3]
    assert "no retries are left" in launched.said()


def test_a_wrong_use_is_not_retried(launched: Launched) -> None:
    launched.fault(1, "0 exit 2")
    launched.start(policy={"retries": 5})
    assert launched.wait() == 2, launched.said()
    assert len(launched.events()) == 2


def test_what_fails_twice_before_the_first_step_is_not_tried_a_third_time(launched: Launched) -> None:
    launched.fault(1, "0 raise always")
    launched.start(policy={"retries": 5})
    assert launched.wait(60) == 1, launched.said()
    assert len([event for event in launched.events() if event["event"] == "start"]) == 2


def test_a_host_that_does_not_answer_is_left_out_and_a_spare_takes_its_place(launched: Launched) -> None:
    hosts = [["alpha", 1], ["beta", 1], ["gamma", 1]]
    launched.start(hosts=hosts, spares=[["delta", 1]], steps="4000", policy={"retries": 3})
    launched.until_step(3)
    for name, victim in (("beta", "delta"), ("gamma", "")):
        (launched.directory / "down").open("a").write(f"{name}\n")
        os.kill(launched.agent(name), signal.SIGKILL)
        attempt = launched.status()["attempt"]
        while launched.status()["attempt"] == attempt:
            time.sleep(0.1)
        names = [host["name"] for host in launched.status()["hosts"]]
        assert (victim in names) == bool(victim) and name not in names, launched.said()
        launched.until_step(3)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait() == 130, launched.said()
    launched.assert_nothing_left(1)
    sizes = [event["world_size"] for event in launched.events() if event["event"] == "start"]
    assert sizes == [3, 3, 2]
    assert [event["bad_hosts"] for event in launched.events() if event["event"] == "end"] == [["beta"], ["gamma"], []]


def test_a_step_that_fails_twice_is_skipped_and_stays_skipped_in_later_launches(launched: Launched) -> None:
    launched.fault(1, "5 raise always")
    launched.start(policy={"retries": 2})
    assert launched.wait(60) == 1, launched.said()
    starts = [event for event in launched.events() if event["event"] == "start"]
    assert [start["skip_steps"] for start in starts] == [[], [], [6]]
    assert "step 6 failed twice" in launched.said()
    (launched.directory / "fault-1").unlink()
    launched.start()
    assert launched.wait() == 0, launched.said()
    assert launched.events()[-2]["skip_steps"] == [6]


def test_a_disk_that_is_full_loses_logs_and_not_the_run(launched: Launched) -> None:
    (launched.directory / "launch").mkdir()
    (launched.directory / "launch" / "logs").write_text("no directory can be made here")
    launched.start(steps="10")
    assert launched.wait() == 0, launched.said()
    assert launched.said().count("cannot be written") == 1


def test_a_terminal_that_nobody_reads_stops_nothing(launched: Launched) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"x" * 60_000)  # nearly full
    launched.fault(0, "5 chatter")
    launched.start(steps="60", stdout=write_end)
    assert launched.wait() == 0, launched.said()
    log = (launched.directory / "launch" / "logs" / "attempt-001" / "alpha.log").read_bytes()
    assert log.count(b"chatter") == 20_000
    os.close(read_end)
    os.close(write_end)


def test_a_thousand_ranks_are_heard_and_asked_to_stop_and_strangers_are_dropped(launched: Launched) -> None:
    hosts = [[f"node{number}", 8] for number in range(125)]
    launched.start(hosts=hosts, runner="slurm", many=True, policy={"silence_s": 8.0})
    for rank in (0, 999):
        launched.until_step(4, rank)
    silence = max(host["silence_s"] for host in launched.status()["hosts"])
    assert len(launched.status()["hosts"]) == 125 and silence < 6
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait() == 130, launched.said()
    launched.assert_nothing_left(1)
    assert "[999] step 4" in (launched.directory / "launch" / "logs" / "attempt-001" / "node124.log").read_text()


def test_nothing_of_an_attempt_stays_in_the_memory_of_a_host(launched: Launched) -> None:
    launched.start(steps="4000")
    launched.until_step(3)
    environment = Path(f"/proc/{launched.agent('beta')}/environ").read_text().split("\0")
    token = next(each for each in environment if each.startswith("OFA_ATTEMPT=")).removeprefix("OFA_ATTEMPT=")[:32]
    assert len(list(Path("/dev/shm").glob(f"ofa-ds-{token}.*"))) == 2
    os.kill(launched.agent("beta"), signal.SIGKILL)
    assert launched.wait() == 1, launched.said()
    assert not list(Path("/dev/shm").glob(f"ofa-ds-{token}.*"))


def test_a_stop_file_between_two_attempts_is_served(launched: Launched) -> None:
    launched.fault(1, "5 SIGKILL always")
    launched.start(policy={"retries": 5, "backoff_s": 3.0})
    while len(launched.status()) == 0 or launched.status()["state"] != "ended":
        time.sleep(0.1)
    (launched.directory / "STOP").touch()
    assert launched.wait() == 130, launched.said()
    assert not (launched.directory / "STOP").exists()
    assert len([event for event in launched.events() if event["event"] == "end"]) <= 2


def test_nothing_of_asyncio_is_said(launched: Launched) -> None:
    for runner in ("torchrun", "mpich"):
        launched.start(runner=runner, steps="5")
        assert launched.wait() == 0
    said = (launched.directory / "stderr").read_text()
    assert all(line.startswith("ofa-ds launch: ") for line in said.splitlines() if "lease" not in line), said


def test_a_signal_to_an_agent_is_a_wish_to_stop_for_all(launched: Launched) -> None:
    launched.start(steps="4000")
    launched.until_step(3)
    os.kill(launched.agent("beta"), signal.SIGTERM)
    assert launched.wait() == 130, launched.said()
    launched.assert_nothing_left(1)
    assert list(launched.directory.glob("step_*"))


def test_what_killed_agents_left_goes_with_the_next_one_and_what_lives_stays(launched: Launched) -> None:
    left, other = (Path("/dev/shm", f"ofa-ds-{uuid.uuid4().hex}.{name}") for name in ("left", "lives"))
    left.mkdir()
    other.mkdir()
    descriptor = os.open(other, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        launched.start(steps="5")
        assert launched.wait() == 0, launched.said()
        assert not left.exists() and other.exists()
    finally:
        os.close(descriptor)
        other.rmdir()

"""Whatever ends on three real hosts, all ends: within the promised seconds. Figures: docs/cluster.md.

Real sshd, agents, shims and signals; the ranks only count (tests/reliability/stand_in.py): a fault costs seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faults
import hosts
import pytest

pytestmark = pytest.mark.long

STAND_IN = hosts.ROOT / "tests" / "reliability" / "stand_in.py"
DETECT_S, DEAD_S = 15, 10
"""What is promised: both ends notice a loss within the first; a failing rank ends all within the second."""


class Launched:
    """On the login host, for ranks on h1, h2, h3."""

    def __init__(
        self, cluster: hosts.Cluster, directory: Path, environment: dict[str, str] | None = None, **settings: object
    ) -> None:
        self.cluster, self.directory = cluster, directory
        given = {"hosts": [["h1", 1], ["h2", 2], ["h3", 1]], "steps": "100000", "run_dir": str(directory), "policy": {}}
        environment = {**hosts.launch_env(cluster), "OFA_STAND_IN": "1", **(environment or {})}
        command = [sys.executable, str(STAND_IN), "launch", json.dumps({**given, **settings})]
        self.running = cluster.start(
            command, host=cluster.login, log=directory / "said", cwd=directory, env=environment
        )

    def until_step(self, step: int, attempt: int = 1) -> None:
        until = time.monotonic() + 90
        while time.monotonic() < until:
            try:
                status = json.loads((self.directory / "launch" / "status.json").read_text())
                rows = [row for host in status["hosts"] for row in host["ranks"]]
                reached = [row for row in rows if row["phase"] == "step" and row["step"] >= step]
                if status["attempt"] == attempt and len(reached) == 4 - (attempt > 1):
                    return
            except (OSError, ValueError):
                pass
            time.sleep(0.1)
        raise AssertionError(f"no step {step}:\n{self.running.output}")

    def ranks(self, host: hosts.Host) -> list:
        return host.find(str(STAND_IN), "rank", str(self.directory))

    def events(self) -> list[dict]:
        return [json.loads(line) for line in (self.directory / "launch" / "attempts.jsonl").read_text().splitlines()]


def seconds_until(what: Callable[[], bool], begun: float, launched: Launched) -> float:
    while not what():
        assert time.monotonic() - begun < DETECT_S + DEAD_S, f"still not:\n{launched.running.output}"
        time.sleep(0.05)
    return time.monotonic() - begun


def on(host: hosts.Host, *words: str) -> int:
    """The pid of the process there with these words among its arguments; of the shell that waits for it, if any."""
    return min(process.pid for process in host.find(*words))


def session_of_ssh(host: hosts.Host) -> int:
    found = [each for each in host.find("sshd") if (each.pid, each.started) not in host.residents]
    return max(each.pid for each in found)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


FAULTS: dict[str, tuple[Callable[[Launched, hosts.Host], object], str, int]] = {
    "kill -9 of a rank": (lambda launched, host: kill(launched.ranks(host)[-1].pid), "failed", 137),
    "kill -9 of an agent": (lambda launched, host: kill(on(host, "ofa_ds.cluster.agent")), "lost", 1),
    "kill -9 of an engine": (lambda launched, host: kill(on(host, str(STAND_IN), "engine")), "failed", 137),
    "kill -9 of sshd": (lambda launched, host: kill(session_of_ssh(host)), "lost", 1),
    "stopped agent": (lambda launched, host: kill(on(host, "ofa_ds.cluster.agent"), signal.SIGSTOP), "lost", 1),
    "link down": (lambda launched, host: faults.link_down(host), "lost", 1),
    "power cut": (lambda launched, host: faults.power_cut(host), "lost", 1),
    "kill -9 of the launch": (lambda launched, host: kill(launched.running.pid), "", 137),
    "stopped launch": (lambda launched, host: kill(launched.running.pid, signal.SIGSTOP), "", 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_when_one_thing_ends_all_ends(healed: hosts.Cluster, tmp_path: Path, fault: str) -> None:
    launched, host = Launched(healed, tmp_path), healed.hosts[1]
    launched.until_step(3)
    strike, outcome, code = FAULTS[fault]
    begun = time.monotonic()
    strike(launched, host)
    alive = [each for each in healed.hosts if fault != "power cut" or each is not host]
    dead_s = seconds_until(lambda: not any(map(launched.ranks, alive)), begun, launched)
    if fault == "stopped launch":
        kill(launched.running.pid, signal.SIGCONT)
        kill(launched.running.process.pid, signal.SIGCONT)  # nsenter stopped with it
    launched.running.wait(40)
    print(f"\nfigure: {fault}: all ranks dead after {dead_s:.1f} s, told after {time.monotonic() - begun:.1f} s")
    limit_s = {"failed": DEAD_S, "lost": DETECT_S}.get(outcome, DETECT_S)
    limit_s += DEAD_S if fault == "stopped agent" else 0  # it can only be ended from outside, after it was noticed
    assert dead_s < limit_s, launched.running.output
    if fault == "link down":
        faults.link_up(host)  # its sshd waits for a word of the other end, as any does
    for each in alive:
        each.wait_until_nothing_is_left(DEAD_S)
    if outcome:
        assert launched.running.process.returncode == code, launched.running.output
        event = launched.events()[-1]
        assert (event["outcome"], event["exit_code"], event["host"]) == (outcome, code, "h2"), launched.running.output


@pytest.mark.parametrize("runner", ["torchrun", "deepspeed", "openmpi", "mpich", "slurm"])
def test_under_every_engine_the_exit_code_is_that_of_the_rank(
    healed: hosts.Cluster, tmp_path: Path, runner: str, request: pytest.FixtureRequest
) -> None:
    environment = request.getfixturevalue("slurm_cluster").env if runner == "slurm" else {}
    program = [sys.executable, "-u", str(STAND_IN), "rank", str(tmp_path), "100000"]
    launched = Launched(healed, tmp_path, environment, runner=runner, program=program)
    launched.until_step(3)
    begun = time.monotonic()
    kill(launched.ranks(healed.hosts[1])[-1].pid, signal.SIGSEGV)
    seconds_until(lambda: not any(map(launched.ranks, healed.hosts)), begun, launched)
    assert time.monotonic() - begun < DEAD_S
    assert launched.running.wait(40) == 139, launched.running.output
    healed.wait_until_nothing_is_left(DEAD_S)
    event = launched.events()[-1]
    assert (event["outcome"], event["host"], event["exit_code"]) == ("failed", "h2", 139)


def test_a_host_without_power_is_replaced_and_the_others_go_on(healed: hosts.Cluster, tmp_path: Path) -> None:
    launched = Launched(healed, tmp_path, policy={"retries": 1, "backoff_s": 1.0})
    launched.until_step(3)
    faults.power_cut(healed.hosts[2])
    begun = time.monotonic()
    launched.until_step(3, attempt=2)
    print(f"\nfigure: power cut: at work again on two hosts after {time.monotonic() - begun:.1f} s")
    launched.running.send(signal.SIGTERM)
    assert launched.running.wait(30) == 130, launched.running.output
    assert [event["hosts"] for event in launched.events() if event["event"] == "start"][1] == [["h1", 1], ["h2", 2]]


def test_twenty_percent_of_packets_lost_for_a_while_is_no_reason_to_end(healed: hosts.Cluster, tmp_path: Path) -> None:
    launched = Launched(healed, tmp_path)
    launched.until_step(3)
    with faults.packet_loss(healed.hosts[1], 20):
        time.sleep(12)
    launched.running.send(signal.SIGTERM)
    assert launched.running.wait(40) == 130, launched.running.output

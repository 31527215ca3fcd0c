"""One run of the chaos suite: a launch, its faults, and what must hold when it has ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from field import HERE, Field, Rank, Watch, interpreter, write_orders
from one_host import Host, Running
from plans import FATAL, INSIDE, NUM_STEPS, Fault, Plan
from references import References, fingerprint, last_checkpoint, schedule_of, stand_in_weights
from strikes import Strikes

LAUNCH = ["-m", "ofa_ds.cli", "launch"]
HANG_AFTER_S = {True: 8, False: 15}
"""By whether ranks stand in: steps of real training, and what they import, take longer on a busy machine."""
RETRIES = 6
RUN_LIMIT_S = 420
STRIKE_LIMIT_S = 150
"""How long a fault waits for the step at which it is due."""
LEFT_WITHIN_S = 15
STAND_IN = HERE / "counting_rank.py"


@dataclass
class Outcome:
    plan: Plan
    struck: list[Fault] = field(default_factory=list)
    """In the order in which they were seen to strike."""
    missed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What did not hold: empty is a pass."""
    attempts: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        told = [f"{'FAILED' if self.problems else 'ok'}: {self.plan}", f"  {self.attempts}; {self.seconds:.0f} s"]
        told += [f"  not struck: {one}" for one in self.missed]
        return "\n".join(told + [f"  PROBLEM: {one}" for one in self.problems])


class Play:
    """Holds the launch of one run, and starts it again where a fault killed it."""

    def __init__(self, stage: Field, plan: Plan, *, stands_in: bool) -> None:
        self._stage, self.plan = stage, plan
        self._hang_after_s = HANG_AFTER_S[stands_in]
        self.run_dir = stage.disk / f"run_{plan.seed}"
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.desk = stage.desk(f"desk_{plan.seed}")
        self._hosts = stage.cluster.hosts[: plan.num_hosts]
        stage.cluster.first(plan.num_hosts).hostfile(self.desk / "hosts")
        orders = {kind: [self._order(fault) for fault in plan.faults if fault.kind == kind] for kind in INSIDE}
        self._orders = write_orders(self.desk, **orders, stand_in=str(STAND_IN) if stands_in else None)
        self._launches: list[Running] = []
        self._watch = Watch()

    def _order(self, fault: Fault) -> dict[str, object]:
        once = None if fault.repeats or fault.kind == "nan" else str(self.desk / f"once_{fault.step}")
        return {"rank": fault.host, "step": fault.step + 1, "once": once}

    def start(self) -> None:
        command = [interpreter(), *LAUNCH, "--hostfile", "hosts", "--runner", self.plan.runner]
        command += ["--retries", str(RETRIES), "--hang-after", str(self._hang_after_s)]
        command += ["--", "pretrain", "pretrain-nano", f"run_dir={self.run_dir}", *self._stage.settings]
        log = self.desk / f"launch_{len(self._launches) + 1}.log"
        cluster, environment = self._stage.cluster, self._stage.environment(self._orders)
        running = cluster.start(command, host=cluster.login, log=log, cwd=self.desk, env=environment)
        self._launches.append(running)

    @property
    def launch(self) -> Running:
        return self._launches[-1]

    @property
    def said(self) -> str:
        return "\n".join(f"--- {one.log.name}\n{one.output}" for one in self._launches)

    def strike_all(self, strikes: Strikes, outcome: Outcome) -> None:
        token = ""
        for fault in self.plan.faults:
            found = self._wait_for(fault, token)
            if found is None:
                outcome.missed.append(f"{fault} ({self._why()})")
                continue
            host, rank = found
            token = self._strike(fault, host, rank, strikes, token)
            outcome.struck.append(fault)

    def _strike(self, fault: Fault, host: Host, rank: Rank, strikes: Strikes, token: str) -> str:
        """Returns the token of the attempt that is over now, or was before."""
        if fault.kind in INSIDE:
            return rank.token if fault.kind == "raise" else token
        time.sleep(fault.delay_s)
        if fault.kind == "kill_launcher":
            os.kill(self.launch.pid, signal.SIGKILL)
            self.launch.process.wait(10)
            self.start()
        else:
            strikes.strike(fault, host, rank)
        return rank.token if fault.kind in FATAL else token

    def _wait_for(self, fault: Fault, over: str) -> tuple[Host, Rank] | None:
        """A rank of the host - of another, where it has none any more - that has come so far, in a newer attempt."""
        deadline = time.monotonic() + STRIKE_LIMIT_S
        last = None
        while self.launch.process.poll() is None and time.monotonic() < deadline:
            living = list(self._living(over))
            target = self._target(fault, [host for host, _ in living])
            for host, rank in living:
                last = host, rank
                if fault.kind in INSIDE:
                    if self._is_seen(fault):
                        return host, rank
                elif rank.step >= fault.step and host is target:
                    return host, rank
            time.sleep(0.02)
        return last if last and fault.kind in INSIDE and self._is_seen(fault) else None

    def _living(self, over: str) -> Iterator[tuple[Host, Rank]]:
        for host in self._hosts:
            for rank in self._watch.ranks(host):
                if rank.token != over:
                    yield host, rank

    def _target(self, fault: Fault, with_ranks: list[Host]) -> Host | None:
        wanted = self._hosts[fault.host]
        return wanted if wanted in with_ranks or not with_ranks else with_ranks[0]

    def _is_seen(self, fault: Fault) -> bool:
        return (self.desk / "seen" / f"{fault.kind}_{fault.host}_{fault.step + 1}").exists()

    def _why(self) -> str:
        return "the launch had ended" if self.launch.process.poll() is not None else f"not in {STRIKE_LIMIT_S} s"

    def kill(self) -> None:
        if self.launch.process.poll() is None:
            os.killpg(self.launch.process.pid, signal.SIGKILL)
            self.launch.process.wait()


def play(stage: Field, plan: Plan, references: References, *, stands_in: bool) -> Outcome:
    """Never raises for what the product does: that is in `problems`."""
    outcome, begun = Outcome(plan), time.monotonic()
    one, strikes = Play(stage, plan, stands_in=stands_in), Strikes(stage)
    try:
        one.start()
        one.strike_all(strikes, outcome)
        try:
            code = one.launch.process.wait(max(1.0, RUN_LIMIT_S - (time.monotonic() - begun)))
            if code:
                outcome.problems.append(f"exit code {code}")
        except subprocess.TimeoutExpired:
            outcome.problems.append(f"did not end in {RUN_LIMIT_S} s")
        outcome.problems += left_over(stage, one)
    except (OSError, RuntimeError) as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")
    finally:
        one.kill()
        strikes.undo()
    outcome.attempts = _attempts(one.run_dir)
    if not outcome.problems:
        outcome.problems += _wrong_weights(one.run_dir, plan, references, stands_in)
    outcome.seconds = time.monotonic() - begun
    _keep(one, outcome)
    return outcome


def left_over(stage: Field, one: Play) -> list[str]:
    """Processes on any host, and leases that nobody gave back."""
    problems = []
    deadline = time.monotonic() + LEFT_WITHIN_S
    is_cut = any(fault.kind == "link_down" for fault in one.plan.faults)
    while (left := _processes(stage, is_cut)) and time.monotonic() < deadline:
        time.sleep(0.1)
    problems += [f"left after {LEFT_WITHIN_S} s: {text}" for text in left]
    leases = [file for file in one.run_dir.rglob(".lease_*") if not file.name.endswith("_free")]
    return problems + [f"lease left: {file.relative_to(one.run_dir)}" for file in leases]


def _processes(stage: Field, is_cut: bool) -> list[str]:
    """is_cut: a link was; then sshd itself waits for TCP to give up, in a session with nothing in it any more."""
    found = []
    for host in stage.cluster.everything:
        try:
            left = host.left()
        except (RuntimeError, IndexError):  # off
            continue
        left = [each for each in left if not (is_cut and each.arguments[0].startswith("sshd: "))]
        found += [f"{host.name} pid {each.pid} {each.state} {' '.join(each.arguments)[:160]}" for each in left]
    return found


def _attempts(run_dir: Path) -> str:
    try:
        events = [json.loads(line) for line in (run_dir / "launch" / "attempts.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        return f"no attempts.jsonl: {error}"
    told = []
    for event in events:
        if event["event"] == "start":
            told.append(f"#{event['attempt']} from {event['from_step']} on {event['world_size']}")
        else:
            told.append(f"{event['outcome']} ({event.get('exit_code')}, {event.get('seconds', 0):.0f} s)")
    return "; ".join(told)


def _wrong_weights(run_dir: Path, plan: Plan, references: References, stands_in: bool) -> list[str]:
    schedule = schedule_of(run_dir, tuple(fault.step + 1 for fault in plan.faults if fault.kind == "nan"))
    last = last_checkpoint(run_dir)
    try:
        if stands_in:
            found = json.loads((last / "manifest.json").read_text())["weights"]
            wanted = stand_in_weights(schedule)
        else:
            found, wanted = fingerprint(last), references.weights(schedule)
    except (OSError, ValueError, RuntimeError) as error:
        return [f"weights cannot be compared: {error}"]
    if found == wanted:
        return []
    return [f"weights after {NUM_STEPS} steps are not those of the quiet run of {schedule}"]


def _keep(one: Play, outcome: Outcome) -> None:
    """What explains a failure stays on the desk; the disk is needed."""
    if outcome.problems:
        (one.desk / "outcome.txt").write_text(f"{outcome}\n{one.said}\n")
        if (one.run_dir / "launch").is_dir():
            shutil.copytree(one.run_dir / "launch", one.desk / "launch", dirs_exist_ok=True)
    shutil.rmtree(one.run_dir, ignore_errors=True)


def say(text: object) -> None:
    print(text, file=sys.stderr, flush=True)

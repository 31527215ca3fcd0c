"""A launch: one attempt after the other, until the work is done or there is no more use in trying.

After a failure the hosts are looked at; those that do not answer are left out, or spares take their places; the ranks
go on from the newest checkpoint, on as many hosts as the recipe's batch divides over.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import resource
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ofa_ds.cluster import verdict
from ofa_ds.cluster.channels import run_there
from ofa_ds.cluster.crew import Runners
from ofa_ds.cluster.desk import Desk
from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.job import Job
from ofa_ds.cluster.skipping import read_history, read_rank_0, recipe_problem, repeated_step, with_skips
from ofa_ds.cluster.supervisor import Attempt, Outcome, StopRequest, now
from ofa_ds.cluster.verdict import Limits
from ofa_ds.storage.lease import Lease, LeaseError, give_back_for, take
from ofa_ds.terms import CHECKPOINT, STOPPED

USAGE = 2
"""Exit code of a rank that was given something wrong: it would be as wrong the next time."""
_MAX_BACKOFF_S = 60.0
_CHECK_S = 15.0
_STEP = re.compile(CHECKPOINT)
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Policy:
    retries: int = 0
    backoff_s: float = 5.0
    """Before the first retry; twice as long before each further one, as long as no step is made."""
    hang_after_s: float = 300.0
    """Without a step, once there was one; a stopped process counts as hanging in any phase."""
    start_within_s: float = 1800.0
    """Until the first step."""
    silence_s: float = 8.0
    """Both ends of a line give up after so long without a word."""
    grace_s: float = 120.0
    """From SIGTERM, SIGINT or SIGUSR1 to the checkpoint."""
    spares: tuple[Host, ...] = ()

    @property
    def limits(self) -> Limits:
        return Limits(hang_after_s=self.hang_after_s, start_within_s=self.start_within_s, silence_s=self.silence_s)


def run(job: Job, policy: Policy, runners: Runners, *, desk: Desk | None = None) -> int:
    """Returns the exit code: 0 done, 130 stopped as asked, else that of the failed rank (128 + signal for a signal).

    Everything that the attempts leave is in RUN_DIR/launch (ofa_ds/cluster/desk.py). A second launch into the same
    run_dir is refused in one line.
    """
    try:
        lease = take(job.run_dir / "launch")
    except (LeaseError, OSError) as error:
        print(f"ofa-ds launch: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    desk = desk or Desk(job.run_dir)
    _raise_limit()
    try:
        with _signals() as stop:
            return Launch(job, policy, runners, desk, stop).run()
    finally:
        desk.close()
        _release(lease)


def _raise_limit() -> None:
    """Of open files: a connection or three for each agent, where shells often give 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _release(lease: Lease) -> None:
    with contextlib.suppress(OSError):
        lease.release()


@contextmanager
def _signals() -> Iterator[StopRequest]:
    """The request that the signals of this process make; a second Ctrl-C, or a late second SIGTERM, is urgent."""
    stop = StopRequest()
    first_at_s = 0.0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first_at_s
        if not stop.first:
            stop.first, first_at_s = number, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - first_at_s > 5:
            stop.is_urgent = True

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {}
    for number in _STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Launch:
    job: Job
    policy: Policy
    runners: Runners
    desk: Desk
    stop: StopRequest
    spares: list[Host] = field(default_factory=list)
    failures: list[Outcome] = field(default_factory=list)
    began_at: float = field(default_factory=time.time)
    """By the clock, as files have it."""

    def run(self) -> int:
        self.spares = list(self.policy.spares)
        history = read_history(self.desk.directory / "attempts.jsonl")
        skips = set(history.skip_steps)
        self._give_back(read_rank_0(self.desk.directory / "status.json"))  # of a launch that was killed
        number, retries = history.last_attempt, self.policy.retries
        if skips:
            self.desk.say(f"steps {sorted(skips)} failed twice in earlier launches and are skipped")
        while True:
            number += 1
            job = dataclasses.replace(self.job, program=with_skips(self.job.program, skips, self.job.directory))
            outcome = self._attempt(job, number, sorted(skips), retries)
            found = outcome.verdict
            if found.outcome in (verdict.DONE, verdict.STOP):
                self.desk.say(f"attempt {number} {found.outcome}{': ' if found.error else ''}{found.error}")
                return found.exit_code
            self.failures.append(outcome)
            if self._is_switched_off():
                return STOPPED
            reason = no_retry(self.failures, retries)
            if reason is None and not self._pause():
                reason = "asked to stop"
            reason = reason or self._choose_hosts(outcome)
            if reason is not None:
                self.desk.say(f"ended with exit code {found.exit_code}: {reason}")
                return found.exit_code
            retries -= 1
            step = repeated_step(self.failures)
            if step is not None and step not in skips:
                skips.add(step)
                self.desk.say(f"step {step} failed twice by a rank's own error: it is skipped on all ranks from now on")
            self.desk.say(f"retry, {retries} more after it: {len(self.job.hosts)} hosts, {self.job.num_ranks} ranks")

    def _attempt(self, job: Job, number: int, skips: list[int], retries: int) -> Outcome:
        limits = self.policy.limits
        start = {
            "attempt": number,
            "event": "start",
            "at": now(),
            "runner": job.runner,
            "hosts": [[host.name, host.slots] for host in job.hosts],
            "world_size": job.num_ranks,
            "from_step": newest_step(job.run_dir),
            "skip_steps": skips,
        }
        self.desk.event(start)
        self.desk.say(f"attempt {number}: {len(job.hosts)} hosts, {job.num_ranks} ranks, {job.runner}")
        attempt = Attempt(
            job=job,
            number=number,
            limits=limits,
            grace_s=self.policy.grace_s,
            runners=self.runners,
            desk=self.desk,
            stop=self.stop,
            retries_left=retries,
            keep_port=not self.failures,
        )
        outcome = asyncio.run(attempt.run())
        self._give_back(outcome.first_rank)
        self.desk.event(_end_event(number, outcome))
        return outcome

    def _is_switched_off(self) -> bool:
        """Whether somebody made RUN_DIR/STOP while there may have been no rank that sees it."""
        switch = self.job.run_dir / "STOP"
        try:
            if switch.stat().st_mtime < self.began_at:
                return False  # an old one: the ranks remove it
            switch.unlink()
        except OSError:
            return False
        self.desk.say(f"{switch}: stopped as asked, after a failure; the same command goes on from there")
        return True

    def _give_back(self, rank_0: Any) -> None:
        """The lease of a rank 0 that has ended: one on another host would watch it for minutes whether it lives."""
        with contextlib.suppress(TypeError, ValueError):
            host, pid = rank_0
            give_back_for(self.job.run_dir, host=str(host), pid=int(pid))

    def _pause(self) -> bool:
        """Back off; False where a signal came meanwhile."""
        in_vain = 0
        for outcome in reversed(self.failures[:-1]):
            if outcome.made_progress:
                break
            in_vain += 1
        until = time.monotonic() + min(self.policy.backoff_s * 2**in_vain, _MAX_BACKOFF_S)
        while time.monotonic() < until:
            if self.stop.first:
                return False
            time.sleep(0.1)
        return not self.stop.first

    def _choose_hosts(self, outcome: Outcome) -> str | None:
        """Sets the hosts of the next attempt; why there can be none, in one line."""
        bad = set(outcome.unreachable)
        if self.job.runner == "slurm":  # it promises no ssh; elsewhere a host that answers was only ended by its engine
            bad |= set(outcome.verdict.bad_hosts)
        else:
            asked = [host.name for host in (*self.job.hosts, *self.spares) if host.name not in bad]
            bad |= asyncio.run(unanswering(asked))
        self.spares = [spare for spare in self.spares if spare.name not in bad]
        bad |= {name for name in [repeated_host(self.failures)] if name and self.spares}
        before = self.job.hosts
        hosts, self.spares = replaced(before, bad, self.spares)
        if gone := [host.name for host in before if host not in hosts]:
            new = [host.name for host in hosts if host not in before]
            self.desk.say(f"left out: {', '.join(gone)}" + (f"; in their place: {', '.join(new)}" if new else ""))
        hosts, problem = largest(hosts, lambda ranks: recipe_problem(self.job.program, self.job.directory, ranks))
        if problem:
            self.desk.say(problem)
        if not hosts:
            return "no hosts are left that the recipe fits"
        address = self.job.master_address if hosts[0] == before[0] else ""
        self.job = dataclasses.replace(self.job, hosts=hosts, master_address=address)
        return None


def no_retry(failures: Sequence[Outcome], retries: int) -> str | None:
    """Why the last failure is not followed by another attempt; None where it is."""
    last = failures[-1]
    if last.verdict.exit_code == USAGE:
        return "a wrong use is as wrong the next time"
    if retries <= 0:
        return "no retries are left" if len(failures) > 1 else "no retries were asked for (--retries)"
    if len(failures) > 1 and not any(each.made_progress for each in failures[-2:]):
        if not any(each.verdict.outcome == verdict.LOST for each in failures[-2:]):
            return "twice in a row before the first step, so the next time would be the same"
    return None


def replaced(hosts: Sequence[Host], bad: set[str], spares: Sequence[Host]) -> tuple[tuple[Host, ...], list[Host]]:
    """The hosts, with spares in the places of the bad ones as far as they go, and the spares that are left.

    A spare with as many slots is taken first.
    """
    left, chosen = list(spares), []
    for host in hosts:
        if host.name not in bad:
            chosen.append(host)
        elif left:
            spare = next((each for each in left if each.slots == host.slots), left[0])
            left.remove(spare)
            chosen.append(dataclasses.replace(spare, spare=False))
    return tuple(chosen), left


def largest(hosts: tuple[Host, ...], problem_at: Any) -> tuple[tuple[Host, ...], str]:
    """As many of the hosts, from the first on, as the recipe fits, and what it says about more; () where it fits none.

    problem_at: number of ranks -> what is wrong with it, or "".
    """
    told = ""
    for count in range(len(hosts), 0, -1):
        ranks = sum(host.slots for host in hosts[:count])
        problem = problem_at(ranks)
        if not problem:
            return hosts[:count], told and f"{told}; going on with {count} hosts, {ranks} ranks"
        told = told or f"{len(hosts)} hosts do not do: {problem}"
    return (), told


def repeated_host(failures: Sequence[Outcome]) -> str:
    """The host that failed twice in a row for reasons of its own, if one did."""
    last = [each.verdict.host for each in failures[-2:] if not each.verdict.is_own_exception]
    return last[0] if len(last) == 2 and last[0] == last[1] else ""


async def unanswering(names: Sequence[str]) -> set[str]:
    """Hosts that do not start even a small program over a fresh connection."""
    gate = asyncio.Semaphore(32)

    async def is_bad(name: str) -> bool:
        async with gate:
            try:
                code, _ = await run_there(name, f"{secrets.token_hex(4)}.check", "ping", limit_s=_CHECK_S)
            except OSError:
                return True
            return code != 0

    bad = await asyncio.gather(*map(is_bad, names))
    return {name for name, each in zip(names, bad, strict=True) if each}


def newest_step(run_dir: Path) -> int:
    """Of the newest checkpoint, by its name; 0 where there is none. Whether it is whole, the ranks find out."""
    with contextlib.suppress(OSError):
        return max((int(match[1]) for name in os.listdir(run_dir) if (match := _STEP.fullmatch(name))), default=0)
    return 0


def _end_event(number: int, outcome: Outcome) -> dict[str, Any]:
    found = outcome.verdict
    return {
        "attempt": number,
        "event": "end",
        "at": now(),
        "outcome": found.outcome,
        "exit_code": found.exit_code,
        "host": found.host or None,
        "rank": found.rank,
        "step": found.step if found.step is not None else outcome.num_steps,
        "error": found.error or None,
        "bad_hosts": sorted({*found.bad_hosts, *outcome.unreachable}),
        "seconds": round(outcome.seconds, 1),
    }

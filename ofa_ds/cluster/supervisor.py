"""One attempt: starts an agent on every host, watches, and leaves nothing running, however it ends."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ofa_ds.cluster import report, verdict
from ofa_ds.cluster.crew import BEAT_S, CONNECT_S, Crew, Runners, agent_argv
from ofa_ds.cluster.desk import Desk
from ofa_ds.cluster.job import Job
from ofa_ds.cluster.verdict import Limits, Verdict

__all__ = ["Attempt", "Outcome", "StopRequest", "agent_argv", "now", "rank_argv"]

STATUS_S = 2.0
_STACKS_S = 6.0


@dataclass
class StopRequest:
    """Signals that the launching process got."""

    first: int = 0
    is_urgent: bool = False
    """A second one: end at once."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    verdict: Verdict
    unreachable: tuple[str, ...] = ()
    """Hosts that did not even take a fresh connection afterwards."""
    num_steps: int = 0
    """The most steps that a rank had finished when it ended; 0: none was made, or known."""
    made_progress: bool = False
    """A step was made in this attempt, by the rank whose fault its end is."""
    seconds: float = 0.0
    first_rank: tuple[str, int] | None = None
    """Host and pid of rank 0, by its host's own name and numbers."""


def rank_argv(job: Job) -> list[str]:
    """What an engine is to start for each rank."""
    python = [sys.executable, "-u", "-m"]
    return [*python, "ofa_ds.cluster.rank", "--", *python, "ofa_ds.cli", *map(os.fsdecode, job.program)]


@dataclass(kw_only=True)
class Attempt:
    job: Job
    number: int
    limits: Limits
    grace_s: float
    runners: Runners
    desk: Desk
    stop: StopRequest
    retries_left: int = 0
    keep_port: bool = False
    """Rank 0 listens on job.master_port; else on one that its host's agent found free."""

    async def run(self) -> Outcome:
        """From nothing to nothing: when this returns, all of the attempt has ended, as far as it can be reached."""
        self._state, self._stop_at_s, self._next_status_s = "starting", None, 0.0
        begun_s = self._started_at_s = time.monotonic()
        self.crew = Crew(self.job, self.runners, self.desk.say, functools.partial(self.desk.log, self.number))
        try:
            found = await self._open()
            if found is None:
                self._started_at_s = time.monotonic()
                program = rank_argv(self.job)
                self.crew.give_jobs(program, silence_s=self.limits.silence_s, keep_port=self.keep_port)
                self._state = "running"
                found = await self._watch()
            if found.outcome == verdict.HANG:
                found = await self._name_culprit(found)
            self._state = "stopping"
            unreachable = await self.crew.end(found.bad_hosts, self.limits.silence_s)
        finally:
            await self.crew.close()
        self._tell(found)
        # A rank that ends within a second of a step never said so in a beat.
        rows = [*self.crew.rows(), *(each for agent in self.crew.agents for each in agent.exits.values())]
        moved = [row for row in rows if row.phase not in ("launch", "start") and found.rank in (None, row.rank)]
        return Outcome(
            verdict=found,
            unreachable=unreachable,
            num_steps=max((row.step for row in rows), default=0),
            made_progress=any(row.step > self.crew.first_step.get(row.rank, 0) for row in moved),
            seconds=time.monotonic() - begun_s,
            first_rank=self.crew.rank_0(),
        )

    async def _step(self) -> float:
        """A tick; returns the time."""
        await self.crew.step()
        while self.crew.environments:
            host, told = self.crew.environments.popitem()
            self.desk.write(self.desk.log_path(self.number, f"environment-{host}"), "\n".join([*told, ""]).encode())
        now_s = time.monotonic()
        if now_s >= self._next_status_s:
            self._next_status_s = now_s + STATUS_S
            self.desk.status(self._status(now_s))
        return now_s

    # Starting.

    async def _open(self) -> Verdict | None:
        """All agents are there, or why not."""
        agents = self.crew.agents
        try:
            await self.crew.start()
        except OSError as error:
            return Verdict(outcome=verdict.FAILED, exit_code=1, error=f"{self.job.runner} cannot be started: {error}")
        until = time.monotonic() + CONNECT_S + len(agents) / 8
        while not all(agent.is_ready for agent in agents):
            now_s = await self._step()
            if self.stop.first:
                error = "stopped before any rank was started"
                return Verdict(outcome=verdict.STOP, exit_code=128 + self.stop.first, error=error)
            if found := self._not_opened(now_s > until):
                return found
        return None

    def _not_opened(self, is_late: bool) -> Verdict | None:
        agents, engine = self.crew.agents, self.crew.engine
        lost = next((agent for agent in agents if agent.lost), None)
        if lost is not None:
            bad = tuple(dict.fromkeys(agent.name for agent in agents if agent.lost))
            return Verdict(
                outcome=verdict.LOST, exit_code=1, error=f"no agent: {lost.lost}", host=lost.name, bad_hosts=bad
            )
        if engine is not None and engine.returncode is not None:
            error = f"{self.job.runner} ended with exit code {engine.returncode} before all ranks were there"
            return Verdict(outcome=verdict.FAILED, exit_code=1, error=error + _last_line(agents[0].log_tail))
        if is_late:
            bad = tuple(dict.fromkeys(agent.name for agent in agents if not agent.is_ready))
            error = f"no agent within {CONNECT_S:.0f} s: {', '.join(bad)}"
            return Verdict(outcome=verdict.LOST, exit_code=1, error=error, host=bad[0], bad_hosts=bad)
        return None

    # Watching.

    async def _watch(self) -> Verdict:
        while True:
            now_s = await self._step()
            found = verdict.judge(self.crew.agents, now_s, self.limits, self._started_at_s)
            found = found or self._engine_ended(now_s)
            if found is not None:
                return self._as_asked(found)
            if found := self._pass_stop_on(now_s):
                return found

    def _engine_ended(self, now_s: float) -> Verdict | None:
        """mpirun or srun has ended, and its agents have not said anything for a while."""
        engine = self.crew.engine
        if engine is None or engine.returncode is None:
            return None
        if now_s - max(agent.heard_at_s for agent in self.crew.agents) < 2 * BEAT_S:
            return None
        error = f"{self.job.runner} ended with exit code {engine.returncode}"
        return Verdict(outcome=verdict.LOST, exit_code=1, error=error)

    def _pass_stop_on(self, now_s: float) -> Verdict | None:
        self.stop.first = self.stop.first or self.crew.asked
        if not self.stop.first:
            return None
        name, code = signal.Signals(self.stop.first).name, 128 + self.stop.first
        if self._stop_at_s is None:
            self._stop_at_s, self._state = now_s, "stopping"
            self.desk.say(f"{name}: all ranks are asked for a checkpoint, within {self.grace_s:.0f} s")
            self.crew.send_all({"kind": "signal", "signal": int(signal.SIGTERM)})
        if self.stop.is_urgent:
            error = f"{name} twice: ended at once, without a checkpoint"
            return Verdict(outcome=verdict.STOP, exit_code=code, error=error)
        if now_s - self._stop_at_s > self.grace_s:
            error = f"{name}: no checkpoint within {self.grace_s:.0f} s, ended without"
            return Verdict(outcome=verdict.STOP, exit_code=code, error=error)
        return None

    def _as_asked(self, found: Verdict) -> Verdict:
        """Ranks that did not know the signal yet just end by it."""
        by_signal = found.exit is not None and found.exit.signal == signal.SIGTERM
        if self._stop_at_s is not None and by_signal:
            error = "stopped before a rank could save anything"
            return dataclasses.replace(found, outcome=verdict.STOP, error=error)
        return found

    async def _name_culprit(self, found: Verdict) -> Verdict:
        """All ranks write their stacks; these say who keeps the others waiting."""
        self.desk.say(f"{found.host}: {found.error}; all ranks are asked for their stacks")
        await self.crew.ask_stacks(_STACKS_S)
        directory = report.stacks_directory(self.desk.report_path(self.number))
        for rank, text in self.crew.stacks.items():
            self.desk.write(directory / f"rank-{rank}.stacks", text.encode())
        for name, content in self.crew.traces.items():
            self.desk.write(directory / name, content)
        named = verdict.culprit(self.crew.rows(), self.crew.stacks) if found.rank is not None else None
        if named is None:
            return found
        row, reason = named
        host = next(agent.name for agent in self.crew.agents if row.rank in agent.ranks)
        error = f"{found.error} (rank {found.rank}); rank {row.rank} keeps the others waiting: {reason}"
        return dataclasses.replace(found, host=host, rank=row.rank, step=row.step, error=error)

    # Telling.

    def _tell(self, found: Verdict) -> None:
        path, agents = self.desk.report_path(self.number), self.crew.agents
        names = dict.fromkeys([agent.name for agent in agents if agent.log_tail])
        if self.crew.engine is not None:
            names[self.job.runner] = None
        stacks = report.stacks_directory(path) if self.crew.stacks else None
        files = {"logs": [self.desk.log_path(self.number, name) for name in names], "stacks": stacks, "report": path}
        text = report.text(self.number, found, agents, files)
        self.desk.write(path, text.encode(errors="replace"))
        content = report.content(self.number, found, agents, files)
        self.desk.write(path.with_suffix(".json"), json.dumps(content, indent=1).encode())
        self._state = "ended"
        self.desk.status(self._status(time.monotonic()))
        if found.outcome in (verdict.FAILED, verdict.HANG, verdict.LOST):
            self.desk.say(text)

    def _status(self, now_s: float) -> dict[str, Any]:
        hosts: dict[str, dict[str, Any]] = {}
        for agent in self.crew.agents:
            host = hosts.setdefault(agent.name, {"name": agent.name, "silence_s": 0.0, "ranks": []})
            host["silence_s"] = max(host["silence_s"], round(now_s - agent.heard_at_s, 1))
            for row in sorted(agent.ranks.values(), key=lambda row: row.rank):
                shown = {"rank": row.rank, "pid": row.pid, "phase": row.phase, "step": row.step}
                host["ranks"].append(shown | {"age_s": round(now_s - row.moved_at_s, 1), "state": row.state})
        return {
            "at": now(),
            "attempt": self.number,
            "retries_left": self.retries_left,
            "runner": self.job.runner,
            "state": self._state,
            "rank_0": self.crew.rank_0(),
            "hosts": list(hosts.values()),
        }


def now() -> str:
    """For people and files: the time, with its zone."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _last_line(text: str) -> str:
    said = [line for line in text.splitlines() if line.strip()]
    return f": {said[-1][:400]}" if said else ""

"""Whether an attempt is over, and whose fault it is: decided from what agents told, without input or output."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ofa_ds.cluster.view import STOPPED_STATES, AgentView, Exit, RankView
from ofa_ds.terms import STOPPED

DONE, STOP, FAILED, HANG, LOST = "done", "stopped", "failed", "hang", "lost"

ECHO_S = 3.0
"""So long after an error that may be the echo of another one, that other one is waited for."""
_LATE_S = 2.5
"""Silence of a host that beats each second: an echo may be its."""
_GONE_S = 10.0
"""A rank that is gone without a word of its shim."""
_BEFORE = ("launch", "start")
_BUSY = ("save", "sample", "end")
"""Phases of one rank in which the others may wait for it, without a step, for longer than a step ever takes."""
_ECHO = re.compile(
    r"connection (?:was )?(?:reset|closed|refused|aborted)|broken pipe|read error|write error|timed? ?out|timeout|"
    r"ncclremoteerror|remote process exited|nccl communicator was aborted|distnetworkerror|diststoreerror|"
    r"recvvalue failed|failed to recv|watchdog caught collective|gloo/transport|peer closed|network error|"
    r"socket closed",
    re.IGNORECASE,
)
_COLLECTIVE = re.compile(
    r'File "[^"]*(?:torch/distributed|deepspeed/comm|process_group)[^"]*", line \d+ in '
    r"\w*(?:wait|barrier|all_?reduce|all_?gather|reduce_?scatter|broadcast|all_?to_?all|gather|scatter|recv|send|"
    r"monitored)\w*"
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    outcome: str
    """DONE, STOP, FAILED, HANG or LOST."""
    exit_code: int
    error: str = ""
    """One line."""
    host: str = ""
    rank: int | None = None
    step: int | None = None
    """Optimizer steps that this rank had finished."""
    exit: Exit | None = None
    """Of the rank whose fault it is."""
    bad_hosts: tuple[str, ...] = ()

    @property
    def is_own_exception(self) -> bool:
        """A rank's own words, no signal and no echo: they may come again at the same step."""
        found = self.exit
        return found is not None and found.signal == 0 and found.error is not None and not is_echo(found)


@dataclass(frozen=True, kw_only=True)
class Limits:
    hang_after_s: float
    start_within_s: float
    silence_s: float


def is_echo(found: Exit) -> bool:
    """Whether this is how a rank ends whose peer is gone, as far as its words say."""
    if found.signal not in (0, signal.SIGABRT):  # NCCL's watchdog aborts
        return False
    return bool(_ECHO.search(in_words(found) if found.error else "\n".join(found.tail.splitlines()[-12:])))


def _class(found: Exit) -> int:
    if is_echo(found):
        return 2
    return 1 if found.signal == signal.SIGTERM else 0  # engines and schedulers end the others with SIGTERM


def ranked(exits: Sequence[Exit]) -> list[Exit]:
    """Those that failed, causes first, then what an engine ended, then echoes; each in order of arrival."""
    failed = [each for each in exits if each.code not in (0, STOPPED)]
    return sorted(failed, key=lambda each: (_class(each), each.arrived_at_s, each.rank))


def in_words(found: Exit) -> str:
    """One line: what a rank died of."""
    if found.signal:
        name = signal.Signals(found.signal).name if found.signal in set(signal.Signals) else "a signal"
        out_of_memory = "; out of memory? see dmesg there" if found.signal == signal.SIGKILL else ""
        return f"killed by {name} (signal {found.signal}){out_of_memory}"
    if found.error:
        return " ".join(f"{found.error.get('type')}: {found.error.get('message')}".split())[:500]
    said = [line for line in found.tail.splitlines() if line.strip()]
    return f"exit code {found.code}" + (f": {' '.join(said[-1].split())[:400]}" if said else "")


def judge(agents: Sequence[AgentView], now_s: float, limits: Limits, started_at_s: float) -> Verdict | None:
    """None while all is well, or where a cause may still come."""
    exits = [each for agent in agents for each in agent.exits.values()]
    failed = ranked(exits)
    if failed and _class(failed[0]) == 0:
        return _of_exit(failed[0])
    for agent in agents:
        if agent.refused:
            return Verdict(outcome=FAILED, exit_code=1, error=agent.refused, host=agent.name)
    if lost := _lost(agents, now_s, limits):
        return lost
    if failed:
        late = any(now_s - agent.heard_at_s > _LATE_S and not _is_over(agent) for agent in agents)
        if (now_s - min(each.arrived_at_s for each in failed) > ECHO_S and not late) or all(map(_is_over, agents)):
            return _of_exit(failed[0])
        return None
    for agent in agents:
        if agent.engine_code and not _explained(agent):
            said = [line for line in agent.log_tail.splitlines() if line.strip()]
            error = f"the engine ended with exit code {agent.engine_code}" + (f": {said[-1][:400]}" if said else "")
            return Verdict(outcome=FAILED, exit_code=agent.engine_code, error=error, host=agent.name)
    if all(map(_is_over, agents)):
        stopped = any(each.code == STOPPED for each in exits)
        return Verdict(outcome=STOP if stopped else DONE, exit_code=STOPPED if stopped else 0)
    return _hang(agents, now_s, limits, started_at_s)


def _is_over(agent: AgentView) -> bool:
    return agent.engine_code is not None


def _explained(agent: AgentView) -> bool:
    """Whether the ranks' own records say better how it went than the engine's exit code."""
    return bool(agent.exits) and agent.exits.keys() >= agent.ranks.keys()


def _of_exit(found: Exit) -> Verdict:
    return Verdict(
        outcome=FAILED,
        exit_code=found.code,
        error=in_words(found),
        host=found.host,
        rank=found.rank,
        step=found.step,
        exit=found,
    )


def _lost(agents: Sequence[AgentView], now_s: float, limits: Limits) -> Verdict | None:
    lost = {agent.name: agent.lost for agent in agents if agent.lost and not agent.is_gone}
    for agent in agents:
        if agent.is_gone and agent.engine_code is None:  # nobody told it to
            lost[agent.name] = agent.gave_up or "its agent ended"
    for agent in agents:
        silent_s = now_s - agent.heard_at_s
        if agent.is_ready and not agent.is_gone and not agent.lost and silent_s > limits.silence_s:
            lost[agent.name] = f"no word for {silent_s:.1f} s"
    if not lost:
        return None
    name = next(iter(lost))
    rows = [row for agent in agents if agent.name == name for row in agent.ranks.values()]
    more = f" (and {len(lost) - 1} more hosts)" if len(lost) > 1 else ""
    return Verdict(
        outcome=LOST,
        exit_code=1,
        error=f"lost{more}: {lost[name]}",
        host=name,
        step=max((row.step for row in rows), default=None),
        bad_hosts=tuple(lost),
    )


def _hang(agents: Sequence[AgentView], now_s: float, limits: Limits, started_at_s: float) -> Verdict | None:
    """Somebody has made no progress for too long; whose fault that is, `culprit` says later."""
    busy = any(row.phase in _BUSY for agent in agents for row in agent.ranks.values() if row.rank not in agent.exits)
    for agent in agents:
        if _is_over(agent):
            continue
        if agent.engine_stopped_since_s and now_s - agent.engine_stopped_since_s > limits.hang_after_s:
            stopped_s = now_s - agent.engine_stopped_since_s
            return _hung(agent, None, f"its engine is stopped (state T) for {stopped_s:.0f} s")
        for row in agent.ranks.values():
            if row.rank in agent.exits:
                continue
            quiet_s = now_s - row.moved_at_s
            if row.gone_since_s and now_s - row.gone_since_s > _GONE_S:
                gone = Verdict(outcome=FAILED, exit_code=1, error="gone without a word", host=agent.name)
                return replace(gone, rank=row.rank, step=row.step)
            if row.stopped_since_s and now_s - row.stopped_since_s > limits.hang_after_s:
                return _hung(agent, row, f"stopped (state T) for {now_s - row.stopped_since_s:.0f} s")
            if row.phase == "step" and not busy and quiet_s > limits.hang_after_s:
                return _hung(agent, row, f"no progress for {quiet_s:.0f} s")
            if row.phase in _BEFORE and now_s - started_at_s > limits.start_within_s:
                return _hung(agent, row, f"no first step within {limits.start_within_s:.0f} s")
            if row.phase not in _BEFORE and quiet_s > limits.hang_after_s + limits.start_within_s:
                return _hung(agent, row, f"in phase {row.phase} for {quiet_s:.0f} s")
        if not agent.ranks and now_s - started_at_s > limits.start_within_s:
            return _hung(agent, None, f"no rank started within {limits.start_within_s:.0f} s")
    return None


def _hung(agent: AgentView, row: RankView | None, error: str) -> Verdict:
    rank, step = (row.rank, row.step) if row else (None, None)
    return Verdict(outcome=HANG, exit_code=1, error=error, host=agent.name, rank=rank, step=step)


def culprit(rows: Sequence[RankView], stacks: Mapping[int, str]) -> tuple[RankView, str] | None:
    """Who keeps the others waiting, and why one thinks so: a stopped one; else the one with the fewest steps; else the
    one that writes no stacks although others do; else the one that does not wait in a collective. None: nobody to tell.
    """
    living = [row for row in rows if row.state != "X"]
    if not living:
        return None
    for row in living:
        if row.state in STOPPED_STATES:
            return row, f"its process is stopped (state {row.state})"
    least = min(row.step for row in living)
    behind = [row for row in living if row.step == least]
    reason = f"it is the last, at step {least} of {max(row.step for row in living)}"
    if len(behind) == 1 and len(living) > 1:
        return behind[0], reason
    silent = [row for row in behind if not stacks.get(row.rank)]
    if silent and len(silent) < len(behind):
        return silent[0], f"it does not even write its stacks (state {silent[0].state})"
    busy = [row for row in behind if stacks.get(row.rank) and not waits_in_collective(stacks[row.rank])]
    if busy and (len(busy) < len(behind) or len(behind) == 1):
        return busy[0], "the others wait for it in a collective, it is elsewhere" if len(behind) > 1 else "it is alone"
    if len(behind) < len(living):
        return behind[0], reason
    return behind[0], "all ranks are alike; the first is named"


def waits_in_collective(stacks: str) -> bool:
    """Of what faulthandler wrote about all threads of a rank."""
    return bool(_COLLECTIVE.search(stacks))

"""The one report of an attempt: who failed first and how, what the others said, where everything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ofa_ds.cluster import verdict as verdicts
from ofa_ds.cluster.verdict import Verdict
from ofa_ds.cluster.view import AgentView

_ECHOES, _TAIL_LINES, _RANKS = 8, 25, 64
_WHAT = {
    verdicts.DONE: "done",
    verdicts.STOP: "stopped as asked",
    verdicts.FAILED: "failed",
    verdicts.HANG: "hangs",
    verdicts.LOST: "lost a host",
}


def head(number: int, found: Verdict) -> str:
    """One line: what the attempt came to."""
    where = f"host {found.host}" if found.host else ""
    where += f", rank {found.rank}" if found.rank is not None else ""
    what = f"attempt {number} {_WHAT[found.outcome]}"
    return ": ".join(part for part in (what, where, found.error) if part)


def text(number: int, found: Verdict, agents: Sequence[AgentView], files: Mapping[str, Any]) -> str:
    """The report for people. files: `logs`, `stacks` and `report` of this attempt."""
    lines = [head(number, found), f"exit code   {found.exit_code}"]
    if found.step is not None:
        phase = found.exit.phase if found.exit else ""
        lines.append(f"last step   {found.step}{f' (then in phase {phase})' if phase else ''}")
    if found.exit is not None and found.exit.error:
        lines += ["first error", *_indented(str(found.exit.error.get("traceback", "")).splitlines()[-60:])]
    elif found.exit is not None and found.exit.tail.strip():
        lines += ["it said last", *_indented(found.exit.tail.splitlines()[-_TAIL_LINES:])]
    others = [each for each in verdicts.ranked(_exits(agents)) if each is not found.exit]
    if others:
        lines.append("after it")
        lines += _indented(f"{each.host} rank {each.rank}: {verdicts.in_words(each)}" for each in others[:_ECHOES])
        lines += [f"    and {len(others) - _ECHOES} more"] * (len(others) > _ECHOES)
    lines += ["ranks", *_indented(_rows(agents))]
    lines += [f"logs        {path}" for path in files["logs"]]
    lines += [f"stacks      {files['stacks']}"] * bool(files["stacks"])
    return "\n".join([*lines, f"report      {files['report']}"]) + "\n"


def content(number: int, found: Verdict, agents: Sequence[AgentView], files: Mapping[str, Any]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "attempt": number,
        "outcome": found.outcome,
        "exit_code": found.exit_code,
        "host": found.host or None,
        "rank": found.rank,
        "step": found.step,
        "error": found.error or None,
        "first_error": found.exit.error if found.exit else None,
        "said_last": found.exit.tail if found.exit else None,
        "bad_hosts": list(found.bad_hosts),
        "others": [
            {"host": each.host, "rank": each.rank, "code": each.code, "error": verdicts.in_words(each)}
            for each in verdicts.ranked(_exits(agents))
            if each is not found.exit
        ],
        "logs": [str(path) for path in files["logs"]],
        "stacks": str(files["stacks"]) if files["stacks"] else None,
    }


def _exits(agents: Sequence[AgentView]) -> list[verdicts.Exit]:
    return [each for agent in agents for each in agent.exits.values()]


def _rows(agents: Sequence[AgentView]) -> list[str]:
    rows = []
    for agent in agents:
        for rank in sorted(agent.ranks):
            row, ended = agent.ranks[rank], agent.exits.get(rank)
            how = f"exit code {ended.code}" if ended else f"state {row.state}"
            rows.append(f"{agent.name} rank {rank}: phase {row.phase}, step {row.step}, {how}")
        if not agent.ranks:
            rows.append(f"{agent.name}: {agent.lost or agent.refused or 'no rank was seen'}")
    return [*rows[:_RANKS], *[f"and {len(rows) - _RANKS} more"] * (len(rows) > _RANKS)]


def _indented(lines: Any) -> list[str]:
    return [f"    {line}" for line in lines]


def stacks_directory(report: Path) -> Path:
    """Beside the report."""
    return report.with_suffix("")

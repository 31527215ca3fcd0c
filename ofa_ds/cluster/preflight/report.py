"""Tells what was found: a table on a terminal, a line a check elsewhere, or one JSON object."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from ofa_ds.cluster.preflight.checks import Check, judge
from ofa_ds.cluster.preflight.seen import ABSENT, FAIL, PASS, WARN, Fleet, Seen, Verdict

_HOSTS_NAMED = 4
_COLOURS = {FAIL: "31", WARN: "33", PASS: "32", ABSENT: "2"}


@dataclass(frozen=True)
class Report:
    hostfile: str
    seconds: float
    fleet: Fleet
    verdicts: dict[str, list[tuple[Check, Verdict]]]
    """By the host's name, in the hostfile's order."""
    exchange: dict[str, Any] = field(default_factory=dict)
    """How the bad hosts were found: rounds, times."""

    @property
    def bad_hosts(self) -> list[str]:
        return [name for name, each in self.verdicts.items() if any(verdict.state == FAIL for _, verdict in each)]


def made(hostfile: str, seconds: float, fleet: Fleet, exchange: dict[str, Any]) -> Report:
    return Report(hostfile, seconds, fleet, {seen.host.name: judge(seen, fleet) for seen in fleet.seen}, exchange)


def as_json(report: Report) -> dict[str, Any]:
    """What `--json` prints."""
    hosts = []
    for seen in report.fleet.seen:
        verdicts = report.verdicts[seen.host.name]
        checks = [
            {"check": check.name, "state": verdict.state, "text": verdict.text}
            | ({"do": _way_out(check, seen.host.name)} if verdict.state in (WARN, FAIL) else {})
            for check, verdict in verdicts
        ]
        ok = seen.host.name not in report.bad_hosts
        hosts.append({"name": seen.host.name, "slots": seen.host.slots, "ok": ok, "checks": checks, "rdma": rdma(seen)})
    return {
        "hostfile": report.hostfile, "seconds": round(report.seconds, 3), "ok": not report.bad_hosts,
        "bad_hosts": report.bad_hosts, "hosts": hosts, "exchange": report.exchange,
    }  # fmt: skip


def rdma(seen: Seen) -> dict[str, Any]:
    """What the choice of a profile for NCCL rests on."""
    ports = [
        {key: port.get(key) for key in ("device", "port", "link_layer", "rate", "state", "driver")}
        | {"roce_v2_gids": [index for index, _, kind in port["gids"] if kind == "RoCE v2"]}
        for port in seen.fabric
    ]
    network = seen.fact("network") or {}
    return {
        "ports": ports, "efa": any(port["driver"] == "efa" for port in ports),
        "interface": network.get("interface", ""), "address": network.get("address", ""),
    }  # fmt: skip


def tell(report: Report, stream: TextIO = sys.stdout) -> None:
    """The report for people; colours and the short form on a terminal alone."""
    if stream.isatty():
        _tell_table(report, stream)
    else:
        for name, verdicts in report.verdicts.items():
            for check, verdict in verdicts:
                print(_line([name], check, verdict), file=stream)
    print(_last_line(report), file=stream)


def _line(names: Sequence[str], check: Check, verdict: Verdict) -> str:
    way_out = f"; do: {_way_out(check, names[0])}" if verdict.state in (WARN, FAIL) else ""
    return " ".join(f"{_named(names)}: {verdict.state} {check.name}: {verdict.text}{way_out}".split())


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_HOSTS_NAMED]) + (f" and {len(names) - _HOSTS_NAMED} more" * (len(names) > _HOSTS_NAMED))


def _way_out(check: Check, name: str) -> str:
    return check.way_out.replace("HOST", name)


def _tell_table(report: Report, stream: TextIO) -> None:
    width = max(4, *(len(name) for name in report.verdicts))
    print(f"{'host':{width}}  pass  warn  fail  absent", file=stream)
    for name, verdicts in report.verdicts.items():
        counts = Counter(verdict.state for _, verdict in verdicts)
        worst = FAIL if counts[FAIL] else WARN if counts[WARN] else PASS
        cells = "  ".join(f"{counts[state]:{len(state)}}" for state in (PASS, WARN, FAIL, ABSENT))
        print(f"\033[{_COLOURS[worst]}m{name:{width}}  {cells}\033[0m", file=stream)
    lacking: dict[tuple[str, ...], list[str]] = {}
    for (check, _), names in _alike(report, ABSENT).items():
        lacking.setdefault(tuple(names), []).append(check.name)
    for names, checks in lacking.items():
        line = f"{_named(names)}: absent: {', '.join(checks)}"
        print(f"\033[{_COLOURS[ABSENT]}m{line}\033[0m", file=stream)
    for state in (WARN, FAIL):  # the worst last, where eyes are
        for (check, text), names in _alike(report, state).items():
            line = _line(names, check, Verdict(state, text))
            print(f"\033[{_COLOURS[state]}m{line}\033[0m", file=stream)


def _alike(report: Report, state: str) -> dict[tuple[Check, str], list[str]]:
    """Hosts of which the same is said."""
    found: dict[tuple[Check, str], list[str]] = {}
    for name, verdicts in report.verdicts.items():
        for check, verdict in verdicts:
            if verdict.state == state:
                found.setdefault((check, verdict.text), []).append(name)
    return found


def _last_line(report: Report) -> str:
    total, bad = len(report.verdicts), report.bad_hosts
    found = f"{len(bad)} of {total} hosts fail: {', '.join(bad)}" if bad else f"all {total} hosts pass"
    return f"preflight: {found}; {report.seconds:.1f} s"

"""What a run is doing, from the files in its directory: nothing is asked of any host, nothing is ever written.

    RUN_DIR/launch/status.json      every rank, replaced every two seconds while `ofa-ds launch` lives
    RUN_DIR/launch/attempts.jsonl   the start and the end of each attempt
    RUN_DIR/metrics.jsonl           loss and speed; an earlier attempt may have left later steps than the present one's
    RUN_DIR/step_NNNNNNNN/          checkpoints, by their names and the time of their manifests
    .lease_NNNNNNNN[_free]          whether a trainer (in RUN_DIR) or a launch (in launch/) is at work, or has gone

Any of them may be missing, torn, of another version or gone while it is read: what cannot be understood is left out.
A run that `ofa-ds launch` did not start has no launch/: metrics and checkpoints tell what they can.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ofa_ds.cluster import watch_files as files
from ofa_ds.cluster.watch_files import Facts
from ofa_ds.terms import CHECKPOINT

STALE_S = 15.0
"""Of status.json: the launch replaces it every two seconds."""
SILENT_S = 5.0
"""Of a host: its agent speaks every second."""
LEASE_S = 60.0
"""Of a job's lease: its owner touches it every ten seconds."""
SLOW_S = 10.0
"""A step that takes less is never called slow."""
SLOW_STEPS = 5.0
"""A rank that has made no step for so many times the usual one is."""
_CHECKPOINT = re.compile(CHECKPOINT)
_JUDGED = "heldout/"
"""How names of scores begin, in a record of a judgement of held-out rows."""
_BEFORE_STEPS = ("start", "launch")
STATES = {"T": "stopped (SIGSTOP)", "t": "held by a debugger", "Z": "dead", "X": "gone"}
"""Of /proc, which a healthy rank is never in."""


@dataclass
class Watcher:
    """Looks again and again: a status that changes is fresh, whatever the clocks of two hosts say."""

    run_dir: Path
    _seen: str = ""
    _changed_at_s: float | None = None

    def look(self, now_s: float | None = None) -> Facts:
        """All there is to know, as JSON has it. Raises ValueError where there is no such directory."""
        if not self.run_dir.is_dir():
            raise ValueError(f"{self.run_dir}: no such directory; want the run_dir of a run")
        now_s = time.time() if now_s is None else now_s
        status = files.json_object(self.run_dir / "launch/status.json")
        age_s = self._age(status, now_s)
        return _Look(self.run_dir, now_s, status, age_s).facts()

    def _age(self, status: Facts, now_s: float) -> float | None:
        at = files.text(status.get("at"))
        if self._seen and at != self._seen:
            self._changed_at_s = time.monotonic()
        self._seen = at
        if self._changed_at_s is not None:
            return time.monotonic() - self._changed_at_s
        written_s = files.seconds_of(at)
        return None if written_s is None else max(0.0, now_s - written_s)


@dataclass
class _Look:
    run_dir: Path
    now_s: float
    status: Facts
    age_s: float | None
    warnings: list[str] = field(default_factory=list)

    def facts(self) -> Facts:
        attempts, records = self._attempts(), files.json_lines(self.run_dir / "metrics.jsonl")
        recipe, job = files.recipe_numbers(self.run_dir / "recipe.toml"), files.newest_lease(self.run_dir, self.now_s)
        launch = self._launch(attempts, job)
        hosts = self._hosts() if launch else []
        ranks = [rank for host in hosts for rank in host["ranks"]]
        checkpoint = self._checkpoint()
        limit = self._limit(attempts, ranks) if launch else self._limit_of_job(job, checkpoint)
        judged, steps = [], []
        for each in records:
            (judged if any(name.startswith(_JUDGED) for name in each) else steps).append(each)
        record = self._record(steps, limit)
        self._mark(ranks, record)
        step = self._step(launch, attempts, ranks, record, checkpoint)
        is_over = launch["state"] == "over" if launch else job is not None and job["is_free"]
        if launch is None and job and not job["is_free"] and job["age_s"] > LEASE_S:
            self.warnings.append(f"the job at work has not touched its lease for {age(job['age_s'])}: it may be dead")
        self._warn(launch, hosts, record, checkpoint, step, recipe)
        left = None if step is None or not recipe["num_steps"] else max(0, recipe["num_steps"] - step)
        left_s = (
            left * record["step_ms"] / 1000 if left is not None and files.is_number(record.get("step_ms")) else None
        )
        return {
            "run_dir": files.text(str(self.run_dir)),
            "at": datetime.fromtimestamp(self.now_s, timezone.utc).isoformat(timespec="seconds"),
            "is_over": is_over,
            "step": step,
            "num_steps": recipe["num_steps"],
            "remaining_s": None if is_over else left_s,
            "launch": launch,
            "job": job,
            "metrics": record or None,
            "judged": self._record(judged, limit) or None,
            "best": files.word(self.run_dir / "best") or None,
            "checkpoint": checkpoint,
            "attempts": attempts,
            "hosts": hosts,
            "warnings": self.warnings,
        }

    def _launch(self, attempts: list[Facts], job: Facts | None) -> Facts | None:
        """state: that of the file, or `gone` (the launch died), or `over` (it has ended).

        None without a launch, and where somebody trains on without one since the last.
        """
        lease, told_s = (
            files.newest_lease(self.run_dir / "launch", self.now_s),
            files.seconds_of(files.text(self.status.get("at"))),
        )
        if not self.status and not attempts:
            return None
        since_s = files.seconds_of(job["since"] or "") if job and not job["is_free"] else None
        if lease and lease["is_free"] and told_s is not None and since_s is not None and since_s > told_s:
            return None
        state = files.text(self.status.get("state")) or "unknown"
        if lease is not None and lease["is_free"] and state in ("ended", "unknown"):
            state = "over"
        elif self.age_s is not None and self.age_s > STALE_S and state != "ended":
            state = "gone"
        elif self.age_s is not None and self.age_s > 600 and state == "ended":
            state = "over"  # a pause between two attempts is never as long
        last = attempts[-1] if attempts else {}
        return {
            "state": state,
            "at": files.text(self.status.get("at")) or None,
            "age_s": self.age_s,
            "attempt": files.whole(self.status.get("attempt")) or last.get("attempt"),
            "retries_left": files.whole(self.status.get("retries_left")),
            "runner": files.text(self.status.get("runner")) or last.get("runner"),
            "skip_steps": last.get("skip_steps") or [],
        }

    def _attempts(self) -> list[Facts]:
        """Start and end of each in one; a launch that was killed leaves some without an end."""
        found: list[Facts] = []
        for line in files.json_lines(self.run_dir / "launch/attempts.jsonl"):
            number = files.whole(line.get("attempt"))
            if line.get("event") == "start":
                hosts = line["hosts"] if isinstance(line.get("hosts"), list) else []
                found.append({
                    "attempt": number, "at": files.text(line.get("at")), "runner": files.text(line.get("runner")),
                    "hosts": [files.text(host[0]) for host in hosts if isinstance(host, list) and host],
                    "world_size": files.whole(line.get("world_size")), "from_step": files.whole(line.get("from_step")),
                    "skip_steps": line["skip_steps"] if isinstance(line.get("skip_steps"), list) else [],
                    "outcome": None,
                })  # fmt: skip
            elif line.get("event") == "end" and found and found[-1]["attempt"] == number:
                bad = line["bad_hosts"] if isinstance(line.get("bad_hosts"), list) else []
                found[-1] |= {
                    "outcome": files.text(line.get("outcome")), "exit_code": files.whole(line.get("exit_code")),
                    "host": files.text(line.get("host")) or None, "rank": files.whole(line.get("rank")),
                    "step": files.whole(line.get("step")), "error": files.text(line.get("error")) or None,
                    "bad_hosts": [files.text(host) for host in bad], "seconds": files.number(line.get("seconds")),
                }  # fmt: skip
        return found

    def _hosts(self) -> list[Facts]:
        hosts = []
        for host in self.status["hosts"] if isinstance(self.status.get("hosts"), list) else []:
            if not isinstance(host, dict):
                continue
            ranks = []
            for rank in host["ranks"] if isinstance(host.get("ranks"), list) else []:
                if isinstance(rank, dict) and files.whole(rank.get("rank")) is not None:
                    names = ("rank", "pid", "step")
                    shown: Facts = {name: files.whole(rank.get(name)) for name in names}
                    shown |= {name: files.text(rank.get(name)) for name in ("phase", "state")}
                    ranks.append(shown | {"age_s": files.number(rank.get("age_s")), "odd": None})
            hosts.append(
                {"name": files.text(host.get("name")), "silence_s": files.number(host.get("silence_s")), "ranks": ranks}
            )
        return hosts

    def _limit_of_job(self, job: Facts | None, checkpoint: Facts | None) -> float:
        """Without a launch: records from before the present job are good up to the checkpoint that it goes on from."""
        since_s = files.seconds_of(job["since"] or "") if job and not job["is_free"] else None
        try:
            written_s = os.stat(self.run_dir / "metrics.jsonl").st_mtime
        except OSError:
            return math.inf
        if since_s is None or written_s >= since_s:
            return math.inf
        self.warnings.append("the job at work has written no metrics yet")
        return checkpoint["step"] if checkpoint else 0

    def _limit(self, attempts: list[Facts], ranks: list[Facts]) -> float:
        """Records of later steps are an earlier attempt's."""
        if not ranks:
            return math.inf
        stepping = [rank["step"] or 0 for rank in ranks if rank["phase"] not in _BEFORE_STEPS]
        started_at = (attempts[-1]["from_step"] if attempts else None) or 0
        return max(stepping, default=started_at)

    def _record(self, records: list[Facts], limit: float) -> Facts:
        """The last record of the present attempt or, before it has one, of what it goes on from."""
        for record in reversed(records):
            step = files.whole(record.get("step"))
            if step is not None and step <= limit:
                numbers = {name: value for name, value in record.items() if value is None or files.is_number(value)}
                return numbers | {"step": step}
        return {}

    def _step(
        self, launch: Facts | None, attempts: list[Facts], ranks: list[Facts], record: Facts, checkpoint: Facts | None
    ) -> int | None:
        """Steps done: by the ranks, else by the end of the attempt, else by metrics and checkpoints."""
        if launch is not None and launch["state"] != "over":
            stepping = [rank["step"] or 0 for rank in ranks if rank["phase"] not in _BEFORE_STEPS]
            started_at = attempts[-1]["from_step"] if attempts else None
            return max(stepping, default=started_at)
        if launch is not None and attempts and attempts[-1].get("step") is not None:
            return attempts[-1]["step"]
        known = [record.get("step"), checkpoint["step"] if checkpoint else None]
        return max((step for step in known if step is not None), default=None)

    def _mark(self, ranks: list[Facts], record: Facts) -> None:
        """Say of each rank what is odd about it."""
        if self.status.get("state") == "ended":
            return
        first = max((rank["step"] or 0 for rank in ranks), default=0)
        are_stepping = sum(rank["phase"] not in _BEFORE_STEPS for rank in ranks) * 2 > len(ranks)
        usual_s = (files.number(record.get("step_ms")) or 0) / 1000
        slow_s = max(SLOW_S, SLOW_STEPS * usual_s)
        middle_s = statistics.median([rank["age_s"] or 0.0 for rank in ranks]) if ranks else 0.0
        for rank in ranks:
            age_s = rank["age_s"] or 0.0
            if rank["state"][:1] in STATES:
                rank["odd"] = STATES[rank["state"][:1]]
            elif are_stepping and rank["phase"] in _BEFORE_STEPS:
                rank["odd"] = "has not begun"
            elif are_stepping and (rank["step"] or 0) < first - 1:
                rank["odd"] = f"{first - (rank['step'] or 0)} steps behind"
            elif are_stepping and age_s > slow_s and age_s > 2 * middle_s + 1:
                rank["odd"] = f"no step for {age_s:.0f} s"
        if are_stepping and middle_s > slow_s and self.age_s is not None and self.age_s <= STALE_S:
            self.warnings.append(f"no rank has made a step for {middle_s:.0f} s")

    def _checkpoint(self) -> Facts | None:
        """The newest by its name, with a manifest."""
        damaged, found = [], []
        for name in files.names(self.run_dir):
            if match := _CHECKPOINT.fullmatch(name):
                found.append((int(match[1]), name))
            elif name.endswith(".damaged") and _CHECKPOINT.match(name):
                damaged.append(name)
        if damaged:
            self.warnings.append(f"damaged checkpoints: {', '.join(sorted(damaged)[-3:])}")
        for step, name in sorted(found, reverse=True):
            try:
                saved_at_s = os.stat(self.run_dir / name / "manifest.json").st_mtime
            except OSError:
                self.warnings.append(f"{name} has no manifest that can be read")
                continue
            age_s = max(0.0, self.now_s - saved_at_s)
            return {"step": step, "name": name, "age_s": age_s, "count": len(found)}
        return None

    def _warn(
        self, launch: Facts | None, hosts: list[Facts], record: Facts, checkpoint: Facts | None, step: int | None,
        recipe: Facts,
    ) -> None:  # fmt: skip
        is_running = launch is not None and launch["state"] in ("starting", "running", "stopping")
        if launch is not None and launch["state"] == "gone":
            since = f"since {launch['at']} ({age(launch['age_s'])})"
            self.warnings.insert(0, f"the launch is silent {since}: it is dead, or its disk or clock is not this one's")
        silent = [host for host in hosts if is_running and (host["silence_s"] or 0) > SILENT_S]
        if silent:
            worst = max(silent, key=lambda host: host["silence_s"])
            more = f", and {len(silent) - 1} more" if len(silent) > 1 else ""
            self.warnings.append(f"host {worst['name']} is silent for {worst['silence_s']:.0f} s{more}")
        if record and record.get("loss") is None:
            self.warnings.append(f"the loss at step {record['step']} is not finite")
        if skipped := files.number(record.get("skipped_steps")):
            self.warnings.append(f"{skipped:.0f} steps before step {record['step']} were skipped")
        if launch is not None and launch["skip_steps"]:
            self.warnings.append(f"passed over for good: steps {', '.join(map(str, launch['skip_steps'][:20]))}")
        save_every, saved = recipe["save_every"], checkpoint["step"] if checkpoint else 0
        if is_running and step is not None and save_every and step - saved > 2 * save_every + 2:
            self.warnings.append(f"no checkpoint since step {saved}, though one is due every {save_every} steps")
        for switch in ("STOP", "SAVE"):
            if (self.run_dir / switch).exists():
                self.warnings.append(f"{switch} is asked for by the file {switch}")


def age(seconds: float | None) -> str:
    """`12 s`, `5 min`, `3 h`, `2 days`."""
    if seconds is None:
        return "?"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def odd_ranks(facts: Mapping[str, Any]) -> list[tuple[str, Facts]]:
    """(host, rank) of all that are odd, the dead and stopped first, then the oldest."""
    found = [(host["name"], rank) for host in facts["hosts"] for rank in host["ranks"] if rank["odd"]]

    def order(each: tuple[str, Facts]) -> tuple[bool, float, int]:
        rank = each[1]
        return rank["state"][:1] not in STATES, -(rank["age_s"] or 0), rank["rank"]

    return sorted(found, key=order)

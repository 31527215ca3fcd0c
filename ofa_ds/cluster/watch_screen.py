"""`ofa-ds runs watch` on a terminal, in a file, or as JSON: what `watch.Watcher` knows, as lines."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ofa_ds.cluster.watch import Facts, Watcher, age, odd_ranks

_WORDS = {
    "gone": "LAUNCH GONE", "over": "over", "starting": "starting", "running": "running", "stopping": "stopping",
    "ended": "between two attempts",
}  # fmt: skip
_HOME, _REST_OF_LINE, _REST_OF_SCREEN, _CLEAR = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"


def watch(run_dir: Path, *, as_json: bool, once: bool, every_s: float, out: TextIO | None = None) -> int:
    """Shows the run until it is over, or until Ctrl-C. Raises ValueError where there is no such directory."""
    out = sys.stdout if out is None else out
    watcher, is_terminal = Watcher(run_dir), out.isatty() and not as_json and not once
    told = ""
    try:
        if is_terminal:
            out.write(_CLEAR)
        while True:
            facts = watcher.look()
            if as_json:
                out.write(f"{json.dumps(facts, allow_nan=False)}\n")
            elif once:
                out.write("\n".join(lines(facts)) + "\n")
            elif is_terminal:
                size = shutil.get_terminal_size()
                shown = [line[: size.columns - 1] for line in lines(facts, height=size.lines - 1)]
                out.write(_HOME + "".join(f"{line}{_REST_OF_LINE}\n" for line in shown) + _REST_OF_SCREEN)
            elif (text := "\n".join([short(facts), *facts["warnings"]])) != told:
                new = [line for line in text.splitlines() if line not in told.splitlines()]
                out.write("".join(f"{line}\n" for line in new))
                told = text
            out.flush()
            if once or facts["is_over"]:
                return 0
            time.sleep(every_s)
    except KeyboardInterrupt:
        return 0


def short(facts: Facts) -> str:
    """One line: how far, how fast, how well."""
    return "  ".join(part for part in (_progress(facts), _loss(facts), _state(facts), _checkpoint(facts)) if part)


def lines(facts: Facts, *, height: int = 1000) -> list[str]:
    """The whole screen; with few lines only what matters most, and how much more there is."""
    found = [f"{facts['run_dir']}  {_progress(facts)}  {_state(facts)}"]
    found += [f"speed      {speed}" for speed in [_speed(facts)] if speed]
    found += [f"training   {text}" for text in [_loss(facts)] if text]
    found += [f"judged     {text}" for text in [_judged(facts)] if text]
    found += [f"saved      {_checkpoint(facts)}"]
    found += [f"WARNING    {text}" for text in facts["warnings"]]
    ended = [each for each in facts["attempts"] if each["outcome"]]
    room = max(4, (height - len(found)) // 3)
    found += [_attempt(each) for each in ended[-min(room, 6) :]]
    if not facts["hosts"]:
        return [*found, *_job(facts)][:height]
    room = max(3, height - len(found) - 2)
    odd = [_odd(host, rank) for host, rank in odd_ranks(facts)]
    most = room if len(facts["hosts"]) <= 1 else max(1, room // 2)
    found += _folded(odd, most, "more odd ranks")
    rows = _host_rows(facts)
    return [*found, "", *_folded(rows, max(2, height - len(found) - 1), "more hosts, like the last of these")][:height]


def _folded(rows: Sequence[str], room: int, what: str) -> list[str]:
    if len(rows) <= room:
        return list(rows)
    return [*rows[: room - 1], f"and {len(rows) - room + 1:,} {what}"]


def _progress(facts: Facts) -> str:
    if facts["step"] is None:
        return "no step yet"
    if not facts["num_steps"]:
        return f"step {facts['step']:,}"
    return f"step {facts['step']:,} of {facts['num_steps']:,} ({facts['step'] / facts['num_steps']:.0%})"


def _state(facts: Facts) -> str:
    launch = facts["launch"]
    if launch is None:
        return ""
    last = facts["attempts"][-1] if facts["attempts"] else {}
    ranks = sum(len(host["ranks"]) for host in facts["hosts"]) or last.get("world_size") or 0
    words = [_WORDS.get(launch["state"], launch["state"])]
    if launch["state"] == "over" and last.get("outcome"):
        words = [f"over: {last['outcome']}"]
    if launch["attempt"] is not None:
        left = launch["retries_left"]
        words.append(f"attempt {launch['attempt']}" + (f" ({left} retries left)" if left is not None else ""))
    num_hosts = len(facts["hosts"]) or len(last.get("hosts", ()))
    words.append(f"{num_hosts:,} hosts, {ranks:,} ranks, {launch['runner'] or 'unknown runner'}")
    return ", ".join(words)


def _speed(facts: Facts) -> str:
    record = facts["metrics"] or {}
    parts = [
        f"{record['step_ms']:,.0f} ms a step" if record.get("step_ms") is not None else "",
        f"{record['examples_per_s']:,.0f} examples/s" if record.get("examples_per_s") is not None else "",
        f"{record['tokens_per_s']:,.0f} tokens/s" if record.get("tokens_per_s") is not None else "",
        f"{record['data_wait_fraction']:.0%} waiting" if record.get("data_wait_fraction") is not None else "",
        f"{age(facts['remaining_s'])} left" if facts["remaining_s"] else "",
    ]
    return ", ".join(part for part in parts if part)


def _judged(facts: Facts) -> str:
    record = facts["judged"]
    if record is None:
        return ""
    scores = {name.partition("/")[2]: value for name, value in record.items() if "/" in name and value is not None}
    text = f"{', '.join(f'{name} {value:.4f}' for name, value in scores.items())} at step {record['step']:,}"
    return f"{text}; the best is {facts['best']}" if facts["best"] else text


def _loss(facts: Facts) -> str:
    record = facts["metrics"]
    if record is None:
        return ""
    loss = record.get("loss")
    text = f"loss {'not finite' if loss is None else f'{loss:.4f}'} at step {record['step']:,}"
    if record.get("lr") is not None:
        text += f", lr {record['lr']:.2e}"
    if record.get("grad_norm") is not None:
        text += f", grad {record['grad_norm']:.2f}"
    if record.get("peak_memory_MiB") is not None:
        text += f", {record['peak_memory_MiB']:,.0f} MiB"
    return text


def _checkpoint(facts: Facts) -> str:
    found = facts["checkpoint"]
    if found is None:
        return "no checkpoint"
    return f"checkpoint {found['step']:,}, {age(found['age_s'])} ago" + (
        f" ({found['count']} there)" if found["count"] > 1 else ""
    )


def _attempt(each: Facts) -> str:
    where = f" on {each['host']}" if each["host"] else ""
    where += f", rank {each['rank']}" if each["rank"] is not None else ""
    step = f" at step {each['step']:,}" if each["step"] is not None else ""
    code = f", exit code {each['exit_code']}" if each["exit_code"] else ""
    left_out = f"; left out: {', '.join(each['bad_hosts'])}" if each["bad_hosts"] else ""
    error = f": {each['error']}" if each["error"] else ""
    lasted = f" after {age(each['seconds'])}" if each["seconds"] is not None else ""
    return f"attempt {each['attempt']}  {each['outcome']}{step}{lasted}{where}{code}{left_out}{error}"


def _job(facts: Facts) -> list[str]:
    """Whose the run is, where no launch tells about ranks."""
    job = facts["job"]
    if job is None:
        return ["nobody has begun to train here"]
    who = f"host {job['host']}, pid {job['pid']}, since {job['since']}"
    if job["is_free"]:
        return [f"no job is at work; the last was {who}"]
    return [f"job        {who}; not started by ofa-ds launch: its ranks are not known"]


def _odd(host: str, rank: Facts) -> str:
    where = f"rank {rank['rank']} on {host}"
    return f"ODD        {where}: {rank['odd']} (step {rank['step']}, {rank['phase']}, pid {rank['pid']})"


def _host_rows(facts: Facts) -> list[str]:
    """Silent hosts first, then those with odd ranks, then the oldest."""
    width = min(40, max(len(host["name"]) for host in facts["hosts"]))

    def order(host: Facts) -> tuple[float, int, str]:
        silent = host["silence_s"] or 0.0
        return (-silent if silent > 5 else 0.0, -sum(rank["odd"] is not None for rank in host["ranks"]), "")

    return [_host_row(host, width) for host in sorted(facts["hosts"], key=order)]


def _host_row(host: Facts, width: int) -> str:
    ranks = host["ranks"]
    name = host["name"][:width].ljust(width)
    silent = f"  silent for {host['silence_s']:.0f} s" if (host["silence_s"] or 0) > 5 else ""
    if not ranks:
        return f"{name}  no ranks yet{silent}"
    numbers = sorted(rank["rank"] for rank in ranks)
    steps = [rank["step"] or 0 for rank in ranks]
    phases = Counter(rank["phase"] or "?" for rank in ranks)
    shown = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
    step = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,}-{max(steps):,}"
    doing = ", ".join(f"{phase} {count}" if len(phases) > 1 else phase for phase, count in phases.most_common())
    oldest = max((rank["age_s"] or 0.0 for rank in ranks), default=0.0)
    return f"{name}  ranks {shown:<9}  {doing:<12} {step:>9}  {age(oldest):>6} ago{silent}"

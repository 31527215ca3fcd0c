"""Two runs side by side: in what they differ, where their curves part. Facts for programs, lines for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ofa_ds.config.meaning import FREE, MEANING
from ofa_ds.runs.curves import Pair, only_in, pairs, text_of
from ofa_ds.runs.reading import Facts, Run, read_run

VERSION = 1
"""Of the JSON."""
ROWS = 60
"""Lines of a part, at most."""
_OF_LEARNING = (*MEANING, *(key for key in FREE if key.startswith("optim.")), "train.num_steps", "train.num_epochs",
                "train.init_from", "train.skip_steps", "train.max_spike_sigma")  # fmt: skip
_NAMES = {"recipe": "recipe", "deepspeed": "DeepSpeed", "data": "data", "environment": "code, machine, ranks"}
_WIDTH = 38
_NOT_THERE = "(not there)"


def compare(path_a: Path, path_b: Path) -> tuple[Run, Run, Facts]:
    """Raises ValueError, one line, where one of them is no run directory."""
    one, other = read_run(path_a), read_run(path_b)
    is_same = path_a.resolve() == path_b.resolve()
    found = pairs(one.metrics, other.metrics)
    facts: Facts = {
        "version": VERSION,
        "same_directory": is_same,
        "runs": [_about(run) for run in (one, other)],
        "recipe": differences(one.recipe, other.recipe, without={"run_dir"}) if one.recipe and other.recipe else None,
        "deepspeed": differences(one.deepspeed, other.deepspeed) if one.deepspeed and other.deepspeed else None,
        "data": _known_to_both(one.data, other.data) if one.data and other.data else None,
        "environment": _environments(one, other),
        "curves": [_curve(pair) for pair in found],
        "only_in_a": only_in(one.metrics.curves, other.metrics.curves),
        "only_in_b": only_in(other.metrics.curves, one.metrics.curves),
    }
    return one, other, facts


def differences(one: Facts, other: Facts, without: set[str] | frozenset[str] = frozenset()) -> dict[str, list[Any]]:
    """[A's, B's] by name; None where it is not there."""
    names = [*one, *(name for name in other if name not in one)]
    return {
        name: [one.get(name), other.get(name)]
        for name in names
        if name not in without and one.get(name) != other.get(name)
    }


def _known_to_both(one: Facts, other: Facts) -> dict[str, list[Any]]:
    shared = one.keys() & other.keys()
    return differences({name: one[name] for name in one if name in shared}, {name: other[name] for name in shared})


def _environments(one: Run, other: Run) -> dict[str, list[Any]] | None:
    """Of two reports, everything; where one is a checkpoint's, what it knows."""
    if not (one.environment and other.environment):
        return None
    compared = differences if one.has_report and other.has_report else _known_to_both
    return compared(one.environment, other.environment)


def _about(run: Run) -> Facts:
    return {
        "path": str(run.path), "last_step": run.metrics.last_step, "num_steps": run.recipe.get("train.num_steps"),
        "attempts": run.attempts, "checkpoint": run.checkpoint or None, "command": run.command or None,
        "broken_lines": run.metrics.num_broken, "notes": run.notes,
    }  # fmt: skip


def _curve(pair: Pair) -> Facts:
    means = [None if math.isnan(mean) else mean for mean in pair.means]
    return {
        "name": pair.name, "steps": [pair.first, pair.last], "means": means, "common_steps": pair.common,
        "parted_at": pair.parted, "largest_difference": pair.largest,
        "change": None if math.isnan(pair.change) else pair.change,
    }  # fmt: skip


def lines(facts: Facts) -> list[str]:
    """For people."""
    found = []
    for letter, run in zip("AB", facts["runs"], strict=True):
        of = f" of {run['num_steps']}" if run["num_steps"] is not None else ""
        more = [f"{run['attempts']} attempts"] if run["attempts"] > 1 else []
        more += [f"checkpoint {run['checkpoint']}" if run["checkpoint"] else "no checkpoint"]
        found.append(f"{letter}  {run['path']}: step {run['last_step']}{of}, {', '.join(more)}")
        found += [f"   {letter}: {note}" for note in run["notes"]]
    if facts["same_directory"]:
        found.append("A and B are the same directory.")
    for part, name in _NAMES.items():
        if facts[part] is None:
            found.append(f"{name}: cannot be compared, one of the runs has none of it")
        elif part == "recipe" and facts[part]:
            learning = {key: pair for key, pair in facts[part].items() if _acts_on_learning(key)}
            found += _part("recipe, what acts on learning", learning)
            found += _part("recipe, the rest", {key: facts[part][key] for key in facts[part] if key not in learning})
        else:
            found += _part(name, facts[part])
    return [*found, *_curves(facts)]


def _acts_on_learning(key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in _OF_LEARNING)


def _part(name: str, found: dict[str, list[Any]]) -> list[str]:
    if not found:
        return [f"{name}: the same"]
    width = max(len(key) for key in found)
    rows = [f"  {key:<{width}}  {_shown(one):<{_WIDTH}}  {_shown(other)}" for key, (one, other) in found.items()]
    return [f"{name}: {len(found)} differ", *_folded(rows)]


def _folded(rows: Sequence[str]) -> list[str]:
    return [*rows[:ROWS], *([f"  and {len(rows) - ROWS} more: --json has all"] if len(rows) > ROWS else [])]


def _shown(value: Any) -> str:
    text = _NOT_THERE if value is None else "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _curves(facts: Facts) -> list[str]:
    found = []
    curves = facts["curves"]
    if curves:
        found.append("curves, means over the last tenth of the steps that both have; where they part")
        width = max(len(curve["name"]) for curve in curves)
        rows = []
        for curve in curves:
            one, other = (math.nan if mean is None else mean for mean in curve["means"])
            change = f"{curve['change']:+.2%}" if curve["change"] is not None else "-"
            parted = "nowhere" if curve["parted_at"] is None else f"step {curve['parted_at']:.0f}"
            if not curve["common_steps"]:
                parted = "no step is logged by both"
            name = curve["name"]
            rows.append(f"  {name:<{width}}  {text_of(name, one):>12} {text_of(name, other):>12} {change:>9}  {parted}")
        found += _folded(rows)
    else:
        found.append("curves: the runs have no steps in common")
    for letter in "ab":
        if only := facts[f"only_in_{letter}"]:
            found.append(f"only {letter.upper()} has: {', '.join(only[:20])}{' ...' if len(only) > 20 else ''}")
    return found

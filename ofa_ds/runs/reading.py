"""What a run directory of any version says of its run: recipe, layout, data, code, machine, numbers.

Newest first: what the last attempt left (`ofa_ds.train.report_attempt`), else the files that older versions wrote, else
the manifest of the newest checkpoint. What is missing or broken is told; nothing raises but a place that is no run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ofa_ds.config import recipe_from_dict, recipe_to_dict
from ofa_ds.runs.curves import Metrics, read_metrics
from ofa_ds.terms import CHECKPOINT
from ofa_ds.train.report_attempt import Attempt, read_attempts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Facts = dict[str, Any]
"""Values by dotted name."""

_STEP = re.compile(CHECKPOINT)
_MOMENTARY = re.compile(
    r"version|started|first_step|command\..*|variables\.(MASTER_(PORT|ADDR)|RANK|WORLD_SIZE|HOSTNAME|TMPDIR|PATH|PYTHONPATH|"
    r"TORCHELASTIC_\w+|TORCH_NCCL_TRACE\w*|OFA_\w*DIR|SLURM_\w*(JOB|STEP|TASK|NODE)\w*)|ranks\.of_hosts\..*"
)  # fmt: skip
"""Of an environment, what differs from start to start and says nothing."""


@dataclass(kw_only=True)
class Run:
    path: Path
    recipe: Facts = field(default_factory=dict)
    deepspeed: Facts = field(default_factory=dict)
    data: Facts = field(default_factory=dict)
    environment: Facts = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    attempts: int = 0
    checkpoint: str = ""
    """Name of the newest; empty where there is none."""
    command: str = ""
    has_report: bool = False
    """Whether an attempt of it is there: else its environment is what a checkpoint says."""
    notes: list[str] = field(default_factory=list)
    """What is missing, broken, or of another version."""


def read_run(path: Path) -> Run:
    """Raises ValueError, one line, where this is no run directory."""
    if not path.is_dir():
        raise ValueError(f"{path}: want the directory of a run, {'got a file' if path.exists() else 'there is none'}")
    run, attempts = Run(path=path), read_attempts(path)
    checkpoints = _checkpoints(path)
    is_there = any((path / name).exists() for name in ("recipe.toml", "metrics.jsonl"))
    if not (is_there or attempts or checkpoints):
        raise ValueError(f"{path}: is no run: it has no recipe.toml, no metrics.jsonl, no attempts and no checkpoint")
    run.attempts, run.checkpoint = len(attempts), checkpoints[0] if checkpoints else ""
    manifest = _manifest(run, path / run.checkpoint / "manifest.json") if checkpoints else {}
    newest = attempts[-1] if attempts else None
    run.recipe = _recipe(run, newest, manifest)
    _of_attempt(run, newest)
    _of_manifest(run, manifest)
    run.metrics = read_metrics(path / "metrics.jsonl")
    if run.metrics.problem:
        run.notes.append(f"no curves: {run.metrics.problem}")
    if run.metrics.num_broken:
        run.notes.append(f"{path / 'metrics.jsonl'}: {run.metrics.num_broken} broken lines are left out")
    return run


def _checkpoints(path: Path) -> list[str]:
    try:
        names = [each.name for each in path.iterdir() if _STEP.fullmatch(each.name)]
    except OSError:
        return []
    return sorted(names, key=lambda name: -int(name.partition("_")[2]))


def _recipe(run: Run, newest: Attempt | None, manifest: Mapping[str, Any]) -> Facts:
    """By key, as this version has it; of a later version, as it stands."""
    extra = manifest.get("extra")
    places: list[tuple[str, Any]] = []
    if newest is not None and newest.recipe is not None:
        places.append((str(newest.path / "recipe.toml"), newest.recipe))
    places.append((str(run.path / "recipe.toml"), None))
    if isinstance(extra, dict):
        places.append((f"{run.path / run.checkpoint}: recipe", extra.get("recipe")))
    for origin, content in places:
        try:
            text = Path(origin).read_text(encoding="utf-8") if content is None else content
            values = tomllib.loads(text) if isinstance(text, str) else text
        except (OSError, ValueError, RecursionError) as error:
            if not isinstance(error, FileNotFoundError):
                run.notes.append(f"{origin}: cannot be read: {' '.join(str(error).split())[:200]}")
            continue
        if not isinstance(values, dict):
            continue
        try:
            return flat({**recipe_to_dict(recipe_from_dict(values, origin)), "version": None})
        except ValueError as error:
            run.notes.append(f"{error}; it is compared as it stands")
            return flat(values)
    run.notes.append("it has no recipe that can be read")
    return {}


def _of_attempt(run: Run, newest: Attempt | None) -> None:
    if newest is None:
        run.notes.append("it has no report of an attempt, as older versions have none: its checkpoint says less")
        return
    run.has_report = newest.environment is not None
    run.notes += newest.problems
    run.deepspeed, run.data = flat(newest.resolved or {}), flat(newest.data or {})
    environment = flat(newest.environment or {})
    run.environment = {name: value for name, value in environment.items() if not _MOMENTARY.fullmatch(name)}
    arguments = environment.get("command.arguments")
    run.command = " ".join(map(str, arguments)) if isinstance(arguments, list) else ""
    run.data.pop("version", None)


def _of_manifest(run: Run, manifest: Mapping[str, Any]) -> None:
    """What a checkpoint knows, under the names of a report; a report knows better."""
    extra = manifest.get("extra")
    identity = extra.get("identity") if isinstance(extra, dict) else None
    if isinstance(identity, dict):
        for name, key in (("data", "shards.fingerprint"), ("vocab", "vocab.fingerprint")):
            if isinstance(identity.get(name), str):
                run.data.setdefault(key, identity[name])
    code = manifest.get("code")
    for name, value in code.items() if isinstance(code, dict) else ():
        run.environment.setdefault(f"software.{name.replace('_', '-')}", value)
    if isinstance(manifest.get("world_size"), int):
        run.environment.setdefault("ranks.count", manifest["world_size"])


def _manifest(run: Run, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}")
        return {}
    return found if isinstance(found, dict) else {}


def flat(values: Mapping[str, Any], prefix: str = "") -> Facts:
    """{"a": {"b": 1}} as {"a.b": 1}; nothing of None."""
    found: Facts = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found

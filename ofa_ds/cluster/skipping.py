"""Steps that failed twice, and what a recipe says to other numbers of ranks: what a retry changes in the command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofa_ds.cluster.supervisor import Outcome
    from ofa_ds.config import Recipe

KEY = "train.skip_steps"


@dataclass(frozen=True)
class History:
    """What earlier launches into a run_dir left in attempts.jsonl."""

    last_attempt: int = 0
    skip_steps: tuple[int, ...] = ()


def read_history(path: Path) -> History:
    """Lines that a killed launch cut off, or another version wrote, are passed over."""
    last, skips = 0, ()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return History()
    for line in lines:
        try:
            content = json.loads(line)
            last = max(last, int(content["attempt"]))
            if content["event"] == "start":
                skips = tuple(int(step) for step in content["skip_steps"])
        except (ValueError, KeyError, TypeError):
            continue
    return History(last, skips)


def read_rank_0(path: Path) -> Any:
    """[host, pid] of the first rank of the last attempt, as status.json has it; None where it does not."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rank_0"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def repeated_step(failures: Sequence[Outcome]) -> int | None:
    """The number of the step, from 1 on, in which a rank's own exception ended the last two attempts alike."""
    last = [each.verdict for each in failures[-2:]]
    if len(last) < 2 or not all(each.is_own_exception for each in last):
        return None
    phases = {each.exit.phase for each in last}
    if last[0].step != last[1].step or last[0].step is None or not phases <= {"start", "step"} or "step" not in phases:
        return None
    return last[0].step + 1


def with_skips(program: tuple[bytes, ...], skips: Iterable[int], directory: bytes) -> tuple[bytes, ...]:
    """The command, that passes over these steps too; what the user said about steps counts as well."""
    skips = set(skips)
    if not skips:
        return program
    recipe = _recipe(program, directory)
    if recipe is not None:
        skips |= set(getattr(recipe.train, "skip_steps", ()))
    return (*program, f"{KEY}=[{', '.join(map(str, sorted(skips)))}]".encode())


def recipe_problem(program: tuple[bytes, ...], directory: bytes, num_ranks: int) -> str:
    """What a recipe says to so many ranks, in one line; "" where nothing, or where the command has no recipe."""
    from ofa_ds.cluster.check_recipe import check_run

    recipe = _recipe(program, directory)
    if recipe is None:
        return ""
    try:
        check_run(recipe, num_ranks)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return ""


def _recipe(program: tuple[bytes, ...], directory: bytes) -> Recipe | None:
    """Of `pretrain RECIPE [KEY=VALUE ...]` and the like; None for commands that have none."""
    from ofa_ds.config import load_recipe

    words = [os.fsdecode(word) for word in program[1:] if not word.startswith(b"-")]
    if not words:
        return None
    beside = os.path.join(os.fsdecode(directory), words[0])
    try:
        return load_recipe(beside if os.path.isfile(beside) else words[0], [word for word in words[1:] if "=" in word])
    except (ValueError, OSError):
        return None

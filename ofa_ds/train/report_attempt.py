"""What a run was started with, kept beside its checkpoints: enough to run it again, and to tell two runs apart.

    RUN_DIR/attempts/0003/              one for each time that the run was started or gone on with; none is overwritten
        recipe.toml                     resolved: what every key was
        deepspeed.json                  the file that recipe.deepspeed named, as it was read; may be given as deepspeed=
        deepspeed_resolved.json         what DeepSpeed got of it
        environment.json                versions, devices, hosts, code, command, variables; no secrets
        data.json                       fingerprints and sizes of shards and vocabulary

The standard library and storage alone: who reads them needs no torch. Run directories of before have none of this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofa_ds.storage.atomic import new_directory, sync

ATTEMPTS = "attempts"
RECIPE, DEEPSPEED, RESOLVED, ENVIRONMENT, DATA = (
    "recipe.toml", "deepspeed.json", "deepspeed_resolved.json", "environment.json", "data.json",
)  # fmt: skip
_NAME = re.compile(r"\d{4,}")
_TRIES = 16
"""Of two jobs that write at once, each goes on to the next number."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What is kept of one. A file that is missing or damaged is None, and `problems` says so."""

    number: int
    path: Path
    recipe: str | None
    """TOML."""
    deepspeed: dict[str, Any] | None
    resolved: dict[str, Any] | None
    environment: dict[str, Any] | None
    data: dict[str, Any] | None
    problems: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """Steps that were done when it began; 0 where that is not known."""
        value = (self.environment or {}).get("first_step")
        return value if isinstance(value, int) else 0


def write_attempt(run_dir: Path, files: Mapping[str, str]) -> Path:
    """A new attempt with these texts by name; it is there whole or not at all. Raises OSError, ValueError."""
    folder = run_dir / ATTEMPTS
    number = max((number for number, _ in _numbered(run_dir)), default=0)
    for later in range(1, _TRIES + 1):
        place = folder / f"{number + later:04d}"
        try:
            with new_directory(place) as partial:
                for name, text in files.items():
                    (partial / name).write_text(text, encoding="utf-8")
                    sync(partial / name)
            return place
        except ValueError:  # something is there, or another job has made it meanwhile
            continue
    raise ValueError(f"{folder}: no free number after {number}")


def read_attempts(run_dir: str | Path) -> list[Attempt]:
    """Oldest first; none where the run directory is of an earlier version, or is not there."""
    return [_read(number, path) for number, path in sorted(_numbered(Path(run_dir)))]


def _numbered(run_dir: Path) -> list[tuple[int, Path]]:
    try:
        found = [path for path in (run_dir / ATTEMPTS).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []
    return [(int(path.name), path) for path in found]


def _read(number: int, path: Path) -> Attempt:
    problems: list[str] = []

    def text(name: str) -> str | None:
        try:
            return (path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path / name}: {getattr(error, 'strerror', None) or 'not text'}")
            return None

    def values(name: str) -> dict[str, Any] | None:
        content = text(name)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            problems.append(f"{path / name}: not a JSON object")
            return None
        return found

    return Attempt(
        number=number, path=path, recipe=text(RECIPE), deepspeed=values(DEEPSPEED), resolved=values(RESOLVED),
        environment=values(ENVIRONMENT), data=values(DATA), problems=tuple(problems),
    )  # fmt: skip

"""What is in a run's files for somebody who only looks: nothing raises, whatever is in them or is missing."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeGuard

Facts = dict[str, Any]

TAIL_BYTES = 1 << 20
"""Of a file of lines: enough for thousands of them."""
_LEASE = re.compile(r"\.lease_(\d{8,})(_free)?")


def names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def word(path: Path) -> str:
    """The name that a pointer to a checkpoint holds."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return text(file.readline(200).strip())
    except OSError:
        return ""


def json_object(path: Path) -> Facts:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def json_lines(path: Path) -> list[Facts]:
    """The objects in the last TAIL_BYTES of a file of JSON lines; half-written lines are left out."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read(TAIL_BYTES)
    except OSError:
        return []
    found = []
    for line in data.split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def recipe_numbers(path: Path) -> Facts:
    """The numbers of [train] that a watcher needs; only that table is read, by its lines."""
    found: Facts = {"num_steps": None, "save_every": None}
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    table = re.search(r"^\[train\]\n(.*?)(?=^\[|\Z)", content, flags=re.MULTILINE | re.DOTALL)
    for name in found:
        if table and (value := re.search(rf"^{name} *= *(\d+)$", table[1], flags=re.MULTILINE)):
            found[name] = int(value[1])
    return found


def newest_lease(directory: Path, now_s: float) -> Facts | None:
    """The newest lease of a directory: whose it is, and whether it was given back."""
    leases = [match for name in names(directory) if (match := _LEASE.fullmatch(name))]
    if not leases:
        return None
    newest = max(leases, key=lambda match: (int(match[1]), match[2] is not None))
    owner = json_object(directory / newest[0])
    facts: Facts = {name: text(owner.get(name)) or None for name in ("host", "since")}
    try:
        age_s = max(0.0, now_s - os.stat(directory / newest[0]).st_mtime)
    except OSError:
        age_s = 0.0
    return facts | {"pid": whole(owner.get("pid")), "is_free": newest[2] is not None, "age_s": age_s}


def text(value: object) -> str:
    """Without what could move a cursor."""
    return "".join(c if c.isprintable() else " " for c in value)[:500] if isinstance(value, str) else ""


def is_number(value: object) -> TypeGuard[int | float]:
    """Finite, and of a size that floats have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def number(value: object) -> float | None:
    return float(value) if is_number(value) else None


def whole(value: object) -> int | None:
    return int(value) if is_number(value) and value == int(value) else None


def seconds_of(at: str) -> float | None:
    """Since 1970, of an ISO time."""
    try:
        found = datetime.fromisoformat(at.replace("Z", "+00:00"))
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()

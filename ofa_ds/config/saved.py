"""A recipe as it is saved with a run and in each checkpoint, read again by this version or a later one.

What is saved has a version. Where keys move or go, the next version's entry in `_MIGRATIONS` says how older recipes
become such ones; those without a version are of version 1.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ofa_ds.config.architecture import STEMS
from ofa_ds.config.schema import Recipe
from ofa_ds.config.sections import refuse_unknown
from ofa_ds.config.values import first_problem, shown

VERSION_KEY = "version"

_ADAPTER = TypeAdapter(Recipe)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested values, as saved with a run and in each checkpoint."""
    return {VERSION_KEY: VERSION, **_ADAPTER.dump_python(recipe, mode="json")}


def recipe_from_dict(values: Mapping[str, Any], origin: str = "saved recipe") -> Recipe:
    """Inverse of `recipe_to_dict`, for values of any version up to this one. Raises ValueError, one line."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{origin}: want its keys and values, got {shown(values)}")
    return checked(migrated(values, origin), origin)


def checked(values: Mapping[str, Any], origin: str) -> Recipe:
    """The recipe of plain values of this version. Raises ValueError, one line that begins with `origin`."""
    refuse_unknown(values, Recipe, origin)
    try:
        return _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(f"{origin}: {first_problem(error, without=STEMS)}") from error


def migrated(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The values as this version has them, without their version. Raises ValueError for a version yet to come."""
    values = copy.deepcopy(dict(values))
    version = values.pop(VERSION_KEY, 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{origin}: {VERSION_KEY}: want a whole number from 1 on, got {shown(version)}")
    if version > VERSION:
        raise ValueError(
            f"{origin}: a recipe of version {shown(version)}, this ofa-ds reads up to version {VERSION}; use a newer "
            "ofa-ds"
        )
    for migrate in _MIGRATIONS[version - 1 :]:
        migrate(values)
    return values


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to an equal one."""
    return _sections(recipe_to_dict(recipe))


def recipe_as_change(recipe: Recipe, base: str, *, base_recipe: Recipe, comment: str) -> str:
    """TOML of what differs from the recipe `base`, which it extends. comment: one line at its top."""
    changes = _difference(recipe_to_dict(base_recipe), recipe_to_dict(recipe))
    return f"# {' '.join(comment.split())}\n" + _sections({"extends": base, **changes})


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            value = _difference(old[key], value)
            if value:
                found[key] = value
        elif value != old.get(key):
            found[key] = value
    return found


def _sections(recipe: Mapping[str, Any]) -> str:
    lines: list[str] = []

    def section(name: str, values: dict[str, Any]) -> None:
        if name:
            lines.append(f"\n[{name}]")
        lines.extend(f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict))
        for key, value in values.items():
            if isinstance(value, dict):
                section(f"{name}.{key}".lstrip("."), value)

    section("", dict(recipe))
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """JSON, but for three things: TOML has no surrogate pairs, escapes DEL too, and writes {key = value}."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_toml(each)}' for key, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _drop_batch_norm_eps(values: dict[str, Any]) -> None:
    """It never had an effect."""
    model = values.get("model")
    change = model.get("change") if isinstance(model, dict) else None
    if isinstance(change, dict):
        change.pop("batch_norm_eps", None)


_MIGRATIONS: list[Callable[[dict[str, Any]], None]] = [_drop_batch_norm_eps]
"""Entry i turns values of version i + 1, which may be of any type, into those of version i + 2, in place."""

VERSION = 1 + len(_MIGRATIONS)

"""Which keys a section has, by its type: for unknown ones, and for what a KEY=VALUE's text means."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict

from ofa_ds.config.architecture import OWNED_BY_RECIPE, ModelChange
from ofa_ds.config.values import label, nearest, shown


class _AnyName(dict[str, Any]):
    """Sections of one type under names that the user gives."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self._kind = kind

    def __missing__(self, name: str) -> Any:
        return self._kind

    def __contains__(self, name: object) -> bool:
        return True


@cache
def keys_of(kind: Any) -> dict[str, Any] | None:
    """Type of each key of a section; None where `kind` is of a single value. A choice of sections has all keys."""
    if get_origin(kind) is Annotated:
        return keys_of(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        known = [keys_of(each) for each in get_args(kind)]
        return {name: each for keys in known for name, each in keys.items()} if all(known) else None
    if get_origin(kind) is dict:
        return _AnyName(get_args(kind)[1])
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {field.name: hints[field.name] for field in fields(kind)}
    return dict(kind.__annotations__) if is_typeddict(kind) else None


def is_text(kind: Any) -> bool:
    """Whether values of this type are text, such as paths and names out of a list."""
    if get_origin(kind) is Annotated:
        return is_text(get_args(kind)[0])
    return kind is str or (get_origin(kind) is Literal and all(isinstance(each, str) for each in get_args(kind)))


def refuse_unknown(values: Mapping[str, Any], kind: Any, origin: str, prefix: str = "") -> None:
    """Raises ValueError for a key that the section lacks, and for a value in the place of a section."""
    known = keys_of(kind)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{origin}: unknown key {prefix}{label(str(key))}{_hint(str(key), kind, known)}")
        if keys_of(known[key]) is None:
            continue
        if not isinstance(value, Mapping):
            if is_dataclass(value):  # made already
                continue
            place = f"{prefix}{key}"
            raise ValueError(f"{origin}: {place} is a section, got {shown(value)}; want {place}.NAME=VALUE")
        refuse_unknown(value, known[key], origin, f"{prefix}{key}.")


def _hint(key: str, kind: Any, known: Mapping[str, Any]) -> str:
    if kind is ModelChange and key in OWNED_BY_RECIPE:
        return f"; the recipe sets it as {OWNED_BY_RECIPE[key]}"
    return nearest(key, known)

"""Reading a recipe: a TOML file or a shipped name, what it extends, and KEY=VALUE overrides on top."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ofa_ds.config.saved import VERSION_KEY, checked, migrated, recipe_to_dict
from ofa_ds.config.schema import Recipe
from ofa_ds.config.sections import is_text, keys_of
from ofa_ds.config.values import nearest, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parents[1] / "recipes"

_EXTENDS = "extends"
_FINETUNE = "finetune-"


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a file or a shipped name (`pretrain-nano`), with KEY=VALUE overrides.

    Raises ValueError, one line: unknown recipe or key (with the nearest match), wrong type or range, malformed TOML.
    """
    values = _read(find_recipe(recipe))
    given: dict[str, str] = {}
    changes: dict[str, Any] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in given:
            raise ValueError(f"{key} is given twice: {shown(given[key])} and {shown(override)}; leave one out")
        given[key] = override
        changes = _applied(changes, override)
    _check_length(changes, "overrides")
    return checked(_on_top(values, changes), str(recipe))


def changed_recipe(recipe: Recipe, overrides: Iterable[str], origin: str) -> Recipe:
    """A recipe with KEY=VALUE on top. Raises ValueError as `load_recipe`, beginning with `origin`."""
    values = migrated(recipe_to_dict(recipe), origin)
    for override in overrides:
        values = _applied(values, override)
    return checked(values, origin)


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given by path or by shipped name."""
    path = Path(recipe)
    try:
        is_file, is_run = path.is_file(), (path / "recipe.toml").is_file()
    except OSError as error:
        raise ValueError(f"recipe {shown(str(recipe))}: {error.strerror}") from error
    if is_file:
        return path
    if is_run:
        raise ValueError(f"recipe {recipe}: is a run directory; its recipe is {path / 'recipe.toml'}")
    if path.suffix == ".toml":
        raise ValueError(f"recipe {recipe}: no such file")
    names = shipped_recipes()
    if str(recipe) in names:
        return RECIPES / f"{recipe}.toml"
    told = [*(name for name in names if not name.startswith(_FINETUNE)), f"{_FINETUNE}TASK-SIZE"]
    raise ValueError(
        f"recipe {shown(str(recipe))}: neither a .toml file nor one of {', '.join(told)}{nearest(str(recipe), names)}"
    )


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def _read(path: Path) -> dict[str, Any]:
    """The values of a recipe on top of those that it extends, all as this version has them."""
    chain: list[Path] = []
    values: dict[str, Any] = {}
    while True:
        chain.append(path)
        own = _parsed(path)
        base = own.pop(_EXTENDS, None)
        if VERSION_KEY not in own:  # what a run saves has both: the epochs, and the steps that they are
            _check_length(own, str(path))
        values = _on_top(migrated(own, str(path)), values)
        if base is None:
            return values
        if not isinstance(base, str) or not base.strip():
            raise ValueError(f"{path}: {_EXTENDS}: want the name or the file of another recipe, got {shown(base)}")
        path = _found_beside(path, base)
        if path.resolve() in [each.resolve() for each in chain]:
            circle = " -> ".join(str(each) for each in [*chain, path])
            raise ValueError(f"{chain[-1]}: {_EXTENDS}: goes round in a circle: {circle}")


def _found_beside(path: Path, base: str) -> Path:
    try:
        beside = path.parent / base
        return beside if beside.is_file() else find_recipe(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {_EXTENDS}: {error}") from error


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except RecursionError as error:
        raise ValueError(f"{path}: not valid TOML: brackets too deep") from error
    except ValueError as error:  # of TOML, of UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: not valid TOML: {error}") from error


def _check_length(values: Mapping[str, Any], origin: str) -> None:
    """Raises ValueError where one file, or one command, says in both ways how long the run is."""
    train = values.get("train")
    if isinstance(train, dict) and "num_steps" in train and train.get("num_epochs", 0) != 0:
        both = " and ".join(f"train.{key}={shown(train[key])}" for key in ("num_epochs", "num_steps"))
        raise ValueError(f"{origin}: {both} both say how long the run is; leave one out")


def _on_top(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` on top of `base`; whoever says train.num_steps takes back the epochs of what is below."""
    own, train = extra.get("train"), base.get("train")
    if isinstance(own, dict) and isinstance(train, dict) and "num_steps" in own:
        base = {**base, "train": {key: value for key, value in train.items() if key != "num_epochs"}}
    return _merged(base, extra)


def _merged(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _applied(values: dict[str, Any], override: str) -> dict[str, Any]:
    """The values with one KEY=VALUE on top. Unknown keys are set too: they are told with the file's own."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError(f"override {shown(override)}: want KEY=VALUE, such as optim.peak_lr=2e-4")
    kind: Any = Recipe
    for i, part in enumerate(parts):
        known = keys_of(kind)
        if known is None:
            raise ValueError(f"override {shown(override)}: {'.'.join(parts[:i])} is a value, not a section")
        if part not in known:
            break
        kind = known[part]
    value: Any = _typed(text, kind)
    for part in reversed(parts):
        value = {part: value}
    return _merged(values, value)


def _typed(text: str, kind: Any) -> Any:
    """A TOML value; what is none, or is none but text where text is wanted, is taken as typed: paths need no quotes."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if found.keys() != {"value"} or (is_text(kind) and not isinstance(found["value"], str)):
        return text
    return found["value"]

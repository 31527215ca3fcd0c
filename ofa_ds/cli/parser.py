"""What every command of `ofa-ds` shares: how one is declared, how its values are read, how wrong usage is told."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofa_ds.config import Recipe

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Commands = Any
"""What `ArgumentParser.add_subparsers` returns; argparse keeps its class to itself."""


class UsageError(ValueError):
    """The command line or the recipe is wrong: exit code 2."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "", []) else super()._get_help_string(action)


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], about: str, *, example: str
) -> argparse.ArgumentParser:
    """Add one command, which `run` carries out; its exit code is 0 where that returns nothing."""
    parser = commands.add_parser(
        name, help=about, description=about, epilog=f"Example: {example}", formatter_class=_Help
    )
    parser.set_defaults(run=run)
    return parser


def group(commands: Commands, name: str, about: str, *, way: str = "") -> Commands:
    """Add a command that has actions of its own: `ofa-ds NAME ACTION`. way: how they follow each other, as it is."""
    more = "\n\n".join(filter(None, [way, f"Each action explains itself: ofa-ds {name} ACTION --help."]))
    parser = commands.add_parser(
        name, help=about, description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser.add_subparsers(metavar="ACTION", required=True)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    return _at_least(0, text)


def from_zero(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    if not 0 <= (value := _float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"want a number of at least 0, got {text!r}")
    return value


def above_zero(text: str) -> float:
    """A number above 0, perhaps infinite, for argparse."""
    if not (value := _float(text)) > 0:
        raise argparse.ArgumentTypeError(f"want a number above 0, got {text!r}")
    return value


def finite(text: str) -> float:
    """A finite number above 0, for argparse."""
    if not 0 < (value := _float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"want a finite number above 0, got {text!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def text(given: str) -> str:
    """Text for a model, for argparse: bytes that are no UTF-8 are refused."""
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"want text that is valid UTF-8, got {given[:40]!r}") from error
    return given


def drawing(given: str) -> Path:
    """A file to draw into, for argparse: refused before the work is done, not after it."""
    path = Path(given)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"want a file name that ends in {', '.join(PICTURE_SUFFIXES)}, got {given!r}")
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a directory" if path.is_dir() else f"there is no directory {str(path.parent)!r}"
        raise argparse.ArgumentTypeError(f"{given!r}: {problem}")
    return path


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command; its words may stand after an option too, where argparse takes none any more."""
    options, more = parser.parse_known_args(arguments)
    if more and hasattr(options, "words") and not any(each.startswith("-") for each in more):
        options.words, more = [*options.words, *more], []
    if more and (not hasattr(options, "set") or any(each.startswith("-") or "=" not in each for each in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.set = [*options.set, *more]
    return options


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"want a whole number of at least {least}, got {text!r}")
    return value


def recipe_of(name: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of a file or a shipped name. Raises UsageError, one line."""
    from ofa_ds.config import load_recipe

    try:
        return load_recipe(name, overrides)
    except ValueError as error:
        raise UsageError(error) from error

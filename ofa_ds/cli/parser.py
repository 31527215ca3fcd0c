"""What every command of `ofa-ds` shares: how one is declared, how its values are read, how wrong usage is told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofa_ds.config import Recipe

Commands = Any
"""What `ArgumentParser.add_subparsers` returns; argparse keeps its class to itself."""


class UsageError(ValueError):
    """The command line or the recipe is wrong: exit code 2."""


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], about: str, *, example: str = ""
) -> argparse.ArgumentParser:
    """Add one command, which `run` carries out; its exit code is 0 where that returns nothing."""
    parser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"Example: {example}" if example else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def group(commands: Commands, name: str, about: str) -> Commands:
    """Add a command that has actions of its own: `ofa-ds NAME ACTION`."""
    return commands.add_parser(name, help=about, description=about).add_subparsers(metavar="ACTION", required=True)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"want a whole number of at least 1, got {text}")
    return value


def recipe_of(name: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of a file or a shipped name. Raises UsageError, one line."""
    from ofa_ds.config import load_recipe

    try:
        return load_recipe(name, overrides)
    except ValueError as error:
        raise UsageError(error) from error

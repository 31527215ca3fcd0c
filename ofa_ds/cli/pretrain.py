"""`ofa-ds pretrain`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, UsageError, command, recipe_of

if TYPE_CHECKING:
    from ofa_ds.config import Recipe


def add_pretrain(commands: Commands) -> None:
    about = (
        "Pretrain by RECIPE: alone, or on every rank under deepspeed, torchrun, srun or mpirun, such as: "
        "deepspeed --module ofa_ds.pretrain RECIPE"
    )
    parser = command(
        commands, "pretrain", _pretrain, about, example="ofa-ds pretrain pretrain-nano train.num_steps=100"
    )
    parser.add_argument("recipe", help="a TOML file, or a shipped recipe such as pretrain-nano or pretrain-6b")
    parser.add_argument(
        "set",
        nargs="*",
        metavar="KEY=VALUE",
        help="keys of the recipe that are to differ, such as optim.peak_lr=2e-4 run_dir=runs/a",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def _pretrain(options: argparse.Namespace) -> int:
    from ofa_ds.beat import Pulse

    rank, world_size = _place()
    pulse = Pulse(rank)  # before anything that takes time
    recipe = _checked(recipe_of(options.recipe, options.set), world_size)
    with heavy_imports():
        from ofa_ds.train.trainer import run

    return run(recipe, pulse)


def _place() -> tuple[int, int]:
    """(rank, number of ranks) of this process. Raises UsageError where its launcher left it unclear."""
    from ofa_ds.engine.rendezvous import rendezvous

    try:
        found = rendezvous(os.environ)
    except ValueError as error:
        raise UsageError(error) from error
    return int(found["RANK"]), int(found["WORLD_SIZE"])


def _checked(recipe: Recipe, world_size: int) -> Recipe:
    """Raises UsageError for what every rank would refuse, before any of them imports torch."""
    from ofa_ds.cluster.check_recipe import check_run

    try:
        check_run(recipe, world_size)
    except ValueError as error:
        raise UsageError(error) from error
    return recipe

"""`ofa-ds pretrain` and `ofa-ds finetune`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, UsageError, command, recipe_of

if TYPE_CHECKING:
    from ofa_ds.config import Recipe


_EVERYWHERE = "alone, or on every rank under deepspeed, torchrun, srun or mpirun"


def add_pretrain(commands: Commands) -> None:
    about = f"Pretrain by RECIPE: {_EVERYWHERE}, such as: deepspeed --module ofa_ds.pretrain RECIPE"
    _add(commands, "pretrain", _pretrain, about, "pretrain-nano train.num_steps=100", "pretrain-nano or pretrain-6b")


def add_finetune(commands: Commands) -> None:
    about = (
        "Fine-tune a model on the task of RECIPE, from the weights train.init_from=CHECKPOINT (ours, or one of "
        f"another program): {_EVERYWHERE}, such as: deepspeed --module ofa_ds.finetune RECIPE"
    )
    settings = "data.shards=shards/vqa data.vocab=vocab train.init_from=ofa_base.pt"
    example = f"finetune-vqa-base {settings}"
    _add(commands, "finetune", _finetune, about, example, "finetune-vqa-large or finetune-sst2-nano")


def _add(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], about: str, example: str, recipes: str
) -> None:
    parser = command(commands, name, run, about, example=f"ofa-ds {name} {example}")
    parser.add_argument("recipe", help=f"a TOML file, or a shipped recipe such as {recipes}")
    parser.add_argument(
        "set",
        nargs="*",
        metavar="KEY=VALUE",
        help="keys of the recipe that are to differ, such as optim.peak_lr=2e-4 run_dir=runs/a",
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def _pretrain(options: argparse.Namespace) -> int:
    return _train("pretrain", options)


def _finetune(options: argparse.Namespace) -> int:
    return _train("finetune", options)


def _train(name: str, options: argparse.Namespace) -> int:
    from ofa_ds.beat import Pulse

    rank, world_size = _place()
    pulse = Pulse(rank)  # before anything that takes time
    recipe = _checked(name, recipe_of(options.recipe, options.set), world_size)
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


def _checked(name: str, recipe: Recipe, world_size: int) -> Recipe:
    """Raises UsageError for what every rank would refuse, before any of them imports torch."""
    from ofa_ds.cluster.check_recipe import check_command, check_run

    try:
        check_command(name, recipe)
        check_run(recipe, world_size)
    except ValueError as error:
        raise UsageError(error) from error
    return recipe

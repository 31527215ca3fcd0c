"""Before a run starts: whether its shards are what it is to learn from, and what its length is in steps."""

from __future__ import annotations

import dataclasses
import math

from ofa_ds.config import Recipe
from ofa_ds.data.sets import sets_of
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab
from ofa_ds.tasks.task import DOWNSTREAM, DOWNSTREAM_FAMILY
from ofa_ds.tasks.task_shards import tasks_of


def settled(recipe: Recipe, shards: Shards) -> Recipe:
    """The recipe with train.num_steps and optim.warmup_steps, where it gives epochs or a share of all steps.

    Raises ValueError, one line, where the shards are not those of the recipe's task, or it cannot learn from them.
    """
    name, train, optim = recipe.data.task.name, recipe.train, recipe.optim
    if name:
        for each in sets_of(shards).values():
            _check_training_rows(recipe, each)
    num_steps, warmup = train.num_steps, optim.warmup_steps
    if train.num_epochs:
        rows = shards.families[DOWNSTREAM_FAMILY]
        num_steps = max(1, math.ceil(train.num_epochs * rows / recipe.batch.global_rows))
    if not warmup:
        warmup = int(num_steps * optim.warmup_ratio)
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(train, num_steps=num_steps),
        optim=dataclasses.replace(optim, warmup_steps=warmup),
    )


def check_ids(recipe: Recipe, vocab: Vocab) -> None:
    """Raises ValueError where criterion.constraint_range leaves the vocabulary."""
    ids = recipe.criterion.constraint_range
    if ids and ids[1] > vocab.size:
        raise ValueError(
            f"criterion.constraint_range {list(ids)}: the vocabulary {recipe.data.vocab} has {vocab.size} entries; "
            f"want at most [{ids[0]}, {vocab.size}]; its coordinate bins are [{vocab.bin_start}, "
            f"{vocab.bin_start + vocab.num_bins}]"
        )


def held_out_shards(recipe: Recipe) -> Shards:
    """Those that train.evaluate_every judges. Raises ValueError where they cannot judge the recipe's task."""
    shards = Shards(recipe.data.heldout, task=recipe.data.task.name)
    _check_task(recipe.data.task.name, shards, "data.heldout")
    part = shards.manifest.families[DOWNSTREAM_FAMILY]
    if part.unanswered == part.rows:
        raise ValueError(f"data.heldout {shards.path}: its rows have no answers, so that nothing can be judged by them")
    return shards


def _check_training_rows(recipe: Recipe, shards: Shards) -> None:
    options = recipe.data.task
    _check_task(options.name, shards, "data.shards")
    part = shards.manifest.families[DOWNSTREAM_FAMILY]
    if part.unanswered:
        raise ValueError(
            f"data.shards {shards.path}: {part.unanswered} of {part.rows} rows have no answer to learn from; build "
            f"them again from rows that have one (ofa-ds shards build --task {options.name})"
        )
    if DOWNSTREAM[options.name].candidates != "file" or not options.constrained:
        return
    if not shards.answers:
        raise ValueError(
            f"data.shards {shards.path}: have no list of answers, over which the loss of {options.name} is; build them "
            "with --answers FILE, or learn over the whole vocabulary with data.task.constrained=false"
        )
    if part.unlisted:
        raise ValueError(
            f"data.shards {shards.path}: the answer of {part.unlisted} of {part.rows} rows is not in their list, so "
            "that their loss is infinite; build them without --held-out, which puts such rows aside, or use "
            "data.task.constrained=false"
        )


def _check_task(name: str, shards: Shards, key: str) -> None:
    here = tasks_of(shards)
    if name not in here:
        what = f"rows of {', '.join(here)}" if here else "rows of pretraining"
        raise ValueError(
            f"{key} {shards.path}: want rows of {name}, got {what}; build them with ofa-ds shards build --task {name}"
        )

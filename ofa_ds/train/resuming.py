"""From which step and state a run starts: its newest checkpoint, weights of another run, or nothing."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from ofa_ds import checkpoint
from ofa_ds.checkpoint.format import BEST
from ofa_ds.checkpoint.manifest import Manifest
from ofa_ds.checkpoint.run_lease import RunLease
from ofa_ds.config import Recipe, recipe_from_dict
from ofa_ds.config.meaning import FREE, MEANING, differences
from ofa_ds.config.values import shown
from ofa_ds.data.sets import mixture_of
from ofa_ds.data.shards import Shards
from ofa_ds.engine.engine import Engine
from ofa_ds.model.config import ModelConfig
from ofa_ds.train.starting import start_from

_MIX = {"data.mix_changes"}
_FEW_STEPS = 8
"""Within which a change can wait for the round of turns to end."""
LOSSES = "losses"
"""Of the last steps, among the facts of a checkpoint."""
_TOLD_OF_TRAIN = ("train.num_steps", "train.skip_steps", "train.max_spike_sigma")
TOLD = tuple(key for key in FREE if key.startswith("optim.") or key in _TOLD_OF_TRAIN)
"""May change, but acts on what is learnt."""


class Start(NamedTuple):
    """Where a run goes on."""

    step: int = 0
    """Steps that are done."""
    losses: tuple[float, ...] = ()
    """Of the steps before, where the checkpoint has them (train.max_spike_sigma)."""
    best: object = None
    """What the checkpoint says of the best one (`train.judging.Best`)."""


def resume(
    engine: Engine, recipe: Recipe, config: ModelConfig, identity: Mapping[str, str], lease: RunLease, shards: Shards
) -> Start:
    """Load the newest checkpoint of the run, else the weights it is to start from.

    config: the engine's model. identity: fingerprints of `data` and `vocab`.
    Raises ValueError where the run was another one so far, or the weights are of another model.
    """
    accept = functools.partial(refuse_other_run, recipe=recipe, identity=identity, shards=shards)
    manifest = checkpoint.resume(engine, recipe.run_dir, accept, lease=lease)
    if manifest is not None:
        if engine.ranks.rank == 0 and (told := changed(manifest, recipe)):
            print(f"{recipe.run_dir}: goes on from step {manifest.step} with {told}", file=sys.stderr)
        losses = manifest.extra.get(LOSSES)
        known = losses if isinstance(losses, list) else ()
        before = tuple(float(loss) for loss in known if isinstance(loss, (int, float)))
        return Start(manifest.step, before, manifest.extra.get(BEST))
    if recipe.train.init_from:
        start_from(engine, recipe, config, identity["vocab"])
    return Start()


def refuse_other_run(
    manifest: Manifest, recipe: Recipe, identity: Mapping[str, str], shards: Shards | None = None
) -> None:
    """Raises ValueError where data, vocabulary or a setting that gives them order or meaning is not the checkpoint's.
    A mixture that changes only after the checkpoint's step is no other: `shards` are asked what was drawn before it.

    Those named in `train.accept_changed` may differ. An imported model has seen no data of ours, and has no such past.
    """
    place, accepted = f"{recipe.run_dir}: step {manifest.step}", recipe.train.accept_changed
    for name, value in identity.items():
        known = manifest.identity.get(name)
        if known is None or known == value or name in accepted:
            continue
        raise ValueError(
            f"{place} was trained with {name} {known}, this run has {value}; use those files, or another run_dir, or "
            f"train.accept_changed='[\"{name}\"]' to go on all the same"
        )
    saved = _trained_with(manifest, recipe.run_dir)
    if saved is None:
        return
    found = {key: pair for key, pair in differences(saved, recipe, MEANING).items() if key not in accepted}
    later = found.keys() & _MIX if _same_until(manifest.step, saved, recipe, shards) else set()
    found = {key: pair for key, pair in found.items() if key not in later}
    if found:
        names = ", ".join(f'"{key}"' for key in [*accepted, *found])
        raise ValueError(
            f"{place} was trained with other settings: {_listed(found)}; set them back, or use another run_dir, or "
            f"train.accept_changed='[{names}]' to go on all the same"
            f"{_earliest(manifest.step, saved, recipe, shards) if found.keys() <= _MIX else ''}"
        )


def _same_until(step: int, saved: Recipe, now: Recipe, shards: Shards | None) -> bool:
    """Whether the mixtures of both recipes draw the same rows in the steps that are done."""
    rows = saved.batch.global_rows
    if shards is None or rows != now.batch.global_rows or saved.data.task != now.data.task:
        return False
    mixtures = [mixture_of(shards, each.data, global_rows=rows, seed=each.train.seed) for each in (saved, now)]
    return mixtures[0].same_until(mixtures[1], step * rows)


def _earliest(step: int, saved: Recipe, now: Recipe, shards: Shards | None) -> str:
    """From which step on the newest change would leave the past as it is; empty where no step does."""
    *before, last = [{}, *now.data.mix_changes]
    for later in range(step + 1, step + _FEW_STEPS):
        changes = (*(each for each in before if each), {**last, "step": later})
        if not last or (before[1:] and later <= before[-1]["step"]):
            break
        data = dataclasses.replace(now.data, mix_changes=changes)
        if _same_until(step, saved, dataclasses.replace(now, data=data), shards):
            return f"; a change from step {later} on would leave what is done as it is"
    return ""


def changed(manifest: Manifest, recipe: Recipe) -> str:
    """What differs that may, and acts on what is learnt; empty where nothing does."""
    saved = _trained_with(manifest, recipe.run_dir)
    return "" if saved is None else _listed(differences(saved, recipe, (*MEANING, *TOLD)))


def _trained_with(manifest: Manifest, run_dir: str) -> Recipe | None:
    """The recipe of the run that wrote it, as this version has it."""
    if manifest.recipe is None or manifest.identity.get("data") is None:
        return None
    return recipe_from_dict(manifest.recipe, f"{run_dir}: recipe of step {manifest.step}")


def _listed(found: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {_shown(saved)} (now {_shown(now)})" for key, (saved, now) in found.items())


def _shown(value: Any) -> str:
    return str(value).replace("MixConfig", "") if hasattr(value, "weights") else shown(value)

"""What is looked up and kept once, when a run begins or goes on: place, peak, `RUN_DIR/attempts/NNNN`, the writer."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ofa_ds.config import Recipe, recipe_to_dict, recipe_to_toml
from ofa_ds.data import kept_vocabulary
from ofa_ds.data.sets import sets_of
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab
from ofa_ds.engine.config import derive_config, load_deepspeed_config
from ofa_ds.engine.engine import Engine
from ofa_ds.storage.atomic import replace_file
from ofa_ds.train import report_attempt as kept
from ofa_ds.train import report_environment as environment
from ofa_ds.train.report import MetricsWriter
from ofa_ds.train.report_peak import Peak, peak_of
from ofa_ds.train.report_wandb import Wandb

VERSION = 1
"""Of environment.json and data.json."""


class Place(NamedTuple):
    """Where a run takes place; the same on all ranks."""

    mine: dict[str, Any]
    """Of this rank."""
    hosts: list[str]
    """Of each rank."""
    devices: list[str]
    """Of each rank, as `report_peak.peak_of` takes them."""
    differences: list[str]
    """What is not alike on all ranks, a line each."""


class Data(NamedTuple):
    """What a run learns from, and is judged by."""

    shards: Shards
    vocab: Vocab
    held_out: Shards | None = None


def look_around(engine: Engine) -> Place:
    """All ranks call it together."""
    mine = environment.of_this_rank(engine.device, with_code=engine.ranks.local_rank == 0)
    found = environment.of_all_ranks(mine, socket.gethostname(), engine.gather)
    for line in found["differences"]:
        _say(engine, line)
    return Place(mine, found["hosts"], found["devices"], found["differences"])


def peak_here(engine: Engine, recipe: Recipe, place: Place) -> Peak | None:
    """None, and a line why, where nobody knows it."""
    try:
        peak = peak_of(place.devices, recipe.train.calibration)
    except ValueError as error:
        _say(engine, f"no MFU: {error}")
        return None
    ranks = len(place.devices)
    _say(engine, f"MFU is the share of {peak.source}{f', on each of {ranks} ranks' if ranks > 1 else ''}")
    return peak


def open_writer(
    engine: Engine, recipe: Recipe, data: Data, *, first_step: int, place: Place, peak: Peak | None
) -> MetricsWriter:
    """Rank 0's. Keeps the vocabulary and what the run was started with; only the vocabulary's errors are raised."""
    run_dir = Path(recipe.run_dir)
    kept_vocabulary.keep(run_dir, Path(recipe.data.vocab), data.vocab.fingerprint)
    _try_to_write(run_dir / kept.RECIPE, lambda path: replace_file(path, recipe_to_toml(recipe)))
    files = {
        kept.RECIPE: recipe_to_toml(recipe),
        **_deepspeed(engine, recipe),
        kept.ENVIRONMENT: _json(_environment(engine, place, peak, first_step)),
        kept.DATA: _json(_data(recipe, data)),
    }
    config = {"recipe": recipe_to_dict(recipe), "data": _data(recipe, data), "software": place.mine}
    files = {name: environment.scrubbed(text, os.environ) for name, text in files.items()}
    _try_to_write(run_dir / kept.ATTEMPTS, lambda _: kept.write_attempt(run_dir, files))
    wandb = None
    if recipe.train.wandb:
        wandb = Wandb(recipe.train.wandb, run_dir, json.loads(environment.scrubbed(_json(config), os.environ)))
    return MetricsWriter(run_dir, num_steps=recipe.train.num_steps, first_step=first_step, wandb=wandb)


def _say(engine: Engine, text: str) -> None:
    if engine.ranks.rank == 0:
        print(text, file=sys.stderr, flush=True)


def _try_to_write(path: Path, write: Any) -> None:
    try:
        write(path)
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())
        print(f"metrics: {path}: cannot be written: {told}; training goes on", file=sys.stderr, flush=True)


def _deepspeed(engine: Engine, recipe: Recipe) -> dict[str, str]:
    given = load_deepspeed_config(recipe.deepspeed)
    resolved = derive_config(
        given, optim=recipe.optim, batch=recipe.batch, world_size=engine.ranks.world_size, device=engine.device
    )
    return {kept.DEEPSPEED: _json(given), kept.RESOLVED: _json(resolved)}


def _environment(engine: Engine, place: Place, peak: Peak | None, first_step: int) -> dict[str, Any]:
    count = {name: place.hosts.count(name) for name in dict.fromkeys(place.hosts)}
    return {
        "version": VERSION,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": first_step,
        "command": environment.command(),
        "software": place.mine,
        "checkout": environment.checkout(),
        "machine": environment.machine(),
        "ranks": {"count": len(place.hosts), "of_hosts": count, "differences": place.differences},
        "engine": engine.describe(),
        "peak": None if peak is None else {"flops": peak.flops, "source": peak.source},
        "variables": environment.variables(os.environ),
    }


def _data(recipe: Recipe, data: Data) -> dict[str, Any]:
    def shards(path: str, found: Shards) -> dict[str, Any]:
        return {"path": path, "fingerprint": found.fingerprint, "rows": found.families, "types": found.types}

    return {
        "version": VERSION,
        "shards": shards(recipe.data.shards, data.shards),
        "sets": {
            name: shards(recipe.data.sets[name].shards, each) | {"weight": recipe.data.sets[name].weight}
            for name, each in sets_of(data.shards).items()
            if name
        },
        "heldout": None if data.held_out is None else shards(recipe.data.heldout, data.held_out),
        "vocab": {"path": recipe.data.vocab, "fingerprint": data.vocab.fingerprint, "size": data.vocab.size},
    }


def _json(values: Mapping[str, Any]) -> str:
    return f"{json.dumps(values, indent=2, ensure_ascii=False, default=str)}\n"

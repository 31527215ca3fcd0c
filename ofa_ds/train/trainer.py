"""Pretraining: recipe in, checkpoints and metrics out. One visible loop; each optimizer step is `train_step`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ofa_ds import beat, checkpoint
from ofa_ds.checkpoint.run_lease import RunLease, run_lease
from ofa_ds.checkpoint.runs import newest_good
from ofa_ds.checkpoint.saver import Saver
from ofa_ds.config import Recipe, recipe_to_dict, recipe_to_toml
from ofa_ds.data import kept_vocabulary
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.host_memory import release_freed_memory
from ofa_ds.engine.process_group import gather, init_distributed, leave_distributed, together
from ofa_ds.engine.ranks import Ranks
from ofa_ds.inference.answers import sample_cards
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.model.config import ModelConfig, model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.storage.atomic import replace_file
from ofa_ds.train.bad_steps import BadSteps
from ofa_ds.train.loader import Loader
from ofa_ds.train.metrics import MetricsWriter, Window, peak_memory_MiB
from ofa_ds.train.resuming import resume
from ofa_ds.train.step import train_step
from ofa_ds.train.stop_signal import StopSignal

RELEASE_EVERY = 10
"""Steps between two returns of freed memory on a CPU."""
MAX_WHOLE_PARAMETERS = 500_000_000
"""A larger model is built in pieces under ZeRO-3: 2 GB of fp32 weights a rank, many ranks on a host."""
SEARCHED_ROWS = 200_000
"""Of each family, among which a row is looked for to show: training waits meanwhile."""

STOPPED = 130
"""Exit code after a signal: the state is saved, the run is not finished."""


def run(recipe: Recipe, pulse: beat.Pulse) -> int:
    """Train to `train.num_steps`, from the newest checkpoint of `run_dir` where there is one. Returns the exit code.

    pulse: this rank's; beats after each step, and where something begins that may take long. What one rank raises
    before the first step, all raise; LeaseError, before anything is written, where another job is at work in
    `run_dir`. Later a rank that fails just ends: its connections break, and the launcher ends the others.
    """
    ranks = init_distributed()
    recipe.batch.accumulation_steps(ranks.world_size)  # a wrong batch shape is told before anything heavy starts
    with run_lease(recipe.run_dir, ranks.rank, functools.partial(gather, ranks)) as lease:
        code = _run(recipe, ranks, lease, pulse)
    leave_distributed()
    return code


def _run(recipe: Recipe, ranks: Ranks, lease: RunLease, pulse: beat.Pulse) -> int:
    with together(ranks):
        shards, vocab = Shards(recipe.data.shards), load_vocab(recipe.data.vocab)
        config = model_config(recipe, vocab.size)
    engine = build(
        lambda: OFA(config),
        deepspeed=recipe.deepspeed,
        optim=recipe.optim,
        batch=recipe.batch,
        train=recipe.train,
        ranks=ranks,
        zero_init=_needs_pieces(recipe, config),
    )
    _say(ranks, engine.describe())
    pulse.beat("start", 0)
    identity = {"data": shards.fingerprint, "vocab": vocab.fingerprint}
    first_step = resume(engine, recipe, identity, lease)
    pulse.beat("start", first_step)
    loader = Loader(
        shards=shards,
        vocab=vocab,
        config=recipe.data,
        batch=recipe.batch,
        seed=recipe.train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        model=config,
    )
    with together(ranks):
        writer = _open_writer(recipe, first_step, vocab.fingerprint) if ranks.rank == 0 else None
    with StopSignal().listening() as stop:
        saver = Saver(engine, recipe, {"recipe": recipe_to_dict(recipe), "identity": identity}, lease=lease)
        parts = _Parts(engine, loader, saver, writer, recipe, stop, pulse)
        return _train(parts, first_step)


class _Parts(NamedTuple):
    """What the loop works with."""

    engine: Engine
    loader: Loader
    saver: Saver
    writer: MetricsWriter | None
    """Rank 0's."""
    recipe: Recipe
    stop: StopSignal
    pulse: beat.Pulse


def _say(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, file=sys.stderr, flush=True)


def _needs_pieces(recipe: Recipe, config: ModelConfig) -> bool:
    """Whether the model is partitioned while it is built, so that no process ever holds it whole."""
    if load_deepspeed_config(recipe.deepspeed).get("zero_optimization", {}).get("stage") != 3:
        return False
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in OFA(config).parameters()) > MAX_WHOLE_PARAMETERS


def _train(parts: _Parts, first_step: int) -> int:
    engine, loader, saver, writer, recipe, stop, pulse = parts
    train, smoothing = recipe.train, recipe.optim.label_smoothing
    window, source = Window(engine.device), loader.steps(first_step)
    bad = BadSteps(engine, loader.micro_batches, limit=train.max_bad_steps, run_dir=Path(recipe.run_dir))
    step, stopping = first_step, False
    try:
        while step < train.num_steps and not stopping:
            micro_batches = next(source)
            votes = (stop.asked, saver.is_writing, saver.lease.is_lost)
            voted, losses = train_step(engine, micro_batches, window, label_smoothing=smoothing, votes=votes)
            stopping, writing, is_lost = voted
            step += 1
            pulse.beat("step", step)
            if is_lost:
                saver.lease.check_together(engine.gather)  # before anything more is written there
            bad.judge(step, losses)
            if bad.too_many:
                saver.commit()
                raise bad.error(step, newest_good(recipe.run_dir))
            last = stopping or step == train.num_steps
            if step % train.log_every == 0 or step == train.num_steps:
                _log(engine, window, writer, step, loader.wait_seconds)
            if engine.device.type == "cpu" and step % RELEASE_EVERY == 0:
                release_freed_memory()
            if train.sample_every and step % train.sample_every == 0:
                pulse.beat("sample", step)  # and no `step` before the next: the others wait in it for rank 0
                _show_samples(engine, recipe, loader, writer, step)
            if not writing:
                saver.commit()
            if last or (step % train.save_every == 0 and not bad.in_a_row):
                pulse.beat("save", step)
                saver.save(step, wait=last, counts=not bad.in_a_row)
                pulse.beat("step", step)
        pulse.beat("end", step)
    except Exception as error:  # what follows may take its time, or hang
        beat.write_error(engine.ranks.rank, error)
        raise
    finally:
        source.close()  # ends the workers
        saver.close()
        if writer is not None:
            writer.close()
    return _ended(engine.ranks, recipe, step)


def _ended(ranks: Ranks, recipe: Recipe, step: int) -> int:
    """Says how far the run came; returns its exit code."""
    if step < recipe.train.num_steps:
        _say(ranks, f"stopped at step {step}; the same command goes on from there")
        return STOPPED
    if ranks.rank == 0:
        print(f"done: {step} steps; checkpoint {checkpoint.latest(recipe.run_dir)}")
    return 0


def _open_writer(recipe: Recipe, first_step: int, vocab: str) -> MetricsWriter:
    run_dir = Path(recipe.run_dir)
    kept_vocabulary.keep(run_dir, Path(recipe.data.vocab), vocab)
    try:
        replace_file(run_dir / "recipe.toml", recipe_to_toml(recipe))
    except OSError as error:
        print(f"metrics: {run_dir / 'recipe.toml'}: cannot be written: {error}; training goes on", file=sys.stderr)
    return MetricsWriter(run_dir, num_steps=recipe.train.num_steps, first_step=first_step)


def _log(engine: Engine, window: Window, writer: MetricsWriter | None, step: int, waited_s: float) -> None:
    """waited_s: for data, from the start on."""
    values = {"lr": engine.lr, "grad_norm": engine.grad_norm, "peak_memory_MiB": peak_memory_MiB(engine.device)}
    values = {**window.close(engine.all_reduce, waited_s=waited_s), **values}
    if writer is not None:
        writer.write(step, values)


def _show_samples(engine: Engine, recipe: Recipe, loader: Loader, writer: MetricsWriter | None, step: int) -> None:
    """A picture per task of what the model generates, by a whole copy of it on rank 0."""
    weights = engine.full_weights()
    if writer is None or weights is None:
        return
    config = dataclasses.replace(model_config(recipe, loader.vocab.size), activation_checkpointing=False)
    model = OFA(config)
    model.load_state_dict(weights)
    loaded = LoadedModel(model=model.to(engine.device).eval(), vocab=loader.vocab, recipe=recipe, step=step)
    try:
        for task, card in sample_cards(loaded, loader.shards, max_rows=SEARCHED_ROWS).items():
            writer.picture(step, f"sample/{task}", np.asarray(card.convert("RGB")))
    except (ValueError, OSError) as error:  # a row that cannot be shown is no reason to stop
        print(f"no pictures of step {step}: {error}", file=sys.stderr)

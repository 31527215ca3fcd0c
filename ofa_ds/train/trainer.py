"""Pretraining: recipe in, checkpoints and metrics out. One visible loop; each optimizer step is `train_step`."""

from __future__ import annotations

import dataclasses
import functools
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ofa_ds import beat, checkpoint
from ofa_ds.batch import Batch
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
from ofa_ds.terms import STOPPED
from ofa_ds.train.bad_steps import BadSteps
from ofa_ds.train.checks import Checks
from ofa_ds.train.loader import Loader
from ofa_ds.train.metrics import MetricsWriter, Window, peak_memory_MiB
from ofa_ds.train.resuming import LOSSES, resume
from ofa_ds.train.spikes import LossWindow
from ofa_ds.train.step import train_step
from ofa_ds.train.stop_signal import StopSignal
from ofa_ds.train.stragglers import Stragglers
from ofa_ds.train.switches import Switches

RELEASE_EVERY = 10
"""Steps between two returns of freed memory on a CPU."""
MAX_WHOLE_PARAMETERS = 500_000_000
"""A larger model is built in pieces under ZeRO-3: 2 GB of fp32 weights a rank, many ranks on a host."""
SEARCHED_ROWS = 200_000
"""Of each family, among which a row is looked for to show: training waits meanwhile."""



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
    begun = resume(engine, recipe, identity, lease)
    pulse.beat("start", begun.step)
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
        writer = _open_writer(recipe, begun.step, vocab.fingerprint) if ranks.rank == 0 else None
    switches = Switches(recipe.run_dir, ranks.rank, pulse.since_s)
    with StopSignal().listening() as stop:
        saver = Saver(engine, recipe, {"recipe": recipe_to_dict(recipe), "identity": identity}, lease=lease)
        bad = BadSteps(engine, loader.micro_batches, limit=recipe.train.max_bad_steps, run_dir=Path(recipe.run_dir))
        sigma = recipe.train.max_spike_sigma
        before = LossWindow(sigma, begun.losses) if sigma else None
        agree = recipe.model.batch_norm != "batch"
        checks = Checks(engine, every=recipe.train.check_every_steps, buffers_agree=agree)
        window = Window(engine.device)
        slow = Stragglers(engine.gather(socket.gethostname()))
        parts = _Parts(recipe, engine, loader, window, before, bad, checks, slow, saver, writer, stop, switches, pulse)
        return _train(parts, begun.step)


class _Parts(NamedTuple):
    """What the loop works with."""

    recipe: Recipe
    engine: Engine
    loader: Loader
    window: Window
    before: LossWindow | None
    """The last losses, where spikes are skipped."""
    bad: BadSteps
    checks: Checks
    slow: Stragglers
    saver: Saver
    writer: MetricsWriter | None
    """Rank 0's."""
    stop: StopSignal
    switches: Switches
    pulse: beat.Pulse


class _Voted(NamedTuple):
    """What any rank wants, or says, known to all."""

    stop: bool = False
    save: bool = False
    writing: bool = True
    """The files of the save before are not all written; unknown after a step that was passed over."""
    is_lost: bool = False
    """The lease of the run's directory."""


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
    recipe, engine, saver = parts.recipe, parts.engine, parts.saver
    passed_over = frozenset(recipe.train.skip_steps)
    source = parts.loader.steps(first_step, without={number - 1 for number in passed_over})
    step, voted = first_step, _Voted()
    try:
        while step < recipe.train.num_steps and not voted.stop:
            step += 1
            if step in passed_over:
                voted = _pass_over(parts, step)
            else:
                voted = _take(parts, step, next(source))
            parts.pulse.beat("step", step)
            _report(parts, step)
            _save(parts, step, voted)
        parts.pulse.beat("end", step)
        parts.switches.ended(step)
    except Exception as error:  # what follows may take its time, or hang
        beat.write_error(engine.ranks.rank, error)
        raise
    finally:
        source.close()  # ends the workers
        saver.close()
        if parts.writer is not None:
            parts.writer.close()
    return _ended(engine.ranks, recipe, step)


def _take(parts: _Parts, step: int, micro_batches: list[Batch]) -> _Voted:
    """Optimizer step number `step`, from 1 on."""
    engine, saver, bad, switches = parts.engine, parts.saver, parts.bad, parts.switches
    mine = _Voted(parts.stop.asked or switches.stop, switches.save, saver.is_writing, saver.lease.is_lost)
    smoothing = parts.recipe.optim.label_smoothing
    if parts.checks.is_due(step):
        parts.checks.check(step, micro_batches[0], label_smoothing=smoothing)
    result = train_step(engine, micro_batches, parts.window, label_smoothing=smoothing, votes=mine, before=parts.before)
    voted = _Voted(*result.voted)
    if voted.is_lost:
        saver.lease.check_together(engine.gather)  # before anything more is written there
    bad.judge(step, result.losses, result.spike)
    if engine.ranks.rank == 0:
        for line in parts.slow.add(step, result.paces):
            print(line, file=sys.stderr, flush=True)
    if bad.too_many:
        saver.commit()
        raise bad.error(step, newest_good(parts.recipe.run_dir))
    return voted


def _pass_over(parts: _Parts, step: int) -> _Voted:
    parts.engine.pass_over()
    parts.window.pass_over()
    told = "is passed over, as train.skip_steps says: its rows are not read, the weights stay as they are"
    _say(parts.engine.ranks, f"step {step} {told}")
    return _Voted()


def _report(parts: _Parts, step: int) -> None:
    """After step `step`: numbers, pictures."""
    train, engine, loader, writer = parts.recipe.train, parts.engine, parts.loader, parts.writer
    if step % train.log_every == 0 or step == train.num_steps:
        _log(parts, step)
    if engine.device.type == "cpu" and step % RELEASE_EVERY == 0:
        release_freed_memory()
    if train.sample_every and step % train.sample_every == 0:
        parts.pulse.beat("sample", step)  # and no `step` before the next: the others wait in it for rank 0
        _show_samples(engine, parts.recipe, loader, writer, step)


def _save(parts: _Parts, step: int, voted: _Voted) -> None:
    """After step `step`: make the save before a checkpoint, and begin one where it is time or somebody asked."""
    train, saver, bad = parts.recipe.train, parts.saver, parts.bad
    if not voted.writing:
        saver.commit()
    last = voted.stop or step == train.num_steps
    if last or voted.save or (step % train.save_every == 0 and not bad.in_a_row):
        parts.pulse.beat("save", step)
        if voted.save:
            parts.switches.serve_save(step)
        facts = {} if parts.before is None else {LOSSES: parts.before.losses}
        saver.save(step, facts, wait=last, counts=not bad.in_a_row)
        parts.pulse.beat("step", step)
    parts.switches.settle(saver.saved)


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


def _log(parts: _Parts, step: int) -> None:
    engine, window, writer, waited_s = parts.engine, parts.window, parts.writer, parts.loader.wait_seconds
    values = {"lr": engine.lr, "grad_norm": engine.grad_norm, "peak_memory_MiB": peak_memory_MiB(engine.device)}
    values = {**window.close(engine.all_reduce, waited_s=waited_s), **values}
    if parts.slow.slowest is not None:
        rank, excess = parts.slow.slowest
        values |= {"slowest_rank": float(rank), "slowest_rank_excess": excess}
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

"""A run, of pretraining or fine-tuning: recipe in, checkpoints and metrics out.

One visible loop; each optimizer step is `train_step`.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ofa_ds import beat, checkpoint
from ofa_ds.batch import Batch
from ofa_ds.checkpoint.format import BEST
from ofa_ds.checkpoint.run_lease import RunLease, run_lease
from ofa_ds.checkpoint.runs import newest_good
from ofa_ds.checkpoint.saver import Saver
from ofa_ds.config import Recipe, recipe_to_dict
from ofa_ds.data.sets import open_data, sets_of
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab, load_vocab
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.host_memory import release_freed_memory
from ofa_ds.engine.process_group import gather, init_distributed, leave_distributed, together
from ofa_ds.engine.ranks import Ranks
from ofa_ds.model.config import ModelConfig, model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.model.running import implementations, repeat_bits
from ofa_ds.tasks.task import asked_for
from ofa_ds.terms import STOPPED
from ofa_ds.train.bad_steps import BadSteps
from ofa_ds.train.checks import Checks
from ofa_ds.train.corrupt_rows import CorruptRows
from ofa_ds.train.epochs import Epochs
from ofa_ds.train.judging import Best, HeldOut
from ofa_ds.train.loader import Loader
from ofa_ds.train.metrics import Window, memory_usage
from ofa_ds.train.objective import Objective, objective_of
from ofa_ds.train.out_of_memory import OutOfMemory
from ofa_ds.train.profiling import Profiling
from ofa_ds.train.report import MetricsWriter
from ofa_ds.train.report_histograms import of_state as histograms_of_state
from ofa_ds.train.report_samples import Samples
from ofa_ds.train.report_start import Data, look_around, open_writer, peak_here
from ofa_ds.train.report_work import work_counter
from ofa_ds.train.resuming import LOSSES, resume
from ofa_ds.train.scst import caption_critical
from ofa_ds.train.settling import check_ids, held_out_shards, settled
from ofa_ds.train.spikes import LossWindow
from ofa_ds.train.step import train_step
from ofa_ds.train.stop_signal import StopSignal
from ofa_ds.train.stragglers import Stragglers
from ofa_ds.train.switches import Switches

RELEASE_EVERY = 10
"""Steps between two returns of freed memory on a CPU."""
MAX_WHOLE_PARAMETERS = 500_000_000
"""A larger model is built in pieces under ZeRO-3: 2 GB of fp32 weights a rank, many ranks on a host."""


def run(recipe: Recipe, pulse: beat.Pulse) -> int:
    """Train to `train.num_steps`, from the newest checkpoint of `run_dir` where there is one. Returns the exit code.

    pulse: this rank's; beats after each step, and where something begins that may take long. What one rank raises
    before the first step, all raise; LeaseError, before anything is written, where another job is at work in
    `run_dir`. Later a rank that fails just ends: its connections break, and the launcher ends the others.
    """
    ranks = init_distributed()
    recipe.batch.accumulation_steps(ranks.world_size)  # a wrong batch shape is told before anything heavy starts
    memory = OutOfMemory(recipe, ranks)
    with (
        run_lease(recipe.run_dir, ranks.rank, functools.partial(gather, ranks)) as lease,
        memory.explained("outside of the steps"),
    ):
        code = _run(recipe, ranks, lease, pulse, memory)
    leave_distributed()
    return code


def _objective(recipe: Recipe, shards: Shards, vocab: Vocab, device: torch.device) -> Objective:
    if recipe.criterion.kind == "scst":
        return caption_critical(recipe, shards, vocab)
    if recipe.criterion.kind == "clip_scst":
        from ofa_ds.train.clip_scst import painting_critical  # no other run needs VQGAN and CLIP

        return painting_critical(recipe, vocab, device)
    return objective_of(recipe)


def _run(recipe: Recipe, ranks: Ranks, lease: RunLease, pulse: beat.Pulse, memory: OutOfMemory) -> int:
    with together(ranks):
        shards = open_data(recipe.data)
        vocab = load_vocab(recipe.data.vocab)
        recipe, config = settled(recipe, shards), model_config(recipe, vocab.size)
        check_ids(recipe, vocab)
        memory.vocab_size = vocab.size
        objective = _objective(recipe, shards, vocab, ranks.device)
        held_out = held_out_shards(recipe) if recipe.train.evaluate_every and recipe.data.heldout else None
    repeat_bits(config)
    engine = build(
        lambda: _model(recipe, config), deepspeed=recipe.deepspeed, optim=recipe.optim, batch=recipe.batch,
        train=recipe.train, ranks=ranks, zero_init=_needs_pieces(recipe, config),
    )  # fmt: skip
    memory.engine = engine
    _say(ranks, engine.describe())
    _say(ranks, implementations(engine.module, config, training=True))
    if recipe.train.evaluate_every and held_out is None:
        _say(ranks, "no rows are judged meanwhile, and no checkpoint is the best: data.heldout=DIR names some")
    pulse.beat("start", 0)
    identity = {"data": shards.fingerprint, "vocab": vocab.fingerprint}
    begun = resume(engine, recipe, config, identity, lease, shards)
    pulse.beat("start", begun.step)
    loader = Loader(
        shards=shards, vocab=vocab, config=recipe.data, batch=recipe.batch, seed=recipe.train.seed, rank=ranks.rank,
        world_size=ranks.world_size, model=config,
        references=recipe.criterion.kind == "scst",
    )  # fmt: skip
    place = look_around(engine)
    peak, data = peak_here(engine, recipe, place), Data(shards, vocab, held_out)
    with together(ranks):
        judge = HeldOut(engine, recipe, config, vocab, held_out=held_out, trained=shards) if held_out else None
        writer = None
        if ranks.rank == 0:
            writer = open_writer(engine, recipe, data, first_step=begun.step, place=place, peak=peak)
    switches = Switches(recipe.run_dir, ranks.rank, pulse.since_s)
    with StopSignal().listening() as stop:
        saver = Saver(engine, recipe, {"recipe": recipe_to_dict(recipe), "identity": identity}, lease=lease)
        bad = BadSteps(engine, loader.micro_batches, limit=recipe.train.max_bad_steps, run_dir=Path(recipe.run_dir))
        corrupt = CorruptRows(engine, loader, Path(recipe.run_dir), max_share=recipe.data.max_corrupt)
        epochs = Epochs(loader.micro_batches.mixture, list(sets_of(shards)), recipe.batch.global_rows)
        sigma = recipe.train.max_spike_sigma
        before = LossWindow(sigma, begun.losses) if sigma else None
        agree = config.batch_norm != "batch"
        checks = Checks(engine, objective, every=recipe.train.check_every_steps, buffers_agree=agree)
        window = Window(
            engine.device, asked_for(recipe.data), objective.logged, rank=ranks.rank, world_size=ranks.world_size,
            flops=work_counter(recipe, config, objective.copies), peak_flops=peak.flops if peak else 0.0,
        )  # fmt: skip
        slow = Stragglers(place.hosts)
        profiling = Profiling(recipe.train, ranks, recipe.run_dir, pulse, first_step=begun.step)
        parts = _Parts(
            recipe, engine, loader, objective, judge, Best(begun.best), window, before, bad, checks, slow, saver,
            writer, stop, switches, pulse, profiling, memory, corrupt, epochs, Samples(engine, recipe, loader),
        )  # fmt: skip
        return _train(parts, begun.step)


class _Parts(NamedTuple):
    """What the loop works with."""

    recipe: Recipe
    engine: Engine
    loader: Loader
    objective: Objective
    judge: HeldOut | None
    """Where held-out rows are judged meanwhile."""
    best: Best
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
    profiling: Profiling
    memory: OutOfMemory
    corrupt: CorruptRows
    epochs: Epochs
    samples: Samples


class _Voted(NamedTuple):
    """What any rank wants, or says, known to all."""

    stop: bool = False
    save: bool = False
    writing: bool = True
    """The files of the save before are not all written; unknown after a step that was passed over."""
    is_lost: bool = False
    """The lease of the run's directory."""
    corrupt: bool = False
    """Rows of this step were corrupt, and replaced."""


def _say(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, file=sys.stderr, flush=True)


def _model(recipe: Recipe, config: ModelConfig) -> OFA:
    model = OFA(config)
    if "token_embedding" in recipe.optim.freeze:
        model.encoder.embed_tokens.weight.requires_grad_(False)
    return model


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
            parts.profiling.begin(step)
            if step in passed_over:
                voted = _pass_over(parts, step)
            else:
                voted = _take(parts, step, next(source))
            parts.window.leave_out(parts.profiling.end(step))
            parts.pulse.beat("step", step)
            _report(parts, step)
            _save(parts, step, voted, is_best=_judge(parts, step))
        parts.profiling.close()
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
    mine = _Voted(
        parts.stop.asked or switches.stop, switches.save, saver.is_writing, saver.lease.is_lost,
        parts.corrupt.is_unsettled,
    )  # fmt: skip
    if parts.checks.is_due(step):
        parts.checks.check(step, micro_batches[0])
    with parts.memory.explained(f"in step {step}", micro_batches, step):
        result = train_step(engine, micro_batches, parts.window, parts.objective, votes=mine, before=parts.before)
    voted = _Voted(*result.voted)
    if voted.is_lost:
        saver.lease.check_together(engine.gather)  # before anything more is written there
    if voted.corrupt:
        parts.corrupt.settle(step)
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
    train, engine = parts.recipe.train, parts.engine
    if step % train.log_every == 0 or step == train.num_steps:
        _log(parts, step)
    if engine.device.type == "cpu" and step % RELEASE_EVERY == 0:
        release_freed_memory()
    if train.sample_every and step % train.sample_every == 0:
        parts.pulse.beat("sample", step)  # and no `step` before the next: the others wait in it for rank 0
        parts.samples.show(parts.writer, step)
    if train.histograms_every and step % train.histograms_every == 0:
        _show_histograms(parts, step)


def _judge(parts: _Parts, step: int) -> bool:
    """Judge held-out rows where it is time to; whether the model is the best so far."""
    train, judge = parts.recipe.train, parts.judge
    if judge is None or (step % train.evaluate_every and step != train.num_steps):
        return False
    parts.pulse.beat("sample", step)
    began = time.perf_counter()
    scores = judge.judge(step)
    is_best = parts.best.is_better(step, judge.metric, scores.get(judge.metric))
    if parts.writer is not None:
        parts.writer.scores(step, {f"heldout/{name}": value for name, value in scores.items()})
    told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    note = "; the best so far" if is_best else ""
    seconds = time.perf_counter() - began
    parts.window.leave_out(seconds)
    _say(parts.engine.ranks, f"step {step} held-out rows: {told}{note} ({seconds:.0f} s)")
    return is_best


def _save(parts: _Parts, step: int, voted: _Voted, *, is_best: bool) -> None:
    """After step `step`: make the save before a checkpoint, and begin one where it is time or somebody asked."""
    with parts.window.saving():
        _save_now(parts, step, voted, is_best=is_best)


def _save_now(parts: _Parts, step: int, voted: _Voted, *, is_best: bool) -> None:
    train, saver, bad = parts.recipe.train, parts.saver, parts.bad
    if not voted.writing:
        saver.commit()
    last = voted.stop or step == train.num_steps
    if last or voted.save or is_best or (step % train.save_every == 0 and not bad.in_a_row):
        parts.pulse.beat("save", step)
        if voted.save:
            parts.switches.serve_save(step)
        saver.commit()  # the one before: what follows says which step was the best, and must not name one that failed
        parts.best.settle(saver.saved)
        facts: dict[str, Any] = {} if parts.before is None else {LOSSES: parts.before.losses}
        if parts.best.record is not None:
            facts[BEST] = parts.best.record
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


def _log(parts: _Parts, step: int) -> None:
    engine, window, writer, waited_s = parts.engine, parts.window, parts.writer, parts.loader.wait_seconds
    values = {"lr": engine.lr, "grad_norm": engine.grad_norm}
    usage = memory_usage(engine.device)
    values = {**window.close(engine.all_reduce, waited_s=waited_s, usage=usage), **values}
    if parts.slow.slowest is not None:
        rank, excess = parts.slow.slowest
        values |= {"slowest_rank": float(rank), "slowest_rank_excess": excess}
    values["corrupt_rows"] = float(parts.corrupt.taken())
    if writer is not None:
        with window.reporting():
            values |= parts.epochs.at(step)
            for line in parts.epochs.begun(max(step - parts.recipe.train.log_every, 0), step):
                print(line, file=sys.stderr, flush=True)
            writer.write(step, values)


def _show_histograms(parts: _Parts, step: int) -> None:
    began = time.perf_counter()
    found = histograms_of_state(parts.engine)
    if parts.writer is not None:
        parts.writer.histograms(step, found)
    parts.window.leave_out(time.perf_counter() - began)

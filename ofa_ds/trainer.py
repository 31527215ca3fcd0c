"""Pretraining: recipe in, checkpoints and metrics out. One visible loop; each optimizer step is `train_step`.

The loss of a step is, per group g (vision-language; everything else), sum(confidence * token loss) / global token count
of g, summed over groups: the original's L1/n1 + L2/n2 (spec 03 section 2) made independent of ranks and accumulation.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from ofa_ds import checkpoint
from ofa_ds.config import TASKS, Recipe, recipe_to_dict, recipe_to_toml
from ofa_ds.data.batch import Batch
from ofa_ds.data.loader import Loader
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab
from ofa_ds.engine import Engine, Ranks, build, init_distributed, load_deepspeed_config
from ofa_ds.inference import Subject
from ofa_ds.loss import group_counts, group_sums, task_sums
from ofa_ds.metrics import MetricsWriter, Window, peak_memory_MiB
from ofa_ds.model.config import ModelConfig, model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.processes import release_freed_memory
from ofa_ds.samples import sample_sheet

RELEASE_EVERY = 10
"""Steps between two returns of freed memory on a CPU."""
MAX_WHOLE_PARAMETERS = 500_000_000
"""A larger model is built in pieces under ZeRO-3: 2 GB of fp32 weights a rank, many ranks on a host."""

DUPLICATE_S = 5.0

STOPPED = 130
"""Exit code after a signal: the state is saved, the run is not finished."""


class StopSignal:
    """SIGINT or SIGTERM asks for a checkpoint after the running step; a later one ends the process at once.

    A launcher passes a signal on that the ranks have had already: what comes within DUPLICATE_S is the same request.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at_s = 0.0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at_s = True, now_s
        elif now_s - self._asked_at_s > DUPLICATE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_step(
    engine: Engine, micro_batches: list[Batch], window: Window, *, label_smoothing: float, stop: bool
) -> bool:
    """One optimizer step, equal to one process on all ranks' micro-batches. Returns whether any rank is to stop."""
    device = engine.device
    shared = torch.stack([group_counts(batch) for batch in micro_batches]).sum(0).double()
    shared = torch.cat([shared, torch.tensor([float(stop)], dtype=torch.float64)]).to(device)
    engine.all_reduce(shared)
    global_counts = shared[:-1].clamp(min=1)  # a group without tokens has sum 0: it adds nothing
    for batch in micro_batches:
        batch = batch.to(device)
        loss_M, nll_M, correct_M = engine(batch, label_smoothing=label_smoothing)
        loss = (group_sums(loss_M, batch) / global_counts.to(loss_M.dtype)).sum()
        engine.backward(loss)
        engine.step()  # updates the weights at the last micro-batch of the step
        with torch.no_grad():
            sums = task_sums(loss_M, nll_M, correct_M, batch)
            window.add_micro_batch(sums, loss.detach(), num_tokens=batch.num_tokens, num_examples=batch.num_examples)
    window.num_steps += 1
    return bool(shared[-1].item() > 0)


def run(recipe: Recipe) -> int:
    """Train to `train.num_steps`, from the newest checkpoint of `run_dir` where there is one. Returns the exit code."""
    ranks = init_distributed()
    recipe.batch.accumulation_steps(ranks.world_size)  # a wrong batch shape is told before anything heavy starts
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
    identity = {"data": shards.fingerprint, "vocab": vocab.fingerprint}
    first_step = _resume(engine, recipe, identity)
    loader = Loader(
        shards=shards,
        vocab=vocab,
        config=recipe.data,
        batch=recipe.batch,
        seed=recipe.train.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        patch_size=config.patch_size,
        image_bucket_size=config.image_bucket_size,
    )
    with StopSignal().listening() as stop:
        return _train(engine, loader, recipe, ranks, first_step=first_step, identity=identity, stop=stop)


def _needs_pieces(recipe: Recipe, config: ModelConfig) -> bool:
    """Whether the model is partitioned while it is built, so that no process ever holds it whole."""
    if load_deepspeed_config(recipe.deepspeed).get("zero_optimization", {}).get("stage") != 3:
        return False
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in OFA(config).parameters()) > MAX_WHOLE_PARAMETERS


def _train(
    engine: Engine,
    loader: Loader,
    recipe: Recipe,
    ranks: Ranks,
    *,
    first_step: int,
    identity: dict[str, str],
    stop: StopSignal,
) -> int:
    train, run_dir = recipe.train, Path(recipe.run_dir)
    writer = None
    if ranks.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "recipe.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
        writer = MetricsWriter(run_dir, num_steps=train.num_steps, first_step=first_step)
    window = Window(engine.device)
    step, waited_s = first_step, 0.0
    source = loader.steps(first_step)
    try:
        while step < train.num_steps:
            micro_batches = next(source)
            stopping = train_step(
                engine, micro_batches, window, label_smoothing=recipe.optim.label_smoothing, stop=stop.asked
            )
            step += 1
            window.data_wait_s += loader.wait_seconds - waited_s
            waited_s = loader.wait_seconds
            if step % train.log_every == 0 or step == train.num_steps:
                _log(engine, window, writer, step)
            if engine.device.type == "cpu" and step % RELEASE_EVERY == 0:
                release_freed_memory()
            if train.sample_every and step % train.sample_every == 0:
                _show_samples(engine, recipe, loader, writer, step)
            if step % train.save_every == 0 or step == train.num_steps or stopping:
                _save(engine, recipe, step, identity)
            if stopping and step < train.num_steps:
                if ranks.rank == 0:
                    print(f"stopped at step {step}; the same command goes on from there", file=sys.stderr)
                return STOPPED
    finally:
        source.close()  # ends the workers
        if writer is not None:
            writer.close()
    if ranks.rank == 0:
        print(f"done: {step} steps; checkpoint {checkpoint.latest(run_dir)}")
    return 0


def _log(engine: Engine, window: Window, writer: MetricsWriter | None, step: int) -> None:
    values = {"lr": engine.lr, "grad_norm": engine.grad_norm, "peak_memory_MiB": peak_memory_MiB(engine.device)}
    values = {**window.close(engine.all_reduce), **values}
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
    subject = Subject(model=model.to(engine.device).eval(), vocab=loader.vocab, recipe=recipe, step=step)
    for task in TASKS:
        try:
            sheet = sample_sheet(subject, loader.shards, tasks=[task])
        except ValueError:  # the shards have no row of this task
            continue
        writer.picture(step, f"sample/{task}", np.asarray(sheet.convert("RGB")))


def _save(engine: Engine, recipe: Recipe, step: int, identity: dict[str, str]) -> None:
    checkpoint.save(
        engine,
        Path(recipe.run_dir),
        step,
        extra={"recipe": recipe_to_dict(recipe), "identity": identity},
        keep=recipe.train.keep,
    )


def _resume(engine: Engine, recipe: Recipe, identity: dict[str, str]) -> int:
    """Load the newest checkpoint of the run, if any; returns the step to go on from."""
    manifest = checkpoint.resume(engine, recipe.run_dir)
    if manifest is None:
        return 0
    saved = manifest["extra"]["identity"]
    for name, value in identity.items():
        if saved[name] != value:
            raise ValueError(
                f"{recipe.run_dir}: step {manifest['step']} was trained with {name} {saved[name]}, this run has {value}"
                f"; use those files, or another run_dir"
            )
    return int(manifest["step"])

"""Pretraining: recipe in, checkpoints and metrics out. One visible loop; each optimizer step is `train_step`.

The loss of a step is, per group g (vision-language; everything else), sum(confidence * token loss) / global token count
of g, summed over groups: the original's L1/n1 + L2/n2 made independent of ranks and accumulation (docs/ofa.md,
Training: loss).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ofa_ds import checkpoint
from ofa_ds.batch import Batch
from ofa_ds.checkpoint.manifest import Manifest
from ofa_ds.checkpoint.saver import Saver
from ofa_ds.config import Recipe, recipe_to_dict, recipe_to_toml
from ofa_ds.data import kept_vocabulary
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build, init_distributed, leave_distributed
from ofa_ds.engine.host_memory import release_freed_memory
from ofa_ds.engine.ranks import Ranks
from ofa_ds.inference.answers import sample_cards
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.model.config import ModelConfig, model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.train.loader import Loader
from ofa_ds.train.loss import group_counts, group_sums, task_sums
from ofa_ds.train.metrics import MetricsWriter, Window, peak_memory_MiB
from ofa_ds.train.stop_signal import StopSignal

RELEASE_EVERY = 10
"""Steps between two returns of freed memory on a CPU."""
MAX_WHOLE_PARAMETERS = 500_000_000
"""A larger model is built in pieces under ZeRO-3: 2 GB of fp32 weights a rank, many ranks on a host."""
SEARCHED_ROWS = 200_000
"""Of each family, among which a row is looked for to show: training waits meanwhile."""

STOPPED = 130
"""Exit code after a signal: the state is saved, the run is not finished."""


def train_step(
    engine: Engine, micro_batches: list[Batch], window: Window, *, label_smoothing: float, votes: Sequence[bool] = ()
) -> list[bool]:
    """One optimizer step, equal to one process on all ranks' micro-batches.

    votes: what this rank wants all to know, in the same order on each. Returns whether any rank voted so, for each.
    """
    device = engine.device
    shared = torch.stack([group_counts(batch) for batch in micro_batches]).sum(0).double()
    num_groups = len(shared)
    shared = torch.cat([shared, torch.tensor([float(vote) for vote in votes], dtype=torch.float64)]).to(device)
    engine.all_reduce(shared)
    global_counts = shared[:num_groups].clamp(min=1)  # a group without tokens has sum 0: it adds nothing
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
    return [count > 0 for count in shared[num_groups:].tolist()]


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
        model=config,
    )
    with StopSignal().listening() as stop:
        code = _train(engine, loader, recipe, ranks, first_step=first_step, identity=identity, stop=stop)
    leave_distributed()
    return code


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
    train = recipe.train
    writer = _open_writer(recipe, first_step, identity["vocab"]) if ranks.rank == 0 else None
    window = Window(engine.device)
    saver = Saver(engine, recipe, extra={"recipe": recipe_to_dict(recipe), "identity": identity})
    step, waited_s = first_step, 0.0
    source = loader.steps(first_step)
    try:
        while step < train.num_steps:
            micro_batches = next(source)
            stopping, writing = train_step(
                engine, micro_batches, window, label_smoothing=recipe.optim.label_smoothing,
                votes=(stop.asked, saver.is_writing),
            )  # fmt: skip
            step += 1
            window.data_wait_s += loader.wait_seconds - waited_s
            waited_s = loader.wait_seconds
            if step % train.log_every == 0 or step == train.num_steps:
                _log(engine, window, writer, step)
            if engine.device.type == "cpu" and step % RELEASE_EVERY == 0:
                release_freed_memory()
            if train.sample_every and step % train.sample_every == 0:
                _show_samples(engine, recipe, loader, writer, step)
            if not writing:
                saver.commit()
            if step % train.save_every == 0 or step == train.num_steps or stopping:
                saver.save(step, wait=step == train.num_steps or stopping)
            if stopping and step < train.num_steps:
                if ranks.rank == 0:
                    print(f"stopped at step {step}; the same command goes on from there", file=sys.stderr)
                return STOPPED
    finally:
        source.close()  # ends the workers
        saver.close()
        if writer is not None:
            writer.close()
    if ranks.rank == 0:
        print(f"done: {step} steps; checkpoint {checkpoint.latest(recipe.run_dir)}")
    return 0


def _open_writer(recipe: Recipe, first_step: int, vocab: str) -> MetricsWriter:
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    kept_vocabulary.keep(run_dir, Path(recipe.data.vocab), vocab)
    (run_dir / "recipe.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    return MetricsWriter(run_dir, num_steps=recipe.train.num_steps, first_step=first_step)


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
    loaded = LoadedModel(model=model.to(engine.device).eval(), vocab=loader.vocab, recipe=recipe, step=step)
    try:
        for task, card in sample_cards(loaded, loader.shards, max_rows=SEARCHED_ROWS).items():
            writer.picture(step, f"sample/{task}", np.asarray(card.convert("RGB")))
    except (ValueError, OSError) as error:  # a row that cannot be shown is no reason to stop
        print(f"no pictures of step {step}: {error}", file=sys.stderr)


def _resume(engine: Engine, recipe: Recipe, identity: dict[str, str]) -> int:
    """Load the newest checkpoint of the run, else the weights it is to start from; returns the step to go on from."""

    def accept(manifest: Manifest) -> None:
        saved = manifest.identity
        for name, value in identity.items():
            known = saved.get(name)  # an imported model has seen no data of ours
            if known is None or known == value or name in recipe.train.accept_changed:
                continue
            raise ValueError(
                f"{recipe.run_dir}: step {manifest.step} was trained with {name} {known}, this run has {value}; use "
                f"those files, or another run_dir, or train.accept_changed='[\"{name}\"]' to go on all the same"
            )

    manifest = checkpoint.resume(engine, recipe.run_dir, accept)
    if manifest is not None:
        return manifest.step
    if recipe.train.init_from:
        checkpoint.load_weights(engine, recipe.train.init_from)
    return 0

"""What each rank of test_finetune_engine.py runs: fine-tuning's steps, and the weights that a run starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batches import random_batch
from engine_cases import VOCAB
from engine_worker import dispose, ds_config, run_jobs
from finetune_cases import CRITERIA, FORMATS, KINDS, MICRO_ROWS, STAGES, STEPS, WEIGHTS
from torch import Tensor, nn

from ofa_ds import checkpoint
from ofa_ds.batch import Batch
from ofa_ds.config import BatchConfig, OptimConfig, Recipe, TrainConfig, load_recipe, recipe_to_dict
from ofa_ds.convert.commands import ExportPlan, export_checkpoint
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.schedule import polynomial_lr
from ofa_ds.model.config import ModelConfig, model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.terms import PAD_ID
from ofa_ds.train.criteria import Criterion
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import TaskLoss
from ofa_ds.train.starting import start_from
from ofa_ds.train.step import train_step

OPTIM = OptimConfig(peak_lr=1e-3, warmup_steps=1, eps=1e-6, clip_norm=0.5)
TRAIN = TrainConfig(num_steps=30, seed=3)
EMBEDDING = "encoder.embed_tokens.weight"


def recipe(*words: str) -> Recipe:
    small = ["model.change.dim=32", "model.change.ffn_dim=64", "model.change.num_heads=2"]
    given = {word.partition("=")[0] for word in words}
    return load_recipe("pretrain-nano", [*(word for word in small if word.partition("=")[0] not in given), *words])


def model_of(config: ModelConfig, *, seed: int = 3, frozen: bool = False) -> OFA:
    torch.manual_seed(seed)
    model = OFA(config)
    model.encoder.embed_tokens.weight.requires_grad_(not frozen)
    return model


def engine_of(ranks: Any, make: Callable[[], nn.Module], stage: int) -> Engine:
    batch = BatchConfig(global_rows=len(KINDS), micro_rows=MICRO_ROWS)
    return build(make, deepspeed=ds_config(stage), optim=OPTIM, batch=batch, train=TRAIN, ranks=ranks)


def constrained(batch: Batch, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    mask_MV = torch.rand(len(batch.targets), VOCAB, generator=generator) < 0.3
    mask_MV[torch.arange(len(mask_MV)), batch.targets] = True
    mask_MV[batch.targets == PAD_ID] = False
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask_MV.sum(-1).cumsum(0)])
    return dataclasses.replace(batch, allowed_ids=mask_MV.nonzero()[:, 1], allowed_offsets=ends)


def micro_batch(step: int, number: int) -> Batch:
    at = number * MICRO_ROWS
    batch = random_batch((step,), kinds=KINDS[at : at + MICRO_ROWS], first=at, vocab_size=VOCAB)
    return constrained(batch, 100 * step + number)


class Alone:
    """One process without DeepSpeed."""

    def __init__(self, model: OFA) -> None:
        self.model, self.device, self.num_updates = model, torch.device("cpu"), 0

    def __call__(self, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        return self.model(*args, **options)


def one_process(criterion: Criterion) -> tuple[list[float], dict[str, Tensor]]:
    """Plain torch on all micro-batches: losses and the final weights; the token embedding is frozen."""
    engine = Alone(model_of(model_config(recipe(), VOCAB), frozen=True))
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay)
    losses, objective = [], TaskLoss(criterion)
    for step in range(STEPS):
        prepared = objective.prepare(engine, [micro_batch(step, n) for n in range(len(KINDS) // MICRO_ROWS)])
        counts = torch.stack([each.counts for each in prepared]).sum(0)
        loss = sum(objective.loss(engine, each, counts).loss for each in prepared)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, OPTIM.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = polynomial_lr(step, peak_lr=OPTIM.peak_lr, warmup_steps=OPTIM.warmup_steps, num_steps=30)
        optimizer.step()
        optimizer.zero_grad()
        engine.num_updates += 1
        losses.append(loss.item())
    return losses, engine.model.state_dict()


def criteria(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """Each criterion at each stage beside one process: how far losses and weights are apart."""
    results = []
    config = model_config(recipe(), VOCAB)
    for name, options in CRITERIA.items():
        criterion = Criterion(**options)
        want_losses, want = one_process(criterion)
        for stage in STAGES[ranks.world_size]:
            engine, losses = engine_of(ranks, lambda: model_of(config, frozen=True), stage), []
            window = Window(engine.device)
            for step in range(STEPS):
                numbers = range(ranks.rank, len(KINDS) // MICRO_ROWS, ranks.world_size)
                train_step(engine, [micro_batch(step, number) for number in numbers], window, TaskLoss(criterion))
                losses.append(window.close(engine.all_reduce)["loss"])
            weights = engine.full_weights() or {}
            apart = {key: (value - want[key]).abs().max().item() for key, value in weights.items()}
            results.append({
                "name": name, "stage": stage, "losses": losses, "want": want_losses,
                "weights": max(apart.values(), default=0.0), "embedding": apart.get(EMBEDDING, 0.0),
            })  # fmt: skip
            dispose(engine)
    return results


def started(ranks: Any, folder: Path, source: Path, stage: int, rows: int, *words: str) -> dict[str, Any]:
    """The weights of an engine that starts from `source`, or why it cannot."""
    given = recipe(f"train.init_from={source}", *words)
    config = model_config(given, rows)
    engine = engine_of(ranks, lambda: model_of(config, seed=99), stage)
    try:
        start_from(engine, given, config, "v" * 16)
        return {"weights": engine.full_weights(), "updates": engine.num_updates}
    except ValueError as error:
        return {"error": engine.gather(str(error))}
    finally:
        dispose(engine)


def starts(ranks: Any, folder: Path) -> dict[str, Any]:
    given = recipe()
    config = model_config(given, VOCAB)
    engine = engine_of(ranks, lambda: model_of(config), 3)
    train_step(engine, [micro_batch(0, n) for n in range(ranks.rank, 6, ranks.world_size)], Window(engine.device),
               TaskLoss(Criterion()))  # fmt: skip
    want = engine.full_weights()
    extra = {"recipe": recipe_to_dict(given), "identity": {"data": "d", "vocab": "v" * 16}}
    ours = checkpoint.save(engine, folder / "ours", 1, extra=extra)
    extra["identity"] = {"data": "d", "vocab": None}
    without_vocabulary = checkpoint.save(engine, folder / "exported", 1, extra=extra)
    (folder / "ours" / "best").write_text(f"{ours.name}\n")
    dispose(engine)
    sources = {"ours": ours, "a run": folder / "ours", "best": folder / "ours" / "best"}
    for name in FORMATS:
        sources[name] = folder / (f"{name}.pt" if name == "fairseq" else name)
        if ranks.rank == 0:
            export_checkpoint(without_vocabulary, sources[name], ExportPlan(format=name))
    torch.distributed.barrier()

    def same(found: dict[str, Any]) -> bool:
        weights = found.get("weights")
        return weights is None or all(torch.equal(weights[name], want[name]) for name in want)

    results: dict[str, Any] = {"formats": {}, "errors": {}, "changes": {}}
    for name, source in sources.items():
        for stage in WEIGHTS:
            found = started(ranks, folder, source, stage, VOCAB)
            ok = "error" not in found and same(found) and found["updates"] == 0
            results["formats"][f"{name} at stage {stage}"] = ok if "error" not in found else found["error"]
    for name, source in (("ours", ours), ("fairseq", sources["fairseq"])):
        for what, rows, words in (
            ("preset", VOCAB, ("model.change.dim=64",)),
            ("vocabulary", VOCAB + 10, ()),
            ("positions", VOCAB, ("model.change.image_bucket_size=8",)),
        ):
            results["errors"][f"{name}: {what}"] = started(ranks, folder, source, 3, rows, *words).get("error")
        grown = started(ranks, folder, source, 3, VOCAB + 10, 'train.init_changes=["grow_vocab"]')
        resized = started(
            ranks, folder, source, 3, VOCAB, 'train.init_changes=["resize_image_positions"]',
            "model.change.image_bucket_size=8",
        )  # fmt: skip
        if want is not None:
            rows_kept = torch.equal(grown["weights"][EMBEDDING][:VOCAB], want[EMBEDDING])
            shape = list(resized["weights"]["encoder.embed_image_positions.weight"].shape)
            results["changes"][name] = {"rows kept": rows_kept, "image rows": shape[0]}
    changed = recipe(f"train.init_from={ours}")
    engine = engine_of(ranks, lambda: model_of(config, seed=99), 3)
    try:
        start_from(engine, changed, config, "w" * 16)
    except ValueError as error:
        results["errors"]["other vocabulary"] = engine.gather(str(error))
    dispose(engine)
    return results


if __name__ == "__main__":
    run_jobs({"criteria": criteria, "starts": starts})

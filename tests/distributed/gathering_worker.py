"""What each rank of test_gathering.py runs: `torchrun ... gathering_worker.py FOLDER`. Rank 0 writes the results."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from batches import random_batch
from engine_cases import result_file

from ofa_ds.cli.main import leave
from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import build
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.model.config import ModelConfig, ResNetConfig, ViTConfig, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.plan.activations import activations
from ofa_ds.plan.layout import layout_of
from ofa_ds.plan.work import Work, work_of

VOCAB, STEPS = 220, 2
NANO = preset("nano", vocab_size=VOCAB, dim=32, ffn_dim=64, num_heads=2)
MODELS = {
    "convolutions": NANO,
    "ResNet": dataclasses.replace(NANO, backbone=ResNetConfig(depths=(1, 2, 1))),
    "6B's structure": dataclasses.replace(
        NANO, use_ofasys=True, gamma=0.5, encoder_layers=3,
        backbone=ViTConfig(resolution=32, patch_size=16, channels=8, layers=2, heads=2),
    ),
}  # fmt: skip
NO_LEAF = {"leaf_module": {}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "no leaf modules": NO_LEAF,
    "small buckets": {"stage3_prefetch_bucket_size": 3000, "stage3_max_reuse_distance": 9000},
    "few at a time": {"stage3_max_live_parameters": 12000, "stage3_max_reuse_distance": 2000, **NO_LEAF},
    "nothing ahead": {"stage3_prefetch_bucket_size": 0},
    "some stay": {"stage3_param_persistence_threshold": 70, "stage3_max_reuse_distance": 5000},
}
"""Changes of zero3.json."""


CASES = [
    ("convolutions", "as shipped", True), ("ResNet", "small buckets", True), ("ResNet", "few at a time", False),
    ("6B's structure", "no leaf modules", True), ("6B's structure", "nothing ahead", False),
    ("6B's structure", "some stay", True),
]  # fmt: skip
"""Model, layout, whether activations are checkpointed."""


def cases() -> list[tuple[str, ModelConfig, dict[str, Any]]]:
    found = []
    for model, layout, checkpointed in CASES:
        name = f"{model}, {layout}" + (", checkpointed" if checkpointed else "")
        config = dataclasses.replace(MODELS[model], activation_checkpointing=checkpointed)
        found.append((name, config, LAYOUTS[layout]))
    return found


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    config = json.loads(json.dumps(load_deepspeed_config("zero3")))
    config["zero_optimization"].update(changes)
    if not config["zero_optimization"]["leaf_module"]:
        del config["zero_optimization"]["leaf_module"]
    return config


Event = tuple[str, bool, bool, int]
"""Module, forward, whether it is entered, elements of weights that are whole or on their way afterwards."""


def seen(ranks: Any, config: ModelConfig, ds_config: dict[str, Any]) -> tuple[list[Event], Work]:
    """DeepSpeed's events in the last of some steps, and the last batch."""
    batch = BatchConfig(global_rows=4, micro_rows=2)
    options = {"optim": OptimConfig(peak_lr=1e-3, warmup_steps=3), "batch": batch, "train": TrainConfig(num_steps=30)}
    engine = build(lambda: OFA(config), deepspeed=ds_config, ranks=ranks, **options)
    wrapped = engine._wrapped
    coordinator = wrapped.optimizer._get_param_coordinator()
    names = {id(module): name for name, module in engine.module.named_modules()}
    weights = list(engine.module.parameters())
    events: list[Event] = []

    def recorded(method: Any, entered: bool) -> Any:
        def call(module: Any, forward: bool = False) -> None:
            method(module, forward)
            live = sum(each.ds_numel for each in weights if each.ds_status.name != "NOT_AVAILABLE")
            events.append((names[id(module)], forward, entered, live))

        return call

    coordinator.fetch_sub_module = recorded(coordinator.fetch_sub_module, True)
    coordinator.release_sub_module = recorded(coordinator.release_sub_module, False)
    for step in range(STEPS):
        events.clear()
        one = random_batch((step,), kinds="vi", first=2 * ranks.rank, vocab_size=VOCAB)
        loss, _, _ = engine(one)
        engine.backward(loss.sum() / 100)
        during = list(events)
        engine.step()
    wrapped.destroy()
    offsets = [each.tolist() for each in (one.encoder_offsets, one.num_patches, one.decoder_offsets)]
    shapes, counted = [tuple(each.shape) for each in one.images], len(one.places.counted)
    return during, work_of(shapes, *offsets, one.code_mask.tolist(), counted)


def planned(config: ModelConfig, ds_config: dict[str, Any], work: Work, ranks: int) -> list[Event]:
    layout = layout_of(ds_config, hosts=1, ranks_per_host=ranks, on_gpu=False)
    events: list[Event] = []
    activations(
        config, work, layout,
        watch=lambda coordinator, module, forward, entered: events.append(
            (module, forward, entered, coordinator.live)
        ),
    )  # fmt: skip
    return events


def main(folder: Path) -> None:
    ranks = init_distributed("cpu")
    results = []
    for name, config, changes in cases():
        torch.manual_seed(0)
        ds_config = changed(changes)
        theirs, work = seen(ranks, config, ds_config)
        ours = planned(config, ds_config, work, ranks.world_size)
        different = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), -1)
        results.append(
            {
                "case": name, "events": len(theirs), "planned": len(ours), "first difference": different,
                "theirs": theirs[max(different - 3, 0) : different + 3] if different >= 0 else [],
                "ours": ours[max(different - 3, 0) : different + 3] if different >= 0 else [],
                "peaks": [max(each[3] for each in events) for events in (theirs, ours)],
            }
        )  # fmt: skip
        gc.collect()
    if ranks.rank == 0:
        result_file(folder, ranks.world_size).write_text(json.dumps(results))
    leave_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)

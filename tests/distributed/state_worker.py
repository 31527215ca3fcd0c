"""What each rank of test_planned_state.py runs: `torchrun ... state_worker.py FOLDER`. Rank 0 writes the results."""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from batches import random_batch
from engine_cases import result_file
from torch import Tensor

from ofa_ds.cli.main import leave
from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import build
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.plan.layout import layout_of
from ofa_ds.plan.parameters import parameters
from ofa_ds.plan.state import state

VOCAB = 220
CONFIG = preset("nano", vocab_size=VOCAB, dim=64, ffn_dim=256, num_heads=2)
BUCKET = 20_000
CASES = {
    f"stage {stage}, {precision}{', average' if ema else ''}": (stage, precision, ema)
    for stage, precision, ema in [
        (0, "fp32", False), (1, "fp32", False), (1, "bf16", True), (2, "fp32", False), (2, "bf16", False),
        (3, "fp32", True), (3, "bf16", True),
    ]
}  # fmt: skip


def config_of(stage: int, precision: str) -> dict[str, Any]:
    if not stage:
        return {"zero_optimization": {"stage": 0}}
    config = json.loads(json.dumps(load_deepspeed_config(f"zero{stage}")))
    config["bf16"] = {"enabled": precision == "bf16"}
    config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    return config


def tensors() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, Tensor) and each.device.type == "cpu"]


def measured(ranks: Any, config: dict[str, Any], ema: bool) -> int:
    """Bytes of all tensors that are there after two steps and were not before the engine was, without buffers."""
    before = tensors()  # held, so that no new one gets the place of one of them
    known = {each.untyped_storage()._cdata for each in before}
    options = {"batch": BatchConfig(global_rows=4, micro_rows=2), "train": TrainConfig(num_steps=30)}
    optim = OptimConfig(peak_lr=1e-3, warmup_steps=3, ema_decay=0.9 if ema else 0.0)
    engine = build(lambda: OFA(CONFIG), deepspeed=config, ranks=ranks, optim=optim, **options)
    for step in range(2):
        loss, _, _ = engine(random_batch((step,), kinds="vi", first=2 * ranks.rank, vocab_size=VOCAB))
        engine.backward(loss.sum() / 100)
        del loss, _
        engine.step()
    buffers = sum(each.nbytes for each in engine.module.buffers())
    buffers += sum(each.nbytes for each in engine.buffers().values()) * (2 if ema else 1)  # to go back to; averages
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors()}
    found = sum(size for key, size in storages.items() if key not in known) - buffers
    engine._wrapped.destroy()
    return found


def main(folder: Path) -> None:
    ranks = init_distributed("cpu")
    results = []
    for name, (stage, precision, ema) in CASES.items():
        config = config_of(stage, precision)
        found = measured(ranks, config, ema)
        layout = layout_of(config, hosts=1, ranks_per_host=ranks.world_size, on_gpu=False, ema=ema)
        held = state([math.prod(each.shape) for each in parameters(CONFIG)], layout)
        passing = {1: ("reduction buckets",), 2: ("reduction buckets", "gradients")}.get(stage, ())
        at_rest = sum(size for part, size in held.gpu.items() if part not in passing)
        results.append({"case": name, "measured": found, "planned": at_rest, "parts": dict(held.gpu)})
    if ranks.rank == 0:
        result_file(folder, ranks.world_size).write_text(json.dumps(results))
    leave_distributed()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    leave(0)

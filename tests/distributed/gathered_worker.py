"""What each rank of test_gathered.py runs: `torchrun ... gathered_worker.py FOLDER`. Rank 0 writes the results."""

from __future__ import annotations

import gc
import json
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
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.inference.generate import GenerationConfig, Hypothesis, generate
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import TokenLoss
from ofa_ds.train.step import train_step

VOCAB = 220
OPTIM = OptimConfig(peak_lr=1e-3, warmup_steps=3, eps=1e-6, ema_decay=0.5)
SEARCH = GenerationConfig(beams=3, max_len_b=7)
CASES = ("fp32 stage 0", "fp32 stage 1", "fp32 stage 2", "fp32 stage 3", "bf16 stage 3")


def make_ofa() -> OFA:
    return OFA(preset("nano", vocab_size=VOCAB, dim=32, ffn_dim=64, num_heads=2))


def start(ranks: Any, case: str) -> Engine:
    stage = int(case[-1])
    config = {"zero_optimization": {"stage": 0}} if stage == 0 else load_deepspeed_config(f"zero{stage}")
    if case.startswith("bf16"):
        config = {**config, "bf16": {"enabled": True}}
    batch = BatchConfig(global_rows=4, micro_rows=2)
    train = TrainConfig(num_steps=30, seed=3)
    return build(make_ofa, deepspeed=config, optim=OPTIM, batch=batch, train=train, ranks=ranks)


def step(engine: Engine, number: int) -> float:
    window = Window(engine.device, ("vqa", "detection", "image_infilling", "text_infilling"))
    first = engine.ranks.rank * 2
    batch = random_batch((number,), kinds="vtvt"[first : first + 2], first=first, vocab_size=VOCAB)
    train_step(engine, [batch], window, TokenLoss())
    return window.close(engine.all_reduce)["loss"]


def searched(model: OFA, rows: int) -> list[list[Hypothesis]]:
    return generate(model, random_batch((9,), kinds="vtv"[:rows], vocab_size=VOCAB), SEARCH)


def plain(weights: dict[str, Tensor], dtype: torch.dtype) -> OFA:
    model = make_ofa()
    model.load_state_dict(weights, strict=False)
    return model.to(dtype).eval()


def run_case(ranks: Any, case: str) -> dict[str, Any]:
    """Two steps, generation by one rank alone, another step; and the same steps without generation."""
    engine = start(ranks, case)
    for number in range(2):
        step(engine, number)
    module_mode = engine.module.training
    with engine.gathered() as model:
        found = searched(model, 3) if ranks.rank == 0 else []  # the other rank calls nothing at all
        again = searched(model, 2 + ranks.rank)  # both, with unlike numbers of rows
    weights = engine.full_weights()
    with engine.gathered(average=True) as model:
        averages = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {name: value for name, value in engine.average_buffers().items()}
    own = {piece.name: piece for piece in engine.pieces()}
    off = sum(
        not torch.equal(
            averages[name].view(-1)[piece.start : piece.start + piece.numel],
            piece.tensors["ema"].to(averages[name].dtype),
        )
        for name, piece in own.items()
        if piece.numel and "ema" in piece.tensors
    )
    off += sum(not torch.equal(averages[name], value) for name, value in kept.items())
    loss = step(engine, 2)
    engine._wrapped.destroy()
    del engine
    gc.collect()
    other = start(ranks, case)
    losses = [step(other, number) for number in range(3)]
    other._wrapped.destroy()
    result = {"case": case, "off": off, "loss": loss, "without": losses[-1], "training": module_mode, "same": False}
    if weights is not None:
        dtype = torch.bfloat16 if case.startswith("bf16") else torch.float32
        expected = plain(weights, dtype)
        result["same"] = found == searched(expected, 3) and again == searched(expected, 2)
        result["hypotheses"] = sum(map(len, found))
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = init_distributed("cpu")
    results = [run_case(ranks, case) for case in CASES]
    if ranks.rank == 0:
        result_file(folder, ranks.world_size).write_text(json.dumps(results))
    leave_distributed()
    leave(0)


if __name__ == "__main__":
    main()

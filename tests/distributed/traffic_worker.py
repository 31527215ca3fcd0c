"""What each rank of test_traffic.py runs: real steps, each collective counted where Python hands it to torch."""

from __future__ import annotations

import collections
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

CALLS: list[tuple[str, int, str, str, int]] = []
"""(kind, elements, dtype, phase, ranks) of each call."""
PHASE = ["step"]
TYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}


def count(name: str, kind: str, at: int, *keywords: str) -> None:
    """at: which argument is the payload; keywords: its names."""
    call = getattr(dist, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        payload = args[at] if len(args) > at else next(kwargs[key] for key in keywords if key in kwargs)
        whole = payload if isinstance(payload, list) else [payload]
        dtype = str(whole[0].dtype)
        ranks = dist.get_world_size(kwargs.get("group"))
        elements = sum(each.numel() for each in whole)
        CALLS.append((kind, elements, TYPES.get(dtype, dtype.removeprefix("torch.")), PHASE[0], ranks))
        return call(*args, **kwargs)

    setattr(dist, name, counting)


# Before DeepSpeed is imported, which keeps some of them.
count("all_gather_into_tensor", "all_gather", 0, "output_tensor")
count("reduce_scatter_tensor", "reduce_scatter", 1, "input", "input_tensor")
count("all_reduce", "all_reduce", 0, "tensor")
for other in ("all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all_single"):
    count(other, f"another: {other}", 0, "tensor", "tensor_list", "output", "output_tensor_list")

from batches import random_batch  # noqa: E402
from engine_cases import result_file  # noqa: E402
from traffic_cases import CASES, VOCAB, Case  # noqa: E402

from ofa_ds.cli.main import leave  # noqa: E402
from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig  # noqa: E402
from ofa_ds.engine.engine import Engine, build  # noqa: E402
from ofa_ds.engine.process_group import init_distributed, leave_distributed  # noqa: E402
from ofa_ds.model.ofa import OFA  # noqa: E402
from ofa_ds.train.metrics import Window  # noqa: E402
from ofa_ds.train.objective import TokenLoss  # noqa: E402
from ofa_ds.train.step import train_step  # noqa: E402

STEPS = 4
"""The last is counted: DeepSpeed knows the order of the modules after two micro-batches."""


class PhasedEngine(Engine):
    """Says in which part of a step it is."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._in("forward", super().__call__, *args, **kwargs)

    def backward(self, *args: Any) -> None:
        self._in("backward", super().backward, *args)

    @staticmethod
    def _in(phase: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        PHASE[0] = phase
        try:
            return call(*args, **kwargs)
        finally:
            PHASE[0] = "step"


def run(ranks: Any, case: Case) -> list[list[Any]]:
    """[kind, elements, dtype, phase, ranks, count] of the calls of one step."""
    engine = build(
        lambda: OFA(case.config), deepspeed=case.deepspeed, optim=OptimConfig(clip_norm=0.5), ranks=ranks,
        batch=BatchConfig(global_rows=4 * ranks.world_size * case.accumulation, micro_rows=4),
        train=TrainConfig(num_steps=STEPS),
    )  # fmt: skip
    engine.__class__ = PhasedEngine
    window = Window(engine.device)
    for step in range(STEPS):
        CALLS.clear()
        firsts = [4 * (micro * ranks.world_size + ranks.rank) for micro in range(case.accumulation)]
        batches = [random_batch((step,), kinds="vtid", first=first, vocab_size=VOCAB) for first in firsts]
        train_step(engine, batches, window, TokenLoss())
    calls = [[*call, times] for call, times in sorted(collections.Counter(CALLS).items())]
    engine._wrapped.destroy()
    del engine
    gc.collect()
    return calls


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    ranks = init_distributed("cpu")
    found = {name: run(ranks, CASES[name]) for name in names}
    if ranks.rank == 0:
        result_file(Path(folder), ranks.world_size).write_text(json.dumps(found))
    leave_distributed()
    leave(0)

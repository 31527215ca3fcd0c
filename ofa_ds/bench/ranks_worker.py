"""The ranks of `bench step|memory|plan`: `torchrun ranks_worker.py FOLDER`, which holds cases.json.

Each rank builds each case's engine and takes real training steps; it writes FOLDER/rankR.json: for each case the
seconds of the timed steps, their median, resident memory after the imports, after joining, after building, and its
peak until then.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ofa_ds.batch import Batch, pack
from ofa_ds.bench.ranks_case import SHIPPED, Case
from ofa_ds.bench.step import example
from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.engine.ranks import Ranks
from ofa_ds.model.ofa import OFA
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import TokenLoss
from ofa_ds.train.step import train_step

WARM = 2


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process, now or (VmHWM) at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def batch_of(case: Case, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    examples = []
    for row in case.rows:
        task = "image_infilling" if row.code else "caption"
        for _ in range(row.count):
            made = example(rng, side=row.side, source=row.source, target=row.target, task=task)
            made.source[:] %= case.vocab - 4
            made.target[:] = made.target % (case.vocab - 4) + 4
            examples.append(made)
    config = case.config
    return pack(examples, [(side, side) for side in case.sides], config.patch_size, config.image_bucket_size)


def deepspeed_of(case: Case) -> dict[str, Any]:
    name = SHIPPED[case.stage]
    return load_deepspeed_config(name) if name else {"zero_optimization": {"stage": 0}}


def run(case: Case, ranks: Ranks) -> dict[str, Any]:
    joined = resident()
    rows = sum(row.count for row in case.rows)
    batch = BatchConfig(global_rows=rows * ranks.world_size * case.accumulation, micro_rows=rows)
    config = case.config
    train = TrainConfig(num_steps=100)
    engine = build(
        lambda: OFA(config), deepspeed=deepspeed_of(case), optim=OptimConfig(), batch=batch, train=train, ranks=ranks
    )
    built, built_peak = resident(), resident("VmHWM")
    engine.module.train()
    micro = [batch_of(case, ranks.rank * 100 + number) for number in range(case.accumulation)]
    window, seconds = Window(engine.device), []
    for step in range(WARM + case.steps):
        began = time.perf_counter()
        train_step(engine, micro, window, TokenLoss())
        if step >= WARM:
            seconds.append(time.perf_counter() - began)
    result = {
        "name": case.name, "step_s": statistics.median(seconds), "seconds": seconds, "joined_bytes": joined,
        "built_bytes": built, "built_peak_bytes": built_peak, "peak_bytes": resident("VmHWM"),
        "parameters": sum(getattr(each, "ds_numel", each.numel()) for each in engine.module.parameters()),
    }  # fmt: skip
    dispose(engine)
    return result


def dispose(engine: Engine) -> None:
    engine._wrapped.destroy()
    del engine
    gc.collect()


def main() -> None:
    folder = Path(sys.argv[1])
    imported = resident()
    ranks = init_distributed("cpu")
    results = []
    for text in json.loads((folder / "cases.json").read_text()):
        results.append({**run(Case.from_text(text), ranks), "imported_bytes": imported})
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    leave_distributed()
    os._exit(0)  # Python's own end takes the connections' threads down in no certain order, and may abort


if __name__ == "__main__":
    main()

"""What the distributed tests run, and how; light enough to import while tests are collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("engine_worker.py")
TIMEOUT_S = 600

VOCAB = 220
STEPS = 20
KINDS = "vtvidvvtvvdi"
"""Examples of a global batch: 12, so that 1, 2 and 3 ranks and up to 3 accumulation steps divide it."""

PARITY = {
    1: [(0, 2), (1, 3), (2, 1), (3, 2)],
    2: [(0, 3), (1, 1), (2, 2), (3, 1), (3, 3)],
    3: [(0, 1), (1, 2), (2, 2), (3, 2)],
}
"""World size -> (ZeRO stage, accumulation steps)."""

RESUME = ("fp32_0", "fp32_1", "fp32_2", "fp32_3", "bf16_1", "bf16_3", "fp16_3")
RESHARD = {
    1: [("fp32_3", 0), ("fp32_2", 3), ("bf16_1", 3)],
    3: [("fp32_0", 2), ("fp32_2", 3), ("fp32_3", 1), ("fp32_3", 3), ("bf16_1", 0), ("fp16_3", 3)],
}
"""World size -> (what two ranks saved, ZeRO stage that loads it)."""

SKIP = ("fp32_0", "fp32_1", "fp32_2", "fp32_3", "bf16_1", "bf16_2", "bf16_3", "fp16_3")
"""Precision and ZeRO stage of engines that skip steps."""
OFFLOAD = ("fp32_2_offload", "bf16_3_offload")
"""The same with the optimizer on the CPU, whose first use compiles for minutes."""

LEFT_OUT = ("fp32_0", "bf16_2", "fp32_3", "fp16_3")
CORRUPTED = ("fp32_0", "bf16_1", "bf16_3")
"""The same, of three ranks: engines that leave steps out on purpose; engines in which a bit is turned over."""

JOBS = {2: ("parity", "precision", "resume", "skip"), 3: ("parity", "reshard"), 1: ("parity", "reshard", "average")}
"""World size -> jobs of its launch; the launch of 2 ranks saves what the others load."""


def result_file(folder: Path, world_size: int) -> Path:
    return folder / f"results_{world_size}.json"


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}


def launch(
    folder: Path, world_size: int, *jobs: str, worker: Path = WORKER, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """Run jobs of a worker on `world_size` ranks under torchrun; returns what rank 0 wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size),
               str(worker), str(folder), *jobs]  # fmt: skip
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads(result_file(folder, world_size).read_text())

"""A model too large for one process, built in pieces: how long it takes and what it takes of memory, measured.

Ranks of one host under torchrun on the CPU at ZeRO stage 3, without an optimizer, which would take 12 bytes more each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PRECISIONS = ("bf16", "fp32")


def bench_construction(preset: str, ranks: int, precision: str) -> dict[str, Any]:
    """Raises RuntimeError with the last line of what a rank said where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                   "-m", "ofa_ds.bench.construction", preset, precision, folder]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"a rank failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return {**results[0], "ranks": results, "precision": precision, "preset": preset}


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['preset']}: {result['parameters']:,} parameters, {result['precision']}, {len(result['ranks'])} ranks",
        "| rank | seconds | its share, GB | largest growth, GB | more than its share, GB | whole process, GB |",
        "|---|---|---|---|---|---|",
    ]
    for rank, each in enumerate(result["ranks"]):
        share, grown = each["share"] / 1e9, (each["peak"] - each["before"]) / 1e9
        lines.append(
            f"| {rank} | {each['seconds']:.1f} | {share:.2f} | {grown:.2f} | {grown - share:.2f} | "
            f"{each['peak'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _memory(key: str) -> int:
    """Bytes: VmRSS, or VmHWM, which is the largest it was."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _work(name: str, precision: str, folder: Path) -> None:
    """What each rank does."""
    import torch

    from ofa_ds.config import BatchConfig, OptimConfig
    from ofa_ds.engine.config import derive_config, load_deepspeed_config
    from ofa_ds.engine.construction import construct
    from ofa_ds.engine.host_memory import returning_freed_memory
    from ofa_ds.engine.process_group import init_distributed, leave_distributed
    from ofa_ds.model.config import preset
    from ofa_ds.model.ofa import OFA

    ranks = init_distributed("cpu")
    layout = {**load_deepspeed_config("zero3_6b_a100"), "bf16": {"enabled": precision == "bf16"}}
    batch = BatchConfig(global_rows=ranks.world_size, micro_rows=1)
    world_size, device = ranks.world_size, ranks.device
    config = derive_config(layout, optim=OptimConfig(), batch=batch, world_size=world_size, device=device)
    torch.manual_seed(1)
    before, began = _memory("VmRSS"), time.perf_counter()
    with returning_freed_memory(keep_after=True):
        model = construct(lambda: OFA(preset(name)), config, in_pieces=True)
    result = {
        "seconds": time.perf_counter() - began, "before": before, "peak": _memory("VmHWM"), "after": _memory("VmRSS"),
        "share": sum(each.ds_tensor.numel() * each.ds_tensor.element_size() for each in model.parameters()),
        "parameters": sum(each.ds_numel for each in model.parameters()),
    }  # fmt: skip
    (folder / f"{ranks.rank:05d}.json").write_text(json.dumps(result))
    leave_distributed()
    sys.stdout.flush()
    os._exit(0)  # what is left is gloo's threads


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

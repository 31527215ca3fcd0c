"""A run of two ranks, or as many as are asked for, under torchrun: started, waited for, killed, and what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
from safetensors.numpy import load_file

RANKS = 2
TIMEOUT_S = 240
TIMES = ("tokens_per_s", "examples_per_s", "step_ms", "data_wait_fraction", "peak_memory_MiB", "host_memory_MiB")
TIMES += ("tflops_per_rank", "checkpoint_s", "report_fraction")
PACES = ("slowest_rank", "slowest_rank_excess")
"""Of a record, what depends on the machine's mood."""


def start(module: str, recipe: str, settings: Iterable[str], *, ranks: int = RANKS) -> subprocess.Popen[str]:
    """`-m ofa_ds.MODULE RECIPE KEY=VALUE ...`; of a key that is set twice the last one counts."""
    by_key = {setting.partition("=")[0]: setting for setting in settings}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", f"ofa_ds.{module}", recipe, *by_key.values(),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear in {TIMEOUT_S} s"
        time.sleep(0.01)


def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """To every rank and its workers, then to the launcher: it starts each rank in a session of its own."""
    launcher = psutil.Process(process.pid)
    for each in [*launcher.children(recursive=True), launcher]:
        each.send_signal(number)


def kill(process: subprocess.Popen[str]) -> None:
    send(process, signal.SIGKILL)
    process.communicate()


def records(run_dir: Path) -> list[dict[str, float]]:
    """Of metrics.jsonl, without what depends on the machine's mood."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key.split("/")[0] not in (*TIMES, *PACES)} for line in lines]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Of every rank's file."""
    return {
        f"{file.name}:{name}": array.tobytes()
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }

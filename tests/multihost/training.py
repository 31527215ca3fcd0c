"""A training that takes seconds: what it reads, how it is started on hosts, what it leaves."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hosts
import scenes_shards

NUM_STEPS = 5
OVERRIDES = (
    "data.shards=shards",
    "data.vocab=vocab",
    "batch.micro_rows=4",  # 24 rows a step are shared by 1, 2, 3 or 6 ranks
    "batch.global_rows=24",
    "optim.warmup_steps=1",  # a rate that moves the weights, so that later losses see the first steps' gradients
    f"train.num_steps={NUM_STEPS}",
    f"train.save_every={NUM_STEPS}",
    f"train.sample_every={NUM_STEPS}",
    "train.log_every=1",
)


@dataclass(frozen=True)
class Desk:
    """A working directory that all hosts see, with shards and a vocabulary in it."""

    cluster: hosts.Cluster
    path: Path

    @property
    def env(self) -> dict[str, str]:
        """What a user has who starts something here."""
        env = hosts.launch_env(self.cluster)
        del env["MASTER_PORT"]
        return env

    def program(self, run_dir: str, *overrides: str) -> list[str]:
        """The words after `ofa-ds launch ... --`."""
        return ["pretrain", "pretrain-nano", f"run_dir={run_dir}", *OVERRIDES, *overrides]

    def launch(self, run_dir: str, *options: str) -> list[str]:
        """`ofa-ds launch` of it, on the hosts of hostfile `hosts`."""
        command = [sys.executable, "-m", "ofa_ds.cli", "launch", "--hostfile", "hosts", *options, "--"]
        return [*command, *self.program(run_dir)]

    def losses(self, run_dir: str) -> dict[int, dict[str, float]]:
        """step -> each loss of it."""
        rows = [json.loads(line) for line in (self.path / run_dir / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: {name: value for name, value in row.items() if name.startswith("loss")} for row in rows}

    def weights(self, run_dir: str) -> list[str]:
        """A digest of each rank's part of the last checkpoint."""
        parts = sorted((self.path / run_dir / f"step_{NUM_STEPS:08}").glob("*.safetensors"))
        return [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]

    def wait_for_step(self, run_dir: str, step: int, within_s: float = 240) -> None:
        """Until rank 0 has written down that step."""
        deadline = time.monotonic() + within_s
        file = self.path / run_dir / "metrics.jsonl"
        while not file.exists() or file.read_text().count("\n") < step:
            assert time.monotonic() < deadline, f"{file} has no step {step} after {within_s} s"
            time.sleep(0.05)


def make(cluster: hosts.Cluster, path: Path) -> Desk:
    scenes_shards.build(path, 24)
    cluster.hostfile(path / "hosts")
    return Desk(cluster, path)

"""Cases of real training steps on the CPU, for `bench step`, `bench memory` and `bench plan`: what ranks are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ofa_ds.config.architecture import ModelConfig, preset
from ofa_ds.plan.cpu import MMAP_THRESHOLD
from ofa_ds.plan.layout import Layout, layout_of
from ofa_ds.plan.work import ExampleShape, ImageGroup, Work

TIMEOUT_S = 220
MMAP_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
SHIPPED = {0: None, 1: "zero1", 2: "zero2", 3: "zero3"}
"""DeepSpeed's JSON of each stage, as shipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Examples of one shape in a micro-batch."""

    count: int
    side: int
    """Of the picture in pixels; 0: none."""
    source: int
    target: int
    code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: its model, its micro-batch on each rank, its ZeRO stage and ranks."""

    model: str
    rows: tuple[Rows, ...]
    stage: int
    ranks: int
    vocab: int = 59457
    checkpointing: bool = False
    accumulation: int = 1
    steps: int = 3
    """Timed, after two that are not."""

    @property
    def name(self) -> str:
        rows = "+".join(f"{row.count}x{row.side}px/{row.source}/{row.target}" for row in self.rows)
        more = (" ckpt" if self.checkpointing else "") + (f" acc{self.accumulation}" if self.accumulation > 1 else "")
        return f"{self.model} ZeRO-{self.stage} {self.ranks}r {rows}{more}"

    @property
    def config(self) -> ModelConfig:
        return preset(self.model, vocab_size=self.vocab, activation_checkpointing=self.checkpointing)

    @property
    def sides(self) -> list[int]:
        return sorted({row.side for row in self.rows if row.side}, reverse=True)

    def work(self) -> Work:
        """Of a micro-batch of one rank, as `ofa_ds.batch.pack` makes it."""
        patch = self.config.patch_size
        examples = [
            ExampleShape("", (row.side // patch) ** 2, row.source, row.target, row.code)
            for row in self.rows
            for _ in range(row.count)
        ]
        images = [
            ImageGroup(sum(row.count for row in self.rows if row.side == side), side, side) for side in self.sides
        ]
        return Work(images=tuple(images), examples=tuple(examples))

    def layout(self, deepspeed: dict[str, Any]) -> Layout:
        return layout_of(deepspeed, hosts=1, ranks_per_host=self.ranks, on_gpu=False)

    def as_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Case:
        values = json.loads(text)
        return cls(**{**values, "rows": tuple(Rows(**row) for row in values["rows"])})


def measure(cases: Sequence[Case], *, mapped: bool = False) -> list[dict[str, Any]]:
    """What the ranks of one launch saw of each case, one after another: see `ranks_worker`. Peak memory is of all.

    All of as many ranks. mapped: with large blocks as mappings of their own (`plan.cpu.MMAP_THRESHOLD`), as memory is
    planned; else as training runs by default. Raises RuntimeError: a rank failed, with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="ofa_ds_bench_") as folder:
        file = Path(folder) / "cases.json"
        file.write_text(json.dumps([each.as_text() for each in cases]))
        worker = Path(__file__).with_name("ranks_worker.py")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cases[0].ranks),
            str(worker), folder,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment.pop(MMAP_VARIABLE, None)
        if mapped:
            environment[MMAP_VARIABLE] = str(MMAP_THRESHOLD)
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{cases[0].name}: ranks took longer than {TIMEOUT_S} s") from error
        if done.returncode:
            raise RuntimeError(f"{cases[0].name}: a rank failed:\n{(done.stdout + done.stderr)[-2000:]}")
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]
    return [
        {**slowest, "peak_bytes": max(ranks["peak_bytes"] for ranks in each)}
        for each in zip(*found, strict=True)
        for slowest in [max(each, key=lambda rank: rank["step_s"])]
    ]


def without(case: Case, **changes: Any) -> Case:
    return replace(case, **changes)

"""The recipe's switches, end to end: real training of nano on scenes with every kernel on and with every kernel off.

In the interpreter that takes minutes: `bash tests/run.sh tests/kernels --slow -m slow`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scenes_shards

STEPS = 2
RUN = "import quick_interpreter, sys; from ofa_ds.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_shards.build(tmp_path_factory.mktemp("scenes"), rows=32)


def losses(data: Path, run_dir: Path, kernel: str) -> list[float]:
    switches = [f"kernels.{name}={kernel}" for name in ("attention", "layer_norm", "cross_entropy")]
    command = [
        sys.executable, "-c", RUN, "pretrain", "pretrain-nano", f"run_dir={run_dir}", f"data.shards={data / 'shards'}",
        f"data.vocab={data / 'vocab'}", "data.mix.vision_language=1", "data.mix.text=1", "data.mix.image=1",
        "data.mix.detection=1", "batch.global_rows=4", "batch.micro_rows=4", "optim.warmup_steps=0",
        f"train.num_steps={STEPS}", "train.log_every=1", "train.sample_every=0", *switches,
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_is_the_same_curve_with_every_kernel_on_and_off(data: Path, tmp_path: Path) -> None:
    on, off = (losses(data, tmp_path / kernel, kernel) for kernel in ("triton", "torch"))
    assert len(on) == STEPS and off[-1] < off[0]
    assert on == pytest.approx(off, rel=2e-5)
    assert on != off, "the same bits: the kernels did not run"

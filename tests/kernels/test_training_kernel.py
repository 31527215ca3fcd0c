"""The recipe's switches, end to end: real training of nano on scenes with every kernel on and with every kernel off.

In the interpreter that takes minutes: `bash tests/run.sh tests/kernels --slow -m slow`. On a GPU it is bf16, and quick.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scenes_shards

STEPS, GPU_STEPS = 2, 20
RUN = "import quick_interpreter, sys; from ofa_ds.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_shards.build(tmp_path_factory.mktemp("scenes"), rows=32)


def losses(data: Path, run_dir: Path, kernel: str, *, on_gpu: bool = False) -> list[float]:
    """Of each step; on a CPU in the interpreter and fp32."""
    switches = [f"kernels.{name}={kernel}" for name in ("attention", "layer_norm", "cross_entropy")]
    how = ("-m", "ofa_ds.cli") if on_gpu else ("-c", RUN)
    command = [
        sys.executable, *how, "pretrain", "pretrain-nano", f"run_dir={run_dir}", f"data.shards={data / 'shards'}",
        f"data.vocab={data / 'vocab'}", "data.mix.vision_language=1", "data.mix.text=1", "data.mix.image=1",
        "data.mix.detection=1", "batch.global_rows=4", "batch.micro_rows=4", "optim.warmup_steps=0",
        f"train.num_steps={GPU_STEPS if on_gpu else STEPS}", "train.log_every=1", "train.sample_every=0", *switches,
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    where = ("0", "cuda") if on_gpu else ("1", "cpu")
    environment = {**os.environ, "TRITON_INTERPRET": where[0], "PYTHONPATH": path, "DS_ACCELERATOR": where[1]}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_is_the_same_curve_with_every_kernel_on_and_off(data: Path, tmp_path: Path) -> None:
    on, off = (losses(data, tmp_path / kernel, kernel) for kernel in ("triton", "torch"))
    assert len(on) == STEPS and off[-1] < off[0]
    assert on == pytest.approx(off, rel=2e-5)
    assert on != off, "the same bits: the kernels did not run"


@pytest.mark.gpu
def test_training_under_zero_3_on_a_gpu_repeats_to_the_bit_and_is_the_curve_of_plain_torch(
    data: Path, tmp_path: Path
) -> None:
    """The same commands twice; a difference to plain torch there must be, or the kernels did not run."""
    runs = {"triton": "triton", "again": "triton", "torch": "torch"}
    found = {name: losses(data, tmp_path / name, kernel, on_gpu=True) for name, kernel in runs.items()}
    assert len(found["triton"]) == GPU_STEPS and found["triton"][-1] < found["triton"][0]
    assert found["triton"] == found["again"]
    assert found["triton"] == pytest.approx(found["torch"], rel=3e-2)
    assert found["triton"] != found["torch"]

"""What computes a model, and in which precision: the rules, and the line that says so at the start of a program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import scenes_shards
import torch
from torch import nn

from ofa_ds.cli.main import _parser
from ofa_ds.engine import optimizer
from ofa_ds.inference.asking import How
from ofa_ds.inference.loaded_model import dtype_for
from ofa_ds.model.config import preset
from ofa_ds.model.running import repeat_bits
from ofa_kernels import _launch, choice

GPU, CPU = torch.device("cuda"), torch.device("cpu")
AUTO = {"attention": "auto", "layer_norm": "auto", "cross_entropy": "auto", "deterministic": True}


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "HAS_TRITON", True)
    monkeypatch.setattr(choice, "products_are_wide", lambda *_: True)


def on_gpu(dtype: torch.dtype) -> SimpleNamespace:
    """As much of a tensor as a choice looks at."""
    return SimpleNamespace(is_cuda=True, device=GPU, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_is_triton_on_a_gpu_in_sixteen_bits_where_it_pays(dtype: torch.dtype) -> None:
    assert _launch.use_triton("auto", on_gpu(dtype))
    assert not _launch.use_triton("auto", on_gpu(dtype), pays=False)
    assert not _launch.use_triton("auto", torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_auto_never_takes_a_kernel_in_wider_numbers(dtype: torch.dtype) -> None:
    assert not _launch.use_triton("auto", on_gpu(dtype))


def test_under_autocast_the_dtype_of_the_products_decides() -> None:
    assert _launch.use_triton("auto", on_gpu(torch.float32), dtype=torch.bfloat16)
    x = torch.zeros(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert _launch.product_dtype(x) == torch.bfloat16
        assert _launch.product_dtype(x.double()) == torch.float64
    assert _launch.product_dtype(x) == torch.float32


def test_a_gpu_in_sixteen_bits_is_told_with_the_shapes_that_pay() -> None:
    line = choice.describe(**AUTO, device=GPU, dtype=torch.bfloat16, training=True)
    assert line.startswith("kernels in bfloat16 on cuda: attention: Triton (a GPU and 16 bits); layer_norm: Triton")
    assert "cross_entropy: Triton from 1,024 tokens on, torch elsewhere" in line
    assert "sum in fp32 by themselves" in line and "repeat to the bit" in line and "\n" not in line


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, "repeat to the bit"),
        ({"deterministic": False}, "repeat to the bit, but for convolutions"),
        ({"attention": "torch"}, "repeat to the bit, but for relative tables"),
        ({"attention": "torch", "deterministic": False}, "repeat to the bit, but for convolutions and relative tables"),
    ],
)
def test_gradients_that_do_not_repeat_are_named(changes: dict[str, object], told: str) -> None:
    line = choice.describe(**(AUTO | changes), device=GPU, dtype=torch.bfloat16, training=True)
    assert line.endswith(told)


@pytest.mark.parametrize(
    "device, dtype, has_triton, why",
    [
        (CPU, torch.float32, True, "attention, layer_norm, cross_entropy: torch (no GPU)"),
        (GPU, torch.float32, True, "attention: torch, padded (float32, where bfloat16 and"),
        (GPU, torch.bfloat16, False, "attention: torch, padded (the triton package is missing)"),
    ],
)
def test_where_torch_computes_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, has_triton: bool, why: str
) -> None:
    monkeypatch.setattr(_launch, "HAS_TRITON", has_triton)
    assert why in choice.describe(**AUTO, device=device, dtype=dtype, training=False)


def test_what_was_chosen_is_told_as_chosen() -> None:
    chosen = {**AUTO, "attention": "torch", "layer_norm": "apex", "cross_entropy": "triton", "deterministic": False}
    line = choice.describe(**chosen, device=GPU, dtype=torch.float16, training=True)
    assert "attention: torch, padded (chosen); layer_norm: apex (chosen)" in line
    assert "cross_entropy: Triton (chosen)" in line and "but for convolutions" in line


def test_a_model_answers_in_bf16_on_a_gpu_that_has_it_and_in_fp32_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    has_bf16 = True
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert dtype_for("auto", GPU) == dtype_for("bf16", CPU) == torch.bfloat16
    assert dtype_for("auto", CPU) == dtype_for("fp32", GPU) == torch.float32
    has_bf16 = False
    assert dtype_for("auto", GPU) == torch.float32
    with pytest.raises(ValueError, match="precision 'fp16': want one of auto, bf16, fp32"):
        dtype_for("fp16", GPU)


@pytest.mark.parametrize(
    "command", ["evaluate x --shards y", "generate x --task vqa", "predict x --task vqa --shards y --out z"]
)
def test_every_command_that_answers_takes_a_precision(command: str) -> None:
    parse = _parser().parse_args
    assert parse(command.split()).precision == How().precision == "auto"
    assert parse([*command.split(), "--precision", "fp32"]).precision == "fp32"


def test_a_fused_optimizer_that_does_not_build_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(parameters: list[nn.Parameter]) -> None:
        raise RuntimeError("CUDA_HOME does not exist\nand more")

    monkeypatch.setattr(optimizer, "FusedAdam", fails)
    monkeypatch.setattr(nn, "Parameter", lambda tensor: tensor)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: None)
    assert optimizer._fused_adam_problem() == "CUDA_HOME does not exist"
    monkeypatch.undo()
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert optimizer.kernel_name(adamw) == "torch's fused AdamW"
    adamw.problem = "CUDA_HOME does not exist"
    assert optimizer.kernel_name(adamw) == "torch's fused AdamW (not DeepSpeed's: CUDA_HOME does not exist)"


@pytest.mark.parametrize("deterministic", [True, False])
def test_convolutions_repeat_to_the_bit_where_the_recipe_says_so(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    from ofa_ds.config import KernelConfig

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    repeat_bits(preset("tiny", kernels=KernelConfig(deterministic=deterministic)))
    assert torch.backends.cudnn.deterministic is deterministic


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run directory of one step of nano, what training said)."""
    folder = tmp_path_factory.mktemp("trained")
    data = scenes_shards.build(folder / "scenes", rows=16)
    said = ofa_ds(
        "pretrain", "pretrain-nano", f"run_dir={folder / 'run'}", f"data.shards={data / 'shards'}",
        f"data.vocab={data / 'vocab'}", "data.workers=0", "batch.global_rows=4", "batch.micro_rows=4",
        "train.num_steps=1", "train.sample_every=0",
    )  # fmt: skip
    return folder / "run", said


def ofa_ds(*arguments: str) -> str:
    """Standard error."""
    command = [sys.executable, "-m", "ofa_ds.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says something else on a GPU")
def test_training_and_answering_say_what_computes_them(trained: tuple[Path, str]) -> None:
    run_dir, said = trained
    line = "kernels in float32 on cpu: attention, layer_norm, cross_entropy: torch (no GPU)"
    assert said.count(line) == 1
    answering = ("generate", str(run_dir), "--task", "text_infilling", "--text", "a red circle", "--beam", "1")
    assert ofa_ds(*answering).count(line) == 1
    assert ofa_ds(*answering, "--precision", "bf16").count(line.replace("float32", "bfloat16")) == 1

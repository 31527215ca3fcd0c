"""`kernels/bench.py --compile`: real builds for GPUs that are not here, and what the gate calls a fault.

The whole gate takes minutes; `.ci/run` runs it on its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run([sys.executable, BENCH, *arguments], capture_output=True, text=True, env=env)


def test_the_cross_attention_of_both_head_dims_compiles_for_both_targets() -> None:
    result = run("--compile", "--json", "--only", "attention forward, cross")
    assert result.returncode == 0, result.stderr
    built = json.loads(result.stdout)
    assert {(row["head_dim"], row["dtype"], row["arch"]) for row in built} == {
        (dim, dtype, arch) for dim in (64, 80) for dtype in ("bf16", "fp16") for arch in ("sm_80", "sm_90")
    }
    for row in built:
        assert row["spill_bytes"] == row["stack_bytes"] == 0
        assert 32 < row["registers"] <= 255 and row["tensor_instructions"] > 0


def test_every_kernel_of_every_preset_has_a_case(bench: ModuleType) -> None:
    cases = bench.compile_cases(False)
    kernels = {case.kernel.split(",")[0] for case in cases}
    assert {"attention forward", "attention queries", "attention row", "attention keys"} <= kernels
    widths = {case.size for case in cases if not case.kernel.startswith("attention")}
    assert {256, 512, 768, 1024, 1280, 2560, 2048, 3072, 4096, 5120, 10240} <= widths
    assert {case.size for case in cases if case.kernel.startswith("attention")} == {64, 80}
    assert len({(case.kernel, case.size, case.dtype) for case in cases}) == len(cases)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spill_bytes": 8}, "8 spilled"),
        ({"stack_bytes": 4096, "registers": 32}, "4096 bytes of stack"),
        ({"shared_bytes": 170 * 1024}, "a block has 166912"),
        ({"tensor_instructions": 0}, "no tensor-core instruction"),
    ],
)
def test_spills_stack_shared_memory_and_missing_tensor_cores_are_faults(
    bench: ModuleType, change: dict, message: str
) -> None:
    good = bench.Compiled(
        kernel="attention forward", size_name="head_dim", size=64, dtype="bf16", arch="sm_80", registers=128,
        spill_bytes=0, stack_bytes=0, shared_bytes=1024, warps=16, tensor_instructions=4, wants_tensor_cores=True,
    )  # fmt: skip
    assert good.faults() == []
    (fault,) = dataclasses.replace(good, **change).faults()
    assert message in fault


def test_compiling_under_the_interpreter_is_refused() -> None:
    result = run("--compile", TRITON_INTERPRET="1")
    assert result.returncode != 0 and "TRITON_INTERPRET is set" in result.stderr


def test_nothing_to_do_says_what_there_is() -> None:
    result = run()
    assert result.returncode == 2 and "--compile" in result.stderr


def test_the_roofline_counts_products_of_examples_and_not_of_the_batch() -> None:
    result = run("--roofline")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:]]
    (encoder,) = (row for row in rows if row[:2] == ["attention encoder, mix, forward", "6b"])
    pairs = 17 * 216**2 + 2 * 260**2 + 267**2
    assert float(encoder[3]) == pytest.approx(6 * 80 * 32 * pairs / 1e9, abs=0.05)
    assert all(float(row[-2]) > float(row[-1]) > 0 for row in rows), "an H200 is faster than an A100 everywhere"

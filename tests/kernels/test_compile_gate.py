"""`kernels/bench.py --compile`: real builds for GPUs that are not here, and what the gate calls a fault.

The whole gate takes minutes; `.ci/run` runs it on its own.
"""

from __future__ import annotations

import dataclasses
import functools
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
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_compile_gate", BENCH.with_name("compile_gate.py"))
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


def test_every_kernel_of_every_preset_has_a_case(gate: ModuleType) -> None:
    cases = gate.compile_cases(False, "sm_80")
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
        ({"kernel": "gelu + layer norm forward", "instructions_each": 43}, "43 instructions an element, at most 34"),
    ],
)
def test_spills_stack_shared_memory_and_missing_tensor_cores_are_faults(
    gate: ModuleType, change: dict, message: str
) -> None:
    good = gate.Compiled(
        kernel="attention forward", size_name="head_dim", size=64, dtype="bf16", arch="sm_80", registers=128,
        spill_bytes=0, stack_bytes=0, shared_bytes=1024, warps=16, tensor_instructions=4, loop_instructions=100,
        instructions_each=3.1, wants_tensor_cores=True,
    )  # fmt: skip
    assert good.faults() == []
    (fault,) = dataclasses.replace(good, **change).faults()
    assert message in fault


def test_the_main_loop_is_counted_with_what_it_issues_for_nothing_and_the_branch_behind_the_kernel_is_none(
    gate: ModuleType,
) -> None:
    lines = ["MOV R1, c[0x0][0x28] ;", "@!P0 BRA 0x50 ;", "NOP;", "@!PT LDS RZ, [RZ] ;", "@!UP0 BRA 0x20 ;"]
    lines += ["EXIT ;", "BRA 0x60;", "NOP;"]
    code = "\n".join(f"   /*{16 * i:04x}*/  {line}  /* 0x{i:016x} */" for i, line in enumerate(lines))
    assert gate.main_loop(code) == 3
    assert gate.main_loop(code.replace("BRA 0x20", "BRA 0x60")) == 6, "without a loop: all up to the exit"


def test_fewer_instructions_are_counted_beside_those_before(gate: ModuleType) -> None:
    result = run("--instructions", "--arch", "sm_80", "--only", "attention forward, cross")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"attention forward, cross, {dim}, sm_80" for dim in (64, 80)]
    assert all(10 < float(row[2]) < 40 and row[3].endswith("%") for row in rows)


def test_a_stack_is_accepted_only_where_half_the_step_takes_many_more_instructions() -> None:
    code = "import compile_gate as gate; every = [i for i, x in enumerate(gate.compile_cases(False, 'sm_80')) "
    code += "if (x.kernel, x.size) == ('attention keys, encoder', 80)]; "
    code += "built = gate.compile_one(False, every[0], 'sm_80'); print(len(built.faults())); gate.PAYS = 9.0; "
    code += "print(built.faults())"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH.parent, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    good, bad = done.stdout.splitlines()
    assert good == "0" and "a stack for" in bad


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
    head = [cell.strip() for cell in result.stdout.splitlines()[0].split("|")[1:-1]]
    a100, h200 = head.index("A100 us at best"), head.index("H200 us at best")
    assert all(float(row[a100]) > float(row[h200]) > 0 for row in rows), "an H200 is faster than an A100 everywhere"
    for row in rows:
        for best in (a100, h200):
            share, held = row[best + 1 : best + 3]
            assert 0 < int(share.removesuffix("%")) <= 100 and held in ("products", "bytes", "issue", "atomics"), row


def test_the_roofline_counts_whole_tiles_and_skips_those_that_a_causal_mask_empties(monkeypatch) -> None:
    import roofline

    monkeypatch.setattr(roofline, "_tile", lambda *_: (64, 32))
    pairs = functools.partial(roofline.tile_pairs.__wrapped__, size=64, arch="sm_80")
    assert pairs("attention forward, encoder", examples=((216, 216), (1, 1))) == 256 * 224 + 64 * 32
    assert pairs("attention forward, decoder", examples=((100, 100),)) == 64 * 64 + 64 * 128
    assert pairs("attention keys, decoder", examples=((100, 100),)) == 64 * 128 + 64 * 64
    assert pairs("attention keys, cross", examples=((20, 216),)) == 256 * 32
    assert pairs("attention row, encoder", examples=((20, 216),)) == 24 * 224


def test_the_roofline_counts_issue_slots_and_atomics(monkeypatch) -> None:
    import roofline

    monkeypatch.setattr(roofline, "counted", lambda: {"layer norm forward, 768, sm_80": 32.0})
    forward, backward, *_ = roofline.norms("base", 1000)
    issue = 1000 * 768 / roofline.GPUS["A100"].issue
    assert forward.bounds("A100")["issue"] == pytest.approx(issue), "32 instructions of a thread are one of a warp"
    assert backward.bounds("A100") is None, "not counted: nothing is expected"
    works = {kind: list(roofline.attention("6b", kind, roofline.MIX[kind], "mix"))[1] for kind in roofline.MIX}
    assert works["encoder"].atomics == 32 * 267 * 267 / roofline.ROW_ROWS and works["cross"].atomics == 0


def test_the_instructions_of_the_roofline_are_those_of_the_kernels() -> None:
    """Where a kernel changes: python kernels/bench.py --roofline --json > kernels/instructions.json"""
    import roofline

    result = run("--instructions", "--json", "--arch", "sm_90", "--only", "gelu + layer norm backward, ")
    now = json.loads(result.stdout)["each"]
    assert len(now) == 2
    for name, each in now.items():
        assert roofline.counted()[name] == pytest.approx(each, rel=0.05), name

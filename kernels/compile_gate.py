"""What Triton's own compiler and ptxas make of every kernel, for GPUs that need not be there.

`python kernels/bench.py --compile` builds each kernel, head dim or width, dtype and architecture, and fails on a
spilled byte, on more shared memory than a block has, and on a product without tensor cores; ALLOWED_STACK lists
exceptions.
`--instructions` counts the machine code of each kernel's main loop beside what it was before (BASELINE).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ofa_kernels._launch import INTERPRET_VARIABLE, CompileCase

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that one block may have."""
REGISTERS, WARPS = 65536, 64
"""Of a streaming multiprocessor: registers in its file, warps that fit."""
ALLOWED_STACK: dict[tuple[str, int, str], int] = {
    ("attention keys, encoder", 80, "sm_80"): 56,
    ("attention keys, decoder", 80, "sm_80"): 88,
    ("attention keys, encoder", 80, "sm_90"): 16,
    ("attention keys, decoder", 80, "sm_90"): 48,
}
"""(kernel, size, arch) -> bytes of stack per thread that are accepted, where half the step takes PAYS times as many
instructions a pair, the spills' own counted."""
PAYS = 1.15
MOST_INSTRUCTIONS = {"layer norm forward": 25, "layer norm backward": 28, "add + drop + layer norm forward": 45,
                     "add + drop + layer norm backward": 47, "gelu + layer norm forward": 34,
                     "gelu + layer norm backward": 46, "gelu + layer norm backward, rows": 40,
                     "gelu + layer norm backward, weights": 24}  # fmt: skip
"""Of a norm's main loop, for an element: above about 34 forward and 51 backward an H100 waits for them, not for memory
(128 thread instructions a clock beside 15 bytes; an element is 4 and 6)."""
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    kernel: str
    size_name: str
    size: int
    dtype: str
    arch: str
    registers: int
    """Per thread."""
    spill_bytes: int
    """Per thread, stores and loads."""
    stack_bytes: int
    shared_bytes: int
    """Per block."""
    warps: int
    """Resident on a multiprocessor at most, of 64."""
    tensor_instructions: int
    """Matrix instructions in the machine code."""
    loop_instructions: int
    """That a warp issues in one round of the main loop; of the whole kernel where it has no loop."""
    instructions_each: float
    """Thread instructions for one pair of a query and a key, or one element; 0 where a case does not say its work."""
    wants_tensor_cores: bool
    half_step_each: float = 0.0
    """Thread instructions for one pair with half the step, where there is a stack."""

    def faults(self) -> list[str]:
        allowed = ALLOWED_STACK.get((self.kernel, self.size, self.arch), 0)
        found = []
        if self.stack_bytes > allowed or self.spill_bytes and not allowed:
            found.append(f"{self.stack_bytes} bytes of stack, {self.spill_bytes} spilled; allowed {allowed}")
        if 0 < self.stack_bytes <= allowed and self.half_step_each < PAYS * self.instructions_each:
            found.append(f"a stack for {self.instructions_each} instructions a pair; {self.half_step_each} without one")
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory, a block has {SHARED_LIMIT[self.arch]}")
        if self.wants_tensor_cores and not self.tensor_instructions:
            found.append("no tensor-core instruction")
        most = MOST_INSTRUCTIONS.get(self.kernel, self.instructions_each)
        if self.instructions_each > most:
            found.append(f"{self.instructions_each} instructions an element, at most {most}")
        return found

    def row(self) -> dict[str, object]:
        """The machine-readable form."""
        values = dataclasses.asdict(self)
        values[values.pop("size_name")] = values.pop("size")
        del values["wants_tensor_cores"]
        return values


@functools.cache
def compile_cases(every: bool, arch: str) -> list[CompileCase]:
    """every: attention at head dims that no preset has, too. arch: "sm_80"; some kernels take other steps elsewhere."""
    from ofa_kernels import attention_row_triton, attention_triton, cross_entropy_triton, layer_norm_triton

    cases = attention_triton.compile_cases(every, int(arch[3:]))
    cases += attention_row_triton.compile_cases(tuple(dict.fromkeys(case.size for case in cases)))
    return cases + layer_norm_triton.compile_cases() + cross_entropy_triton.compile_cases()


def compile_one(every: bool, index: int, arch: str) -> Compiled:
    """Build case `index` of `compile_cases(every, arch)`."""
    case = compile_cases(every, arch)[index]
    built = compile_case(case, arch)
    if not built.stack_bytes or "STEP" not in case.constants:
        return built
    half = dataclasses.replace(case, constants=case.constants | {"STEP": case.constants["STEP"] // 2})
    fewer = compile_case(dataclasses.replace(half, work=case.work // 2), arch)
    return dataclasses.replace(built, half_step_each=fewer.instructions_each)


def compile_case(case: CompileCase, arch: str) -> Compiled:
    """Build it and read what ptxas made of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.function.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.arguments[name].replace("*x", f"*{_DTYPES[case.dtype]}")
        for name in names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in case.constants
        and (signature[name].startswith("*") and name not in case.unaligned or name in case.aligned)
    }
    source = ASTSource(case.function, signature, case.constants, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)
    registers, stack, spill, code = _inspect(built.asm["cubin"])
    shared = built.metadata.shared
    loop = main_loop(code)
    per_warp = -(-registers * 32 // 256) * 256
    fits = (REGISTERS // (per_warp * case.num_warps), SHARED_LIMIT[arch] // (shared + 1024), WARPS // case.num_warps)
    return Compiled(
        kernel=case.kernel,
        size_name="head_dim" if case.kernel.startswith("attention") else "width",
        size=case.size,
        dtype=_DTYPES[case.dtype],
        arch=arch,
        registers=registers,
        spill_bytes=spill,
        stack_bytes=stack,
        shared_bytes=shared,
        warps=min(fits) * case.num_warps,
        tensor_instructions=len(re.findall(r"\b[HQ]G?MMA\b", code)),
        loop_instructions=loop,
        instructions_each=round(loop * 32 * case.num_warps / case.work, 2) if case.work else 0.0,
        wants_tensor_cores=case.tensor_cores,
    )


def _inspect(cubin: bytes) -> tuple[int, int, int, str]:
    """(registers, stack bytes, spilled bytes, machine code) of the one kernel in a cubin.

    A spill is a local-memory access in the machine code (STL, LDL): ptxas' own count is not in the cubin.
    """
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    sizes = [int(size or 32) // 8 for size in re.findall(r"\b(?:STL|LDL)(?:\.(?:LU\.)?(\d+))?\b", code)]
    return registers, stack, sum(sizes), code


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[\dT]\s+)?([A-Z][\w.]*)\s*([^;]*);")


def main_loop(code: str) -> int:
    """Instructions of the loop with most of them, nested ones counted once; of the whole kernel where there is none.

    code: what cuobjdump prints. A loop is a branch backwards; the branch to itself behind each kernel is none. A branch
    over a part of the loop (ptxas' own, around a masked load) is counted as not taken.
    """
    found = [(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(code)]
    loops, last = [], 0
    for address, name, rest in found:
        target = re.search(r"\b0x([0-9a-f]+)\b", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            start = int(target[1], 16)
            loops.append(sum(start <= each <= address for each, _, _ in found))
        if name == "EXIT":
            last = address
    return max(loops, default=sum(address <= last for address, _, _ in found))


def compile_all(every: bool, archs: Sequence[str], only: str, workers: int, dtype: str = "") -> Iterable[Compiled]:
    """In the order of the table; built in parallel. Ctrl-C stops the builds that have not begun. dtype: "" for all."""
    wanted = [
        (every, i, arch)
        for arch in archs
        for i, case in enumerate(compile_cases(every, arch))
        if only in case.kernel and dtype in _DTYPES[case.dtype]
    ]
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(compile_one, *each) for each in wanted]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


HEADER = f"| {'kernel':34} | size | dtype | arch | registers | spilled B | stack B | shared KiB | warps of 64 |"


def table_row(built: Compiled) -> str:
    shared = f"{built.shared_bytes / 1024:.1f}"
    return (
        f"| {built.kernel:34} | {built.size} | {built.dtype} | {built.arch} | {built.registers} | "
        f"{built.spill_bytes} | {built.stack_bytes} | {shared} | {built.warps} |"
    )


def run_compile(options: argparse.Namespace) -> int:
    if os.environ.get(INTERPRET_VARIABLE, "0") not in ("", "0"):
        raise SystemExit(f"bench: {INTERPRET_VARIABLE} is set; compiling needs it unset")
    if not options.json:
        print(HEADER)
        print("|" + "---|" * (HEADER.count("|") - 1))
    results, faults = [], []
    for built in compile_all(options.every, options.arch, options.only, options.workers):
        results.append(built)
        faults += [f"{built.kernel} {built.size} {built.dtype} {built.arch}: {fault}" for fault in built.faults()]
        if not options.json:
            print(table_row(built), flush=True)
    if options.json:
        print(json.dumps([built.row() for built in results]))
    for fault in faults:
        print(f"bench: {fault}", file=sys.stderr)
    print(f"bench: {len(results)} kernels compiled, {len(faults)} faults", file=sys.stderr)
    return 1 if faults or not results else 0


BASELINE = Path(__file__).parent / "instructions_before.json"
"""{"made": how, "each": {"kernel, size, arch": instructions for a pair or element, in bf16}}."""


def run_instructions(options: argparse.Namespace) -> int:
    """Print the table; --json prints what BASELINE holds, for a new one."""
    now = {
        f"{built.kernel}, {built.size}, {built.arch}": built.instructions_each
        for built in compile_all(options.every, options.arch, options.only, options.workers, "bf16")
        if built.instructions_each
    }
    if options.json:
        print(json.dumps({"made": "python kernels/bench.py --instructions --json", "each": now}, indent=1))
        return 0
    before = json.loads(BASELINE.read_text())["each"]
    print(f"| {'kernel, size, architecture':50} | before | now | change |\n|---|---|---|---|")
    for name, each in now.items():
        was = before.get(name)
        print(f"| {name:50} | {was or ''} | {each} | {f'{each / was - 1:+.0%}' if was else ''} |")
    return 0

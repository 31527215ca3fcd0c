"""Time every kernel beside the alternatives; compile it for GPUs that need not be there; say what it takes at best.

    python kernels/bench.py [--json]                    on a GPU
    python kernels/bench.py --roofline
    python kernels/bench.py --compile [--every] [--json] [--arch sm_80 sm_90] [--only NAME]

--compile builds each kernel, head dim or width, dtype and architecture with Triton's own ptxas, and fails on a spilled
byte, on more shared memory than a block has, and on a product without tensor cores. ALLOWED_STACK lists exceptions.
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
ALLOWED_STACK: dict[tuple[str, int, str], int] = {}
"""(kernel, size, arch) -> bytes of stack per thread that were measured and accepted; kernels/README.md says why."""
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
    wants_tensor_cores: bool

    def faults(self) -> list[str]:
        allowed = ALLOWED_STACK.get((self.kernel, self.size, self.arch), 0)
        found = []
        if self.stack_bytes > allowed or self.spill_bytes and not allowed:
            found.append(f"{self.stack_bytes} bytes of stack, {self.spill_bytes} spilled; allowed {allowed}")
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory, a block has {SHARED_LIMIT[self.arch]}")
        if self.wants_tensor_cores and not self.tensor_instructions:
            found.append("no tensor-core instruction")
        return found

    def row(self) -> dict[str, object]:
        """The machine-readable form."""
        values = dataclasses.asdict(self)
        values[values.pop("size_name")] = values.pop("size")
        del values["wants_tensor_cores"]
        return values


@functools.cache
def compile_cases(every: bool) -> list[CompileCase]:
    """every: attention at head dims that no preset has, too."""
    from ofa_kernels import attention_triton, cross_entropy_triton, layer_norm_triton

    cases = attention_triton.compile_cases(every)
    return cases + layer_norm_triton.compile_cases() + cross_entropy_triton.compile_cases()


def compile_one(every: bool, index: int, arch: str) -> Compiled:
    """Build case `index` of `compile_cases(every)` for `arch` and read what ptxas made of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = compile_cases(every)[index]
    names = case.function.arg_names
    signature = {
        name: "constexpr" if name in case.constants else case.arguments[name].replace("*x", f"*{_DTYPES[case.dtype]}")
        for name in names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in case.constants and (signature[name].startswith("*") or name in case.aligned)
    }
    source = ASTSource(case.function, signature, case.constants, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)
    registers, stack, spill, code = _inspect(built.asm["cubin"])
    shared = built.metadata.shared
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


def compile_all(every: bool, archs: Sequence[str], only: str, workers: int) -> Iterable[Compiled]:
    """In the order of the table; built in parallel. Ctrl-C stops the builds that have not begun."""
    cases = enumerate(compile_cases(every))
    wanted = [(every, i, arch) for i, case in cases for arch in archs if only in case.kernel]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=__doc__, formatter_class=_Help)
    parser.add_argument("--compile", action="store_true", help="compile every kernel for --arch; needs no GPU")
    parser.add_argument("--every", action="store_true", help="attention at head dims that no preset has, too")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument("--arch", nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose name contains NAME")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--roofline", action="store_true", help="print what each kernel takes at best, by arithmetic")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where speed is measured")
    parser.add_argument("--small", action="store_true", help="speed at tiny shapes: whether all of it runs")
    options = parser.parse_args()
    if options.roofline:
        from roofline import print_table

        print_table()
        return 0
    if options.compile:
        return run_compile(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("speed is measured on a GPU and torch finds none; --compile and --roofline need none")
    import speed

    results = speed.run(options.device, options.small)
    print(json.dumps(speed.rows(results)) if options.json else speed.table(results))
    return 0


class _Help(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main())

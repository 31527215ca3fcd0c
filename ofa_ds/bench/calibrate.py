"""`ofa-ds bench step|memory|io`: measures this machine, for `ofa-ds plan --calibration FILE`.

Seconds and kept bytes of a model's pieces on one thread of the CPU, then what DeepSpeed and gloo add to them, from real
training steps of nano and tiny on 1 ... R ranks; what else a process holds, from runs of their own, since a peak is of
a process. Of a GPU: `ofa_ds.bench.gpu_rates`.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ofa_ds.bench.pieces import fit, measure_pieces
from ofa_ds.bench.ranks_case import SHIPPED, Case, Rows, measure
from ofa_ds.bench.step import matmul_rate, progress
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.model.products import linear
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.cpu import counts, memory_parts, step_parts
from ofa_ds.plan.layout import Layout

STAGES = (0, 1, 2, 3)
SMALL = (Rows(count=1, side=64, source=8, target=4),)
PAIR = (Rows(count=2, side=256, source=32, target=16),)
SMALL_VOCAB = 4096
ADAM_ELEMENTS = 20_000_000
IO_BYTES = 1 << 30


def step_cases(ranks: int) -> list[Case]:
    """Of one launch, from which what is around the pieces is fitted."""
    return [
        case
        for stage in STAGES
        for case in (
            Case(model="nano", vocab=SMALL_VOCAB, rows=SMALL, stage=stage, ranks=ranks, steps=4),
            Case(model="tiny", rows=SMALL, stage=stage, ranks=ranks),
            Case(model="tiny", rows=PAIR, stage=stage, ranks=ranks),
        )
    ]


def memory_cases(ranks: int) -> list[Case]:
    """Each in a launch of its own: models whose parameters and vocabularies differ by other factors."""
    return [
        case
        for stage in STAGES
        for case in (
            Case(model="nano", vocab=SMALL_VOCAB, rows=SMALL, stage=stage, ranks=ranks, steps=2),
            Case(model="tiny", rows=SMALL, stage=stage, ranks=ranks, steps=2),
            Case(model="medium", vocab=SMALL_VOCAB, rows=SMALL, stage=stage, ranks=ranks, steps=2),
        )
    ]


def layout_of_case(case: Case) -> Layout:
    name = SHIPPED[case.stage]
    return case.layout(load_deepspeed_config(name) if name else {"zero_optimization": {"stage": 0}})


def blank() -> Calibration:
    """Of this machine, with nothing measured."""
    on_gpu = torch.cuda.is_available()
    return Calibration(
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        machine=f"{_processor()}, {os.cpu_count()} cores",
        date=datetime.date.today().isoformat(),
        software=f"python {platform.python_version()}, torch {torch.__version__}",
        dtype="bf16" if on_gpu else "fp32",
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def bench_step(ranks: Sequence[int]) -> Calibration:
    """Costs of this CPU's steps. ranks: how many at once, each measured."""
    costs, sizes = measure_pieces()
    costs["optimizer"] = [_adam_s()]
    calibration = _with(blank(), costs=costs, sizes=sizes, peak_flops=_peak_flops())
    for world in ranks:
        progress(f"{len(STAGES)} stages on {world} ranks")
        cases = step_cases(world)
        calibration = with_ranks(calibration, world, cases, measure(cases))
    progress("")
    return calibration


def with_ranks(
    calibration: Calibration, world: int, cases: Sequence[Case], found: Sequence[dict[str, Any]]
) -> Calibration:
    """Fits what is around the pieces: a factor below stage 3 and one of it, and two costs of each stage."""
    nothing = {f"ranks.{world}": [1.0, 1.0], **{f"zero{stage}.{world}": [0.0, 0.0] for stage in STAGES}}
    bare = _with(calibration, costs=nothing)
    features, seconds = [], []
    for case, result in zip(cases, found, strict=True):
        parts = step_parts(case.config, case.work(), layout_of_case(case), bare, case.accumulation)
        elements, tensors = counts(case.config)
        own = [0.0] * (2 * len(STAGES))
        own[2 * case.stage], own[2 * case.stage + 1] = tensors, elements
        known = parts.pop("optimizer")
        whole = sum(parts.values())
        features.append([whole * (case.stage < 3), whole * (case.stage == 3), *own])
        seconds.append(max(result["step_s"] - known, 1e-3))
    factors = fit(features, seconds)
    costs = {f"ranks.{world}": factors[:2]}
    for n, stage in enumerate(STAGES):
        costs[f"zero{stage}.{world}"] = factors[2 + 2 * n : 4 + 2 * n]
    return _with(calibration, costs=costs)


def bench_memory(calibration: Calibration, ranks: Sequence[int]) -> Calibration:
    """What processes hold beside what arithmetic says; `calibration` has the pieces' kept bytes. Minutes."""
    for world in ranks:
        found = []
        cases = memory_cases(world)
        for number, case in enumerate(cases, 1):
            progress(f"memory of {world} ranks: {number} of {len(cases)}")
            found += measure([case], mapped=True)
        calibration = with_memory(calibration, world, cases, found)
    progress("")
    return calibration


def with_memory(
    calibration: Calibration, world: int, cases: Sequence[Case], found: Sequence[dict[str, Any]]
) -> Calibration:
    """What a process is, and what is not arithmetic: of each stage a constant, so many times the parameters' bytes, and
    so many vocabulary matrices.
    """
    process = min([result["joined_bytes"] for result in found] + calibration.sizes.get("process", []))
    sizes = {"process": [float(process)]}
    for stage in STAGES:
        nothing = _with(calibration, sizes={"process": [float(process)], f"zero{stage}.{world}": [0.0] * 3})
        rows, rest = [], []
        for case, result in zip(cases, found, strict=True):
            if case.stage == stage:
                known = memory_parts(case.config, case.work(), layout_of_case(case), nothing)
                elements, _ = counts(case.config)
                rows.append((1.0, elements * 4.0, case.config.vocab_size * case.config.dim * 4.0))
                rest.append(max(result["peak_bytes"] - sum(known.values()), 1e6))
        if rows:
            sizes[f"zero{stage}.{world}"] = fit(rows, rest)
    return _with(calibration, sizes=sizes)


def bench_io(folder: Path | None) -> Calibration:
    """Bytes/s of memory, and of a file in `folder` (else a temporary one), written through to the disk and read."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source))
    bandwidths = {"memory": 2 * source.nbytes / copy_s}
    with tempfile.TemporaryDirectory(prefix="ofa_ds_bench_", dir=folder) as place:
        path, block = Path(place) / "block", bytes(64 << 20)
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(IO_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        bandwidths["write"] = IO_BYTES / (time.perf_counter() - began)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while file.read(len(block)):
                pass
        bandwidths["read"] = IO_BYTES / (time.perf_counter() - began)
    return _with(blank(), bandwidths=bandwidths)


def _peak_flops() -> float:
    """FLOP/s of one thread's fastest product: torch's own, or oneDNN's as the model's layers use it."""
    with torch.no_grad():
        x, weight = torch.randn(2048, 1024), torch.randn(1024, 1024)
        seconds = _best(lambda: linear(x, weight))
    return max(matmul_rate() * 1e9, 2 * 2048 * 1024 * 1024 / seconds)


def _adam_s() -> float:
    """Seconds an element of torch's fused AdamW."""
    weight = torch.nn.Parameter(torch.zeros(ADAM_ELEMENTS))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    return statistics.median(_seconds(optimizer.step) for _ in range(5)) / ADAM_ELEMENTS


def _seconds(action: Any) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _best(action: Any) -> float:
    return min(_seconds(action) for _ in range(6))


def _with(calibration: Calibration, **more: Any) -> Calibration:
    changed = {name: getattr(calibration, name) for name in ("device", "machine", "date", "software", "dtype")}
    return calibration.merged(Calibration(**changed, **more))

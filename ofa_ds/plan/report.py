"""A forecast for a person, in lines, and for a program, as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ofa_ds.plan.advice import Advice
from ofa_ds.plan.forecast import DAY_S, Cost, Forecast
from ofa_ds.plan.step_time import StepTime

VERSION = 1
"""Of the JSON. Raised where a key goes or changes its meaning; new keys may come."""
GIB = 2**30
SHOWN = 5
"""Pieces of advice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """How often to save, to first order (docs/cluster.md, `Goodput`)."""

    interval_s: float
    every_steps: int
    stall_s: float
    write_s: float
    waste: float
    """Share of the time that failures and saves cost."""
    failure_s: float
    """Seconds from one failure of the cluster to the next; inf: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    planned: Forecast
    step: StepTime
    cost: Cost
    saving: Saving | None
    advice: list[Advice]
    notes: tuple[str, ...]
    """What was assumed, in words."""


def lines(report: Report) -> Iterator[str]:
    """For a person."""
    planned, step = report.planned, report.step
    yield from _what(planned)
    gpu = planned.cluster.gpu
    if planned.memory.gpu:
        title = f"memory of one {gpu.name}, at its peak ({planned.memory.phase})"
        yield from _bytes(title, planned.memory.gpu, gpu.memory_bytes)
    yield from _bytes("memory of a host", planned.memory.host, planned.cluster.host_bytes)
    yield from _bytes("NVMe of a host", planned.memory.nvme, planned.cluster.nvme_bytes)
    yield from _verdict(report)
    decimals = 1 if step.total_s >= 0.1 else 3
    yield from _table("time of a step", time_parts(step), 1e-3, "ms", decimals, _between(step, decimals))
    yield from _speed(planned, step)
    yield from _cost(report.cost)
    yield from _saving(planned, report.saving)
    yield from (f"note: {note}" for note in report.notes)


def _what(planned: Forecast) -> Iterator[str]:
    run, layout, cluster, work = planned.run, planned.layout, planned.cluster, planned.work
    network = f", {cluster.network.name}" if cluster.network is not None and cluster.hosts > 1 else ""
    kind = "ranks on cpu" if cluster.gpu.name == "cpu" else cluster.gpu.name
    hosts = f"{cluster.hosts} host{'s' if cluster.hosts > 1 else ''}"
    yield f"{run.name}: {planned.parameters:,} parameters on {hosts} x {cluster.ranks_per_host} {kind}{network}"
    extras = [f"hpZ {layout.hpz}"] if layout.hpz > 1 else []
    extras += ["quantised weights"] if layout.qwz else []
    extras += ["quantised gradients"] if layout.qgz else []
    extras += [f"optimizer on {layout.offload_optimizer}"] if layout.offload_optimizer != "none" else []
    extras += [f"weights on {layout.offload_param}"] if layout.offload_param != "none" else []
    extras += ["activation checkpointing"] if run.model.activation_checkpointing else []
    yield f"ZeRO {layout.stage} ({', '.join([run.recipe.deepspeed, layout.precision, *extras])})"
    batch = run.recipe.batch
    pictures = sum(each.count for each in work.images)
    yield (
        f"a step: {batch.global_rows:,} rows = {planned.accumulation} x {batch.micro_rows} rows on {cluster.world:,} "
        f"rank{'s' if cluster.world > 1 else ''}; a micro-batch: {work.num_examples:g} examples, {pictures:g} "
        f"pictures, {work.encoder_tokens:,.0f} + {work.decoder_tokens:,.0f} tokens"
    )


def _bytes(title: str, parts: Mapping[str, float], had: float) -> Iterator[str]:
    unit, name = (GIB, "GiB") if sum(parts.values()) >= GIB else (GIB / 1024, "MiB")
    yield from _table(title, parts, unit, name, 2 if unit == GIB else 1, f"of {had / unit:,.1f}")


def _table(title: str, parts: Mapping[str, float], unit: float, name: str, decimals: int, after: str) -> Iterator[str]:
    if not parts:
        return
    total = sum(parts.values())
    yield ""
    yield f"{title:<44}{name:>10}"
    for part, value in sorted(parts.items(), key=lambda each: -each[1]):
        if value:
            yield f"  {part:<42}{value / unit:>10,.{decimals}f}{value / (total or 1):>7.1%}"
    yield f"  {'total':<42}{total / unit:>10,.{decimals}f}  {after}"


def time_parts(step: StepTime) -> dict[str, float]:
    """Of a step, what adds up to its length."""
    parts = {
        **step.compute_s,
        "communication not hidden": step.exposed_s,
        "waiting for data": step.data_s,
        "stall of checkpoints": step.checkpoint_s,
    }
    rest = step.total_s - sum(parts.values())
    if abs(rest) > 1e-3 * step.total_s:
        parts["other"] = rest
    return parts


def _between(step: StepTime, decimals: int) -> str:
    return f"({step.low_s * 1e3:,.{decimals}f} to {step.high_s * 1e3:,.{decimals}f})"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _verdict(report: Report) -> Iterator[str]:
    planned = report.planned
    yield ""
    if planned.fits:
        gpu = planned.cluster.gpu
        spare = gpu.memory_bytes - planned.memory.gpu_total if planned.memory.gpu else 0.0
        yield f"fits: {spare / GIB:.1f} GiB of a GPU to spare" if spare else "fits"
        return
    for place, (wanted, had) in planned.shortages.items():
        yield f"does not fit: wants {wanted / GIB:,.1f} GiB of a {place}, which has {had / GIB:,.1f}"
    if not report.advice:
        return
    yield "what fits, the cheapest first (GPU-seconds of a step):"
    for each in report.advice[:SHOWN]:
        there = each.planned
        yield (
            f"  {each.gpu_seconds:>12,.1f}  {' '.join(each.changes)}: {there.memory.gpu_total / GIB:.1f} GiB a GPU, "
            f"{each.step_s:,.2f} s a step"
        )


def _speed(planned: Forecast, step: StepTime) -> Iterator[str]:
    if step.communication_s:
        hidden = max(step.communication_s - step.exposed_s, 0.0)  # in one module's time, to rounding
        yield f"sent for {step.communication_s * 1e3:,.1f} ms a step, {hidden * 1e3:,.1f} of them while computing"
    seconds, low, high = step.total_s, step.low_s, step.high_s
    if step.mfu:
        peak = f"of {planned.cluster.gpu.peak_flops / 1e12:,.4g} TFLOP/s"
        least, most = step.mfu * seconds / high, step.mfu * seconds / low
        yield (
            f"MFU {step.mfu:.1%} ({least:.1%} to {most:.1%}), HFU {step.hfu:.1%} {peak}; "
            f"{_rate(step.useful_flops / 1e12)} TFLOP useful, {_rate(step.executed_flops / 1e12)} executed a step and "
            "rank"
        )
    tasks = {name: rate for name, rate in step.examples_per_s.items() if name}
    of_tasks = f" ({', '.join(f'{name} {_rate(rate)}' for name, rate in tasks.items())})" if len(tasks) > 1 else ""
    yield f"{step.tokens_per_s:,.0f} tokens/s, {_rate(sum(step.examples_per_s.values()))} examples/s{of_tasks}"
    yield from _feeding(planned, step)


def _feeding(planned: Forecast, step: StepTime) -> Iterator[str]:
    feed = planned.feed
    if feed is None:
        return
    per_step = sum(step.examples_per_s.values()) * step.total_s / planned.cluster.world
    busy, source = feed.cores(step.total_s - step.data_s), "measured" if feed.is_measured else "assumed"
    text = f"data: {_rate(per_step / feed.core_s)} examples/s of a core ({source}), a rank keeps {busy:.2g} cores busy"
    if not step.data_s:
        yield f"{text}, data.workers={feed.workers} could feed {_rate(feed.workers / busy)} times as much"
    else:
        yield f"{text}; with data.workers={feed.workers} it waits for them, {math.ceil(busy)} would do"


def _cost(cost: Cost) -> Iterator[str]:
    if not cost.steps:
        return
    low, middle, high = (each / DAY_S for each in cost.seconds)
    hours = f"{cost.gpu_hours[1]:,.0f} {'GPU' if cost.energy_kwh[1] else 'rank'}-hours"
    text = f"{cost.steps:,} steps: {middle:,.3g} days ({low:,.3g} to {high:,.3g}), {hours}"
    if cost.energy_kwh[1]:
        text += f", {cost.energy_kwh[1]:,.0f} kWh of the GPUs at their limit"
    if cost.price is not None:
        text += f", price {cost.price[1]:,.0f} ({cost.price[0]:,.0f} to {cost.price[2]:,.0f})"
    yield text


def _saving(planned: Forecast, saving: Saving | None) -> Iterator[str]:
    text = f"a checkpoint: {planned.checkpoint_bytes / 1e9:,.1f} GB"
    if saving is None:
        yield text
    else:
        yield (
            f"{text}, {saving.stall_s:.2g} s of stall, whole after {saving.write_s:,.0f} s; save every "
            f"{saving.interval_s:,.0f} s (train.save_every={saving.every_steps}): failures and saves cost "
            f"{saving.waste:.2%}"
        )


def as_dict(report: Report) -> dict[str, Any]:
    """For JSON. Bytes, seconds, FLOPs of one rank's step; nothing is NaN or infinite."""
    planned, step, cluster = report.planned, report.step, report.planned.cluster
    flops = planned.flops()
    modules: Counter[str] = Counter()
    for module in flops.modules:
        modules[module.name] += planned.accumulation * (module.forward + module.backward)
    saving = None if report.saving is None else asdict(report.saving)
    if saving and saving["failure_s"] == float("inf"):
        saving["failure_s"] = None
    return {
        "version": VERSION,
        "recipe": planned.run.name,
        "parameters": planned.parameters,
        "cluster": {
            "hosts": cluster.hosts, "gpus_per_host": cluster.ranks_per_host, "gpu": cluster.gpu.name,
            "network": cluster.network.name if cluster.network is not None else None,
        },
        "layout": asdict(planned.layout),
        "batch": {
            "global_rows": planned.run.recipe.batch.global_rows, "micro_rows": planned.run.recipe.batch.micro_rows,
            "accumulation": planned.accumulation, "examples": planned.work.num_examples,
            "encoder_tokens": planned.work.encoder_tokens, "decoder_tokens": planned.work.decoder_tokens,
        },
        "memory": {
            "gpu": planned.memory.gpu, "gpu_total": planned.memory.gpu_total,
            "gpu_capacity": _finite(cluster.gpu.memory_bytes), "host": planned.memory.host,
            "host_total": planned.memory.host_total, "host_capacity": _finite(cluster.host_bytes),
            "nvme": planned.memory.nvme, "nvme_total": planned.memory.nvme_total,
            "nvme_capacity": _finite(cluster.nvme_bytes),
        },
        "fits": planned.fits,
        "advice": [_advice(each) for each in report.advice],
        "calibration": _calibration(planned),
        "checkpoint_bytes": planned.checkpoint_bytes,
        "step": {**{name: getattr(step, name) for name in step.__slots__}, "parts_s": time_parts(step)},
        "feed": None if planned.feed is None else asdict(planned.feed),
        "useful_flops_by_module": dict(modules),
        "cost": asdict(report.cost),
        "saving": saving,
        "notes": list(report.notes),
    }  # fmt: skip


def _advice(advice: Advice) -> dict[str, Any]:
    planned = advice.planned
    return {
        "changes": list(advice.changes), "gpu_seconds": advice.gpu_seconds, "step_s": advice.step_s,
        "hosts": planned.cluster.hosts, "micro_rows": planned.run.recipe.batch.micro_rows,
        "activation_checkpointing": planned.run.model.activation_checkpointing, "deepspeed": advice.deepspeed_name,
        "gpu_total": planned.memory.gpu_total, "host_total": planned.memory.host_total,
    }  # fmt: skip


def _calibration(planned: Forecast) -> dict[str, str] | None:
    found = planned.calibration
    return None if found is None else {name: getattr(found, name) for name in ("device", "machine", "date", "software")}


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None

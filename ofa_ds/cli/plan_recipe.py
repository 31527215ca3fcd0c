"""`ofa-ds plan RECIPE`: reads what is asked for, plans it, and prints, draws or writes what comes out."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ofa_ds.cli.parser import UsageError, recipe_of

if TYPE_CHECKING:
    from ofa_ds.config import Recipe
    from ofa_ds.plan.calibration import Calibration
    from ofa_ds.plan.forecast import Cluster, Forecast, Run
    from ofa_ds.plan.report import Report, Saving

UNFIT = 1
"""Exit code where the recipe does not fit, and no changed one was asked for."""


def plan_recipe(options: argparse.Namespace) -> int:
    """Raises UsageError, one line."""
    from ofa_ds.plan.report import as_dict, lines

    try:
        report = _report(options)
        if options.png:
            from ofa_ds.plan.picture import draw

            draw(report, options.png)
        if options.write_recipe:  # last: it is not overwritten when the command is given again
            _write(options, report)
    except ValueError as error:
        raise UsageError(error) from error
    if options.json:
        print(json.dumps(as_dict(report), allow_nan=False))
    else:
        for line in lines(report):
            print(line)
        for name, path in (("picture", options.png), ("recipe", options.write_recipe)):
            if path:
                print(f"{name}: {path}")
    return 0 if report.planned.fits or options.write_recipe else UNFIT


def _report(options: argparse.Namespace) -> Report:
    from ofa_ds.engine.config import shipped_configs
    from ofa_ds.plan.advice import advise, without_checkpointing
    from ofa_ds.plan.forecast import cost, forecast
    from ofa_ds.plan.report import Report

    calibration = calibration_of(options)
    cluster = cluster_of(options, calibration)
    run, notes = run_of(options)
    planned = forecast(run, cluster, calibration)
    advice = [] if planned.fits else advise(planned, shipped_configs())
    if not planned.fits and not advice:
        raise ValueError(_nowhere(planned))
    step = planned.step()
    steps, more = _steps(options, run.recipe)
    if planned.fits and (faster := without_checkpointing(planned)):
        held, seconds = faster.planned.memory, faster.step_s
        place = f"{held.gpu_total / 2**30:.1f} GiB a GPU" if held.gpu else f"{held.host_total / 2**30:.1f} GiB"
        more = (*more, f"{' '.join(faster.changes)} fits too: {place}, {seconds * 1e3:,.1f} ms a step")
    if planned.cpu is not None:
        under = f"host memory: within {planned.cpu.bytes_error:.0%}, if MALLOC_MMAP_THRESHOLD_=1048576 is set"
        more = (*more, under)
    return Report(
        planned=planned, step=step, advice=advice, notes=(*notes, *more),
        saving=_saving(options, planned, step.total_s),
        cost=cost(planned, step, steps=steps, price_per_gpu_hour=options.price_per_gpu_hour),
    )  # fmt: skip


def _nowhere(planned: Forecast) -> str:
    from ofa_ds.engine.config import shipped_configs
    from ofa_ds.plan.advice import MAX_HOSTS, least

    near = least(planned, shipped_configs())
    wants = " and ".join(
        f"{wanted / 2**30:,.1f} GiB of a {place} that has {had / 2**30:,.1f}"
        for place, (wanted, had) in near.shortages.items()
    )
    cluster, rows = planned.cluster, planned.run.recipe.batch.global_rows
    if planned.cpu is not None:
        return (
            f"{planned.run.name}: it does not fit on {cluster.ranks_per_host} ranks of this host, whatever else is "
            f"changed; the least wants {wants}; take fewer ranks (--gpus-per-host), a smaller model.preset or smaller "
            "pictures"
        )
    several = f"{cluster.hosts} to {MAX_HOSTS}" if cluster.hosts < MAX_HOSTS else f"{cluster.hosts}"
    return (
        f"{planned.run.name}: with batch.global_rows={rows} it fits on no {several} hosts of "
        f"{cluster.ranks_per_host} {cluster.gpu.name}, whatever else is changed; on {cluster.hosts} the least wants "
        f"{wants}; take a larger GPU, a smaller model.preset or smaller pictures"
    )


def run_of(options: argparse.Namespace) -> tuple[Run, tuple[str, ...]]:
    from ofa_ds.cluster.check_recipe import check_sense
    from ofa_ds.engine.config import load_deepspeed_config
    from ofa_ds.model.config import model_config
    from ofa_ds.plan.forecast import Run

    recipe = recipe_of(options.recipe, options.set)
    size, notes = _vocabulary(recipe)
    check_sense(recipe)
    lengths = None
    if options.measure:
        from ofa_ds.cli.plan_data import measured_lengths

        lengths = measured_lengths(recipe, options.measure)
        notes = (*notes, f"lengths of texts: {lengths.about}")
    run = Run(
        name=options.recipe, recipe=recipe, model=model_config(recipe, size), lengths=lengths,
        deepspeed=load_deepspeed_config(recipe.deepspeed, nvme=True),
    )  # fmt: skip
    return run, notes if _runs(run) else (*notes, "offload to NVMe can be planned, but a run refuses it (docs/plan.md)")


def _vocabulary(recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    from ofa_ds.model.config import VOCAB_SIZE

    if recipe.data.vocab and Path(recipe.data.vocab).is_dir():
        from ofa_ds.data.vocab import load_vocab

        return load_vocab(recipe.data.vocab).size, ()
    missing = f"{recipe.data.vocab} is not here" if recipe.data.vocab else "the recipe has no data.vocab"
    return VOCAB_SIZE, (f"{missing}: OFA's vocabulary of {VOCAB_SIZE:,} is assumed",)


def _runs(run: Run) -> bool:
    """Whether a run takes the layout too."""
    zero = run.deepspeed.get("zero_optimization", {})
    return all(zero.get(key, {}).get("device") != "nvme" for key in ("offload_optimizer", "offload_param"))


def calibration_of(options: argparse.Namespace) -> Calibration | None:
    if options.calibration is None:
        return None
    from ofa_ds.plan.calibration import load_calibration
    from ofa_ds.plan.hardware import gpu_of_device

    found = load_calibration(options.calibration)
    if options.gpu and options.gpu.lower() not in (found.device, gpu_of_device(found.device)):
        raise ValueError(f"--calibration {options.calibration}: is of {found.device!r}, not of --gpu {options.gpu}")
    return found


def cluster_of(options: argparse.Namespace, calibration: Calibration | None) -> Cluster:
    from ofa_ds.plan.forecast import CPU, HOST_BYTES, NVME_BYTES, Cluster, this_host
    from ofa_ds.plan.hardware import DEFAULT_NETWORK, GPUS, gpu, network

    if not options.gpu:
        raise ValueError(f"want --gpu NAME: one of {', '.join(GPUS)}, cpu")
    if options.gpu == CPU:
        if options.hosts > 1 or options.network:
            raise ValueError("--gpu cpu plans the ranks of one host: leave --hosts and --network out")
        here, ranks = this_host(calibration), options.gpus_per_host or 1
        there = options.host_memory * 1e9 if options.host_memory else here.host_bytes
        return replace(here, ranks_per_host=ranks, host_bytes=there)
    found = gpu(options.gpu)
    return Cluster(
        hosts=options.hosts, ranks_per_host=options.gpus_per_host or 8, gpu=found,
        network=network(options.network or DEFAULT_NETWORK), nvme_bytes=NVME_BYTES[found.name],
        host_bytes=options.host_memory * 1e9 if options.host_memory else HOST_BYTES[found.name],
    )  # fmt: skip


def _steps(options: argparse.Namespace, recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    from ofa_ds.config.values import LARGEST_COUNT

    if options.steps:
        if options.steps > LARGEST_COUNT:
            raise ValueError(f"--steps: want at most {LARGEST_COUNT:,}")
        return options.steps, ()
    if recipe.train.num_epochs:
        return 0, ("train.num_epochs needs the data to say how many steps that is: give --steps N for days and price",)
    return recipe.train.num_steps, ()


def _saving(options: argparse.Namespace, planned: Forecast, step_s: float) -> Saving | None:
    """To first order; None on CPUs, of which there is no rate of failures."""
    if planned.cluster.gpu.name == "cpu":
        return None
    from ofa_ds.plan.goodput import LLAMA3_GPU_HOURS, Plan, first_order_interval, first_order_waste
    from ofa_ds.plan.report import Saving

    plan = Plan(
        gpus=planned.cluster.world, gpus_per_host=planned.cluster.ranks_per_host,
        gpu_hours=options.gpu_hours or LLAMA3_GPU_HOURS,
        stall_s=max(1.0, planned.stall_s) if options.stall is None else options.stall,
        write_s=planned.write_s if options.write is None else options.write,
        detect_s=options.detect, stop_s=options.stop, restart_s=options.restart,
    )  # fmt: skip
    interval_s = first_order_interval(plan)
    return Saving(
        interval_s=interval_s, every_steps=max(1, round(interval_s / step_s)), stall_s=plan.stall_s,
        write_s=plan.write_s, waste=first_order_waste(plan, interval_s), failure_s=plan.failure_s,
    )  # fmt: skip


def _write(options: argparse.Namespace, report: Report) -> None:
    """The recipe that fits, and DeepSpeed's JSON beside it where it is no shipped one. Raises ValueError."""
    from ofa_ds.config import load_recipe, shipped_recipes
    from ofa_ds.config.saved import recipe_as_change

    path = options.write_recipe
    if path.suffix != ".toml":
        raise ValueError(f"--write-recipe {path}: want a file name that ends in .toml")
    planned, name = report.planned, report.planned.run.recipe.deepspeed
    if report.advice:
        planned, name = report.advice[0].planned, report.advice[0].deepspeed_name
    texts = {}
    if name is None:
        beside = path.with_suffix(".deepspeed.json")
        texts[beside], name = json.dumps(planned.run.deepspeed, indent=2) + "\n", os.fspath(beside.resolve())
    what = f"changed: {', '.join(report.advice[0].changes)}" if report.advice else "nothing had to change"
    cluster = planned.cluster
    where = f"{cluster.hosts} x {cluster.ranks_per_host} {cluster.gpu.name}"
    base = options.recipe if options.recipe in shipped_recipes() else os.fspath(Path(options.recipe).resolve())
    changed = replace(planned.run.recipe, deepspeed=name)
    text = recipe_as_change(changed, base, base_recipe=load_recipe(base), comment=f"{where}, by ofa-ds plan; {what}")
    texts[path] = text
    for file in texts:
        if file.exists():
            raise ValueError(f"--write-recipe: {file} is there already; give another name")
        if not file.parent.is_dir():
            raise ValueError(f"--write-recipe: there is no directory {str(file.parent)!r}")
    for file, written in texts.items():
        file.write_text(written, encoding="utf-8")

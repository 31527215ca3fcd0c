"""`ofa-ds plan`: what a run will be like before it is one. Light: numpy comes with the command."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from ofa_ds.cli.parser import Commands, UsageError, command, drawing, natural, positive

if TYPE_CHECKING:
    from ofa_ds.plan.goodput import Plan, Search

MAX_RUNS = 1_000_000
DAY_S, HOUR_S = 86_400, 3_600


def add_plan(commands: Commands) -> None:
    """Add `plan`."""
    parser = command(
        commands, "plan", _plan,
        "How much of a cluster's time will be training where hosts fail, and how often to save; by simulated runs.",
        example="ofa-ds plan --goodput --gpus 256,1024 --step-seconds 6 --png goodput.png",
    )  # fmt: skip
    parser.add_argument("--goodput", action="store_true", required=True, help="what to plan; the only plan so far")
    parser.add_argument(
        "--gpus", type=_sizes, default=[256, 512, 1024], metavar="N,...", help="sizes of the cluster; else 256,512,1024"
    )
    parser.add_argument(
        "--gpu-hours", type=_above_zero, metavar="HOURS",
        help="GPU-hours from one failure to the next, inf for none; else Llama 3's 50,700",
    )  # fmt: skip
    parser.add_argument("--days", type=_finite, default=54.0, metavar="D", help="days of training without any loss")
    parser.add_argument(
        "--interval", type=_finite, metavar="S", help="seconds from save to save; else the best is sought"
    )
    parser.add_argument("--step-seconds", type=_finite, metavar="S", help="of a step: save_every is told as well")
    _add_constants(parser)
    parser.add_argument("--spares", type=natural, metavar="N", help="spare hosts; else there always is a replacement")
    parser.add_argument(
        "--host-loss",
        type=_from_zero,
        default=0.5,
        metavar="SHARE",
        help="with --spares: failures that take a host out",
    )
    parser.add_argument(
        "--repair-hours", type=_finite, default=24.0, metavar="H", help="with --spares: until such a host is back"
    )
    parser.add_argument("--gpus-per-host", type=positive, default=8, metavar="N", help="with --spares")
    parser.add_argument("--runs", type=_runs, default=10_000, metavar="N", help="simulated runs")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="the same seed draws the same failures")
    parser.add_argument("--json", action="store_true", help="one JSON object, every interval that was tried included")
    parser.add_argument("--png", type=drawing, metavar="FILE", help="draw goodput against the interval")


def _add_constants(parser: argparse.ArgumentParser) -> None:
    """Their sources: docs/cluster.md, `Goodput`."""
    for name, default, about in (
        ("stall", 1.0, "training waits so long for a save"),
        ("write", 30.0, "from then until the checkpoint is whole, beside training"),
        ("detect", 15.0, "until a failure is noticed"),
        ("stop", 10.0, "until every rank has ended"),
        ("restart", 275.0, "until training goes on"),
    ):
        parser.add_argument(f"--{name}", type=_from_zero, default=default, metavar="S", help=f"seconds: {about}")


def _plan(options: argparse.Namespace) -> None:
    from ofa_ds.plan.goodput import fixed, for_sizes, search

    searches = []
    try:
        plans = for_sizes(_first(options), options.gpus)
        for plan in plans:
            run = {"runs": options.runs, "seed": options.seed}
            found = search(plan, **run) if options.interval is None else fixed(plan, options.interval, **run)
            searches.append(found)
        if options.png:
            from ofa_ds.plan.curve import draw

            draw(searches, options.png)
    except ValueError as error:
        raise UsageError(error) from error
    if options.json:
        facts = {"runs": options.runs, "seed": options.seed, "clusters": [each.as_dict() for each in searches]}
        print(json.dumps(facts, allow_nan=False))
        return
    _print(searches, options)


def _first(options: argparse.Namespace) -> Plan:
    from ofa_ds.plan.goodput import LLAMA3_GPU_HOURS, Plan

    return Plan(
        gpus=options.gpus[0], gpus_per_host=options.gpus_per_host, gpu_hours=options.gpu_hours or LLAMA3_GPU_HOURS,
        work_s=options.days * DAY_S, stall_s=options.stall, write_s=options.write, detect_s=options.detect,
        stop_s=options.stop, restart_s=options.restart, spares=options.spares, host_loss=options.host_loss,
        repair_hours=options.repair_hours,
    )  # fmt: skip


def _print(searches: list[Search], options: argparse.Namespace) -> None:
    from ofa_ds.plan.goodput import first_order_waste

    lost = options.detect + options.stop + options.restart
    print(
        f"{options.days:g} days of training, {options.runs:,} runs, seed {options.seed}; save: {options.stall:g} s of "
        f"stall, whole after {options.write:g} s; {lost:g} s from a failure to training"
    )
    for each in searches:
        plan, best = each.plan, each.best
        every = f"{best.interval_s:,.0f} s"
        if options.step_seconds:
            every += f" (train.save_every={max(1, round(best.interval_s / options.step_seconds))})"
        low, high = each.as_good
        never = math.isinf(plan.failure_s)
        failures = "no failures" if never else f"a failure every {plan.failure_s / HOUR_S:,.1f} h"
        print(
            f"{plan.gpus:,} GPUs, {failures}: goodput p50 {best.p50:.2%}, "
            f"p5 {best.p5:.2%}, saved every {every}"
            + (f"; {low:,.0f} to {high:,.0f} s is as good" if len(each.points) > 1 else "")
            + f"; first order: {first_order_waste(plan, best.interval_s):.2%} lost"
        )
    if options.png:
        print(f"curve: {options.png}")


def _sizes(text: str) -> list[int]:
    return [positive(each) for each in text.split(",")]


def _runs(text: str) -> int:
    value = positive(text)
    if value > MAX_RUNS:
        raise argparse.ArgumentTypeError(f"want at most {MAX_RUNS:,}, got {text!r}")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _from_zero(text: str) -> float:
    if not 0 <= (value := _float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"want a number of at least 0, got {text!r}")
    return value


def _above_zero(text: str) -> float:
    if not (value := _float(text)) > 0:
        raise argparse.ArgumentTypeError(f"want a number above 0, got {text!r}")
    return value


def _finite(text: str) -> float:
    if not 0 < (value := _float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"want a finite number above 0, got {text!r}")
    return value

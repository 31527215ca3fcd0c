"""`ofa-ds plan RECIPE --scaling`: the same rows a GPU on more and more GPUs, and what the network's speed changes."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from ofa_ds.cli.parser import UsageError
from ofa_ds.cli.plan_recipe import calibration_of, cluster_of, run_of


def plan_scaling(options: argparse.Namespace) -> int:
    """Raises UsageError, one line."""
    try:
        return _plan(options)
    except ValueError as error:
        raise UsageError(error) from error


def _plan(options: argparse.Namespace) -> int:
    from ofa_ds.plan.forecast import CPU, forecast
    from ofa_ds.plan.scaling import GPUS, as_json, draw, lines, scaling

    if options.hosts > 1 or options.write_recipe:
        raise ValueError("--scaling has its sizes in --gpus and writes no recipe: leave --hosts, --write-recipe out")
    if options.gpu == CPU:
        raise ValueError("--scaling plans GPUs: --gpu cpu has one host")
    calibration = calibration_of(options)
    cluster = cluster_of(options, calibration)
    run, notes = run_of(options)
    sizes = sorted(set(options.gpus or GPUS))
    ranks, rows = cluster.ranks_per_host, run.recipe.batch.micro_rows
    for size in sizes:
        if size % ranks:
            raise ValueError(f"--gpus {size}: want whole hosts of {ranks} GPUs")
    accumulation = max(1, run.recipe.batch.global_rows // (rows * sizes[0]))
    batch = replace(run.recipe.batch, global_rows=rows * sizes[0] * accumulation)
    first = forecast(replace(run, recipe=replace(run.recipe, batch=batch)), replace(cluster, hosts=sizes[0] // ranks))
    found = scaling(
        run.model, first.work, first.layout, accumulation=accumulation, gpu=cluster.gpu, network=cluster.network,
        gpus=sizes, calibration=calibration, frozen_embedding=first.frozen_embedding,
    )  # fmt: skip
    if options.png:
        draw(found, options.png)
    if options.json:
        facts = {"version": 1, "recipe": run.name, "rows_per_gpu": rows * accumulation, "points": as_json(found)}
        print(json.dumps(facts, allow_nan=False))
        return 0
    print(f"{run.name} on {cluster.gpu.name}, {rows * accumulation} rows a GPU and step (batch.global_rows grows)")
    for line in (*lines(found), *(f"note: {note}" for note in notes)):
        print(line)
    if options.png:
        print(f"picture: {options.png}")
    return 0

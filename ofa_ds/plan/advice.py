"""The cheapest change that makes a run fit: smaller micro-batches, checkpointing, another layout, more hosts.

A change costs what a step then takes of all GPUs together, in GPU-seconds: more hosts are dearer only where they work
less well. The cheapest is looked at first, so little else is planned in full.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ofa_ds.plan.forecast import CPU, Cluster, Forecast, Run, forecast

MAX_HOSTS = 1024
"""More are not tried."""
ENOUGH = 4
"""Pieces of advice, after which nobody looks on."""
SURE = 0.7
"""Of what a plan holds beside its state, what one with as many rows holds at least under another layout, and one with
fewer rows in proportion."""

Layouts = Mapping[str, Mapping[str, Any]]
"""DeepSpeed's files by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    changes: tuple[str, ...]
    """In words, each as a user would say it."""
    planned: Forecast
    step_s: float
    deepspeed_name: str | None
    """The shipped file of the layout; None: it is no shipped one."""

    @property
    def gpu_seconds(self) -> float:
        """Of a step."""
        return self.step_s * self.planned.cluster.world


def advise(planned: Forecast, shipped: Layouts) -> list[Advice]:
    """What fits, the cheapest first: on the same hosts, or on more where nothing does. Empty: nothing fits anywhere."""
    bounds = _Bounds()
    for cluster in _clusters(planned.cluster):
        if found := list(itertools.islice(_cheapest(planned, cluster, shipped, bounds), ENOUGH)):
            return found
    return []


def without_checkpointing(planned: Forecast) -> Advice | None:
    """The same run, which keeps its activations, where that fits and is faster."""
    if not planned.run.model.activation_checkpointing:
        return None
    run = planned.run
    recipe = replace(run.recipe, model=replace(run.recipe.model, activation_checkpointing=False))
    there = replace(run, recipe=recipe, model=replace(run.model, activation_checkpointing=False))
    for each in _planned(there, planned.cluster, planned.calibration):
        seconds = each.step().total_s
        if seconds < planned.step().total_s and each.fits:
            words = ("model.activation_checkpointing=false",)
            return Advice(changes=words, planned=each, step_s=seconds, deepspeed_name=run.recipe.deepspeed)
    return None


def lighter(planned: Forecast, shipped: Layouts, *, share: float = 0.9) -> list[Advice]:
    """On the same hosts, what wants at most `share` of this plan's memory, the cheapest first.

    For a run that has found less than was planned.
    """
    cluster, held = planned.cluster, planned.memory
    least = replace(cluster, gpu=cluster.gpu._replace(memory_bytes=share * held.gpu_total))
    if not held.gpu:
        least = replace(cluster, host_bytes=share * held.host_total)
    found = itertools.islice(_cheapest(planned, least, shipped, _Bounds()), ENOUGH)
    return [replace(each, planned=replace(each.planned, cluster=cluster)) for each in found]


def least(planned: Forecast, shipped: Layouts) -> Forecast:
    """What comes nearest to fitting on these hosts: fewest rows, checkpointing, the layout with least between steps."""
    found = []
    for _, deepspeed, _ in _layouts(planned, shipped):
        *_, last = _runs(planned.run, planned.cluster, deepspeed, checkpointing=True)
        found += _planned(last[0], planned.cluster, planned.calibration)
    if planned.cluster.gpu.name == CPU:
        return min(found or [planned], key=lambda each: each.memory.host_total)
    return min(found or [planned], key=lambda each: each.state_bytes)


class _Bounds:
    """What a plan holds at least, from plans that were made before: most that cannot fit are never made."""

    def __init__(self) -> None:
        self._beside: dict[tuple[bool, int], float] = {}

    def learn(self, planned: Forecast) -> None:
        key = self._key(planned)
        beside = planned.memory.gpu_total - planned.state_bytes
        self._beside[key] = min(beside, self._beside.get(key, beside))

    def allow(self, planned: Forecast) -> bool:
        if planned.cluster.gpu.name == CPU:
            return True
        if planned.host_state_bytes > planned.cluster.host_bytes:
            return False
        checkpointing, rows = self._key(planned)
        known = (
            SURE * beside * min(rows / known_rows, 1.0)
            for (same, known_rows), beside in self._beside.items()
            if same == checkpointing
        )
        return planned.state_bytes + max(known, default=0.0) <= planned.cluster.gpu.memory_bytes

    @staticmethod
    def _key(planned: Forecast) -> tuple[bool, int]:
        return planned.run.model.activation_checkpointing, planned.run.recipe.batch.micro_rows


def _clusters(cluster: Cluster) -> Iterator[Cluster]:
    hosts = cluster.hosts
    yield cluster
    while cluster.gpu.name != CPU and (hosts := 2 * hosts) <= MAX_HOSTS:
        yield replace(cluster, hosts=hosts)


def _cheapest(planned: Forecast, cluster: Cluster, shipped: Layouts, bounds: _Bounds) -> Iterator[Advice]:
    """What fits there, the cheapest first: of each layout, with and without checkpointing, the cheapest rows."""
    hosts = (f"{cluster.hosts} hosts",) if cluster.hosts != planned.cluster.hosts else ()
    waiting, found = [], set()
    for name, deepspeed, change in _layouts(planned, shipped):
        for checkpointing in {planned.run.model.activation_checkpointing, True}:
            kind = (change, checkpointing)
            for run, changes in _runs(planned.run, cluster, deepspeed, checkpointing=checkpointing):
                for each in _planned(run, cluster, planned.calibration):
                    if bounds.allow(each):  # what a step takes is not found out for nothing
                        words = (*([change] if change else []), *changes, *hosts)
                        step_s = each.step().total_s
                        waiting.append((kind, Advice(changes=words, planned=each, step_s=step_s, deepspeed_name=name)))
    for kind, each in sorted(waiting, key=lambda pair: (pair[1].gpu_seconds, len(pair[1].changes))):
        if kind in found or not bounds.allow(each.planned):
            continue
        if each.planned.fits:
            found.add(kind)
            yield each
        else:
            bounds.learn(each.planned)


def _planned(run: Run, cluster: Cluster, calibration: Any) -> Iterator[Forecast]:
    """The plan, or nothing where there cannot be one."""
    try:
        yield forecast(run, cluster, calibration)
    except ValueError:
        return


def _runs(
    run: Run, cluster: Cluster, deepspeed: Mapping[str, Any], *, checkpointing: bool
) -> Iterator[tuple[Run, tuple[str, ...]]]:
    """The run with fewer and fewer rows of a micro-batch, and the changes in words."""
    batch, options = run.recipe.batch, run.recipe.model
    for rows in _rows(batch.global_rows, batch.micro_rows, cluster.world) or [batch.micro_rows]:
        recipe = replace(
            run.recipe,
            batch=replace(batch, micro_rows=rows),
            model=replace(options, activation_checkpointing=checkpointing),
        )
        changes = []
        if rows != batch.micro_rows:
            changes.append(f"batch.micro_rows={rows}")
        if checkpointing != options.activation_checkpointing:
            changes.append("model.activation_checkpointing=true")
        model = replace(run.model, activation_checkpointing=checkpointing)
        yield replace(run, recipe=recipe, model=model, deepspeed=deepspeed), tuple(changes)


def _rows(global_rows: int, most: int, world: int) -> list[int]:
    """Rows of a micro-batch that divide a rank's share of a step, up to `most`, the most first."""
    share, left = divmod(global_rows, world)
    return [] if left else [rows for rows in range(min(most, share), 0, -1) if share % rows == 0]


def _layouts(planned: Forecast, shipped: Layouts) -> Iterator[tuple[str | None, Mapping[str, Any], str]]:
    """(name, JSON, change in words): the recipe's own, that without hpZ, with offload, and the shipped ones.

    Each has the recipe's own precision.
    """
    own, name = planned.run.deepspeed, planned.run.recipe.deepspeed
    yield name, own, ""
    seen = [own]
    for edited, change in (*_edits(own), *((with_precision(each, own), key) for key, each in shipped.items())):
        if edited in seen:
            continue
        seen.append(edited)
        same = next((key for key, each in shipped.items() if each == edited), None)
        yield same, edited, f"deepspeed={same}" if same else f"{change} in {name}"


def _edits(own: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    zero = own.get("zero_optimization", {})
    plain = {key: value for key, value in zero.items() if key != "zero_hpz_partition_size"}
    if len(plain) < len(zero):
        yield {**own, "zero_optimization": plain}, "no zero_hpz_partition_size"
    if zero.get("stage", 0) and "offload_optimizer" not in zero:
        cpu = {"device": "cpu", "pin_memory": True}
        yield {**own, "zero_optimization": {**plain, "offload_optimizer": cpu}}, "offload_optimizer to cpu"


def with_precision(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of one file with the number types of another."""
    types = ("bf16", "fp16", "communication_data_type", "data_types")
    kept = {key: value for key, value in config.items() if key not in types}
    return copy.deepcopy({**{key: own[key] for key in types if key in own}, **kept})

"""What the planner says of a run that has found too little memory: by part, and the cheapest change that wants less."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ofa_ds.batch import Batch
from ofa_ds.config import Recipe
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.ranks import Ranks
from ofa_ds.model.config import model_config
from ofa_ds.storage.sizes import size_text
from ofa_ds.train.memory_limits import Room

if TYPE_CHECKING:
    from ofa_ds.plan.advice import Advice
    from ofa_ds.plan.forecast import Cluster, Forecast

_LARGEST_PARTS = 3
_SHOWN = 5
"""Changes that a report lists."""
_LARGER = 1.3
"""Than planned, from which on a micro-batch is told to be."""
_LEAST_SHARE, _MOST_SHARE = 0.3, 0.95
"""Of the plan, that a change is to want at most. What is taken may be more than is in use: no less is asked for, but
where the plan itself says that it cannot fit."""
_NOT_OF_CPU = ("CUDA context", "NCCL", "allocator slack")


@dataclass(frozen=True, kw_only=True)
class Plan:
    parts: tuple[tuple[str, float], ...] = ()
    """Bytes of a rank, the largest first."""
    tokens: tuple[float, float] = (0.0, 0.0)
    """Of a micro-batch: planned, and the largest of the step under way."""
    changes: tuple[str, ...] = ()
    """What wants little enough, the cheapest first, in words."""
    no_plan: str = ""
    """Why there is none."""

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts)

    @property
    def cheapest(self) -> str:
        """For the one line; empty where nothing is known."""
        told = []
        if self.parts:
            largest = ", ".join(f"{name} {size_text(size)}" for name, size in self.parts[:_LARGEST_PARTS])
            told.append(f"planned: {size_text(self.total)}, of it {largest}")
        if self.tokens[1] > _LARGER * self.tokens[0]:
            told.append(f"the micro-batch has {self.tokens[1]:,.0f} tokens, planned are {self.tokens[0]:,.0f}")
        if self.changes:
            told.append(f"the cheapest change that wants less: {self.changes[0]}")
        elif self.parts:
            told.append("nothing that can be changed on these hosts wants enough less: take more of them")
        return "; ".join(told)

    def lines(self) -> list[str]:
        """For the report."""
        if self.no_plan:
            return [f"There is no plan of this run: {self.no_plan}"]
        lines = [f"What `ofa-ds plan` expects of a rank: {size_text(self.total)}"]
        lines += [f"{size / 2**20:>12,.1f} MiB  {name}" for name, size in self.parts]
        there = f", the largest of this step {self.tokens[1]:,.0f}" if self.tokens[1] else ""
        lines += [
            f"for a micro-batch of {self.tokens[0]:,.0f} tokens{there}",
            "",
            "What wants less, the cheapest first:",
        ]
        return [*lines, *(f"  {change}" for change in self.changes or ("nothing on these hosts",))]


def planned(
    recipe: Recipe, ranks: Ranks, vocab_size: int, batches: Sequence[Batch], room: Room | None, asked: float
) -> Plan:
    """room: the limit that was met; asked: the bytes that did not fit in it. Raises ValueError: no plan."""
    from ofa_ds.engine.config import shipped_configs
    from ofa_ds.plan.advice import lighter
    from ofa_ds.plan.forecast import Run, forecast

    if not vocab_size:
        raise ValueError("the vocabulary was not read yet")
    on_gpu = ranks.device.type == "cuda"
    run = Run(
        name=recipe.run_dir, recipe=recipe, model=model_config(recipe, vocab_size),
        deepspeed=_typed(load_deepspeed_config(recipe.deepspeed), on_gpu),
    )  # fmt: skip
    expected = forecast(run, _cluster(ranks, room))
    parts = {name: size for name, size in expected.memory.gpu.items() if on_gpu or name not in _NOT_OF_CPU}
    layouts = {name: _typed(config, on_gpu) for name, config in shipped_configs().items()}
    shipped = {name: config for name, config in layouts.items() if on_gpu or not _offloads(config)}
    found = lighter(expected, shipped, share=_share(expected, sum(parts.values()), room, asked))
    return Plan(
        parts=tuple(sorted(((name, size) for name, size in parts.items() if size), key=lambda item: -item[1])),
        tokens=(expected.work.tokens, max((batch.num_tokens for batch in batches), default=0)),
        changes=tuple(_words(each, expected) for each in found[:_SHOWN]),
    )


def _share(expected: Forecast, total: float, room: Room | None, asked: float) -> float:
    """Of the plan's own total, what a change may want for that there is room for what did not fit."""
    share = _MOST_SHARE
    if room is not None:
        lacking = room.used + asked - room.limit
        limit = room.limit / (expected.cluster.ranks_per_host if room.is_shared else 1)
        share = min(max(1 - lacking / total, _LEAST_SHARE), share, _MOST_SHARE * limit / total)
    fixed = expected.memory.gpu_total - total
    return (share * total + fixed) / expected.memory.gpu_total


def _cluster(ranks: Ranks, room: Room | None) -> Cluster:
    """This job's, as far as a rank knows. A rank on a CPU is planned as one on a GPU with what the host gives it."""
    from ofa_ds.plan.forecast import Cluster
    from ofa_ds.plan.hardware import GPUS, NETWORKS

    ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.world_size)
    if ranks.world_size % ranks_per_host:
        ranks_per_host = 1
    memory_bytes = room.limit if room is not None else GPUS["a100-80gb"].memory_bytes
    nearest = min(GPUS.values(), key=lambda each: abs(each.memory_bytes - memory_bytes))
    return Cluster(
        hosts=ranks.world_size // ranks_per_host, ranks_per_host=ranks_per_host,
        gpu=nearest._replace(memory_bytes=memory_bytes), network=next(iter(NETWORKS.values())),
        host_bytes=float("inf"), nvme_bytes=0.0,
    )  # fmt: skip


def _typed(config: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's JSON as it is on this device: `auto` is fp32 on a CPU, and nothing is offloaded to where it is."""
    config = dict(config)
    if on_gpu:
        return config
    if config.get("bf16", {}).get("enabled") == "auto":
        config["bf16"] = {"enabled": False}
    zero = dict(config.get("zero_optimization", {}))
    if zero.get("stage", 0):
        zero = {**zero, "offload_optimizer": zero.get("offload_optimizer", {"device": "none"})}
    return {**config, "zero_optimization": zero}


def _offloads(config: Mapping[str, Any]) -> bool:
    zero = config.get("zero_optimization", {})
    return any(zero.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param"))


def _words(advice: Advice, expected: Forecast) -> str:
    there = advice.planned.memory.gpu_total / expected.memory.gpu_total
    return f"{' '.join(advice.changes)} ({there:.0%} of the planned memory)"

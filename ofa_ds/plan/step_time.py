"""How long an optimizer step takes: what is computed, what is sent, and how much of that computing does not hide.

Kernels by `plan.rates`, collectives by `plan.traffic` and NCCL's own model of a ring (`plan.hardware.ring_s`), one
beside the other by `plan.overlap`. No step on a GPU has been measured yet: the range is that of published runs (below).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.flops import flops
from ofa_ds.plan.hardware import Gpu, Network, ring_s
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.order import Order
from ofa_ds.plan.overlap import Overlap
from ofa_ds.plan.parameters import num_parameters
from ofa_ds.plan.rates import Seconds, fetch_s, host_s, offload_s, optimizer_s, seconds, totals
from ofa_ds.plan.traffic import Collective, timeline
from ofa_ds.plan.work import Work

BEYOND = "beyond the rooflines"
ISSUING = "issuing, beyond what it computes"
OFFLOADED = "optimizer on the host"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Of one optimizer step of one rank; seconds."""

    compute_s: dict[str, float]
    """By kind of work."""
    communication_s: float
    """Of all collectives, hidden or not."""
    exposed_s: float
    """Of the communication, what computing does not hide."""
    data_s: float
    """Waiting for the next batch (`plan.feed`): 0 where workers are ahead."""
    checkpoint_s: float
    """A step's share of what checkpoints stall."""
    total_s: float
    useful_flops: float
    executed_flops: float
    mfu: float
    """Useful operations over the peak: neither what is computed again nor pads."""
    hfu: float
    """Executed operations over the peak."""
    tokens_per_s: float
    """Of all ranks."""
    examples_per_s: dict[str, float] = field(default_factory=dict)
    """Of all ranks, by task; "" where a task is not named."""
    low_s: float
    """Between this and `high_s` is the step expected."""
    high_s: float

    def waiting(self, data_s: float) -> StepTime:
        """The same step where so much more time goes into waiting for data."""
        share = self.total_s / (self.total_s + data_s)
        return replace(
            self, data_s=self.data_s + data_s, total_s=self.total_s + data_s, mfu=self.mfu * share,
            hfu=self.hfu * share, tokens_per_s=self.tokens_per_s * share,
            examples_per_s={task: rate * share for task, rate in self.examples_per_s.items()},
            low_s=self.low_s + data_s, high_s=self.high_s + data_s,
        )  # fmt: skip


def step_time(
    config: ModelConfig, work: Work, layout: Layout, *, accumulation: int, gpu: Gpu, network: Network | None,
    calibration: Calibration | None = None, checkpoint_every: int = 0, checkpoint_stall_s: float = 0.0,
    frozen_embedding: bool = False,
) -> StepTime:  # fmt: skip
    """work: one micro-batch of one rank, of which a step has `accumulation`. network: None on one host.

    calibration: of the same kind of GPU; its rates, by kind of work, take the place of the roofline's.
    frozen_embedding: the vocabulary's matrix has no gradient (`optim.freeze`).
    """
    counted = flops(config, work, stage=layout.stage, frozen_embedding=frozen_embedding)
    parts = seconds(config, work, counted, gpu)
    fastest, middle, slowest = gpu.beyond
    if calibration is not None:
        parts = _calibrated(parts, {kind: counted.of(kind).executed for kind in calibration.rates}, calibration)
        error = calibration.error("step", slowest / middle - 1)
        fastest, middle, slowest = 1 / (1 + error), 1.0, 1 + error
    stall = checkpoint_stall_s / checkpoint_every if checkpoint_every else 0.0
    low, (computing, sent, exposed), high = _beside(
        config, layout, len(work.images), parts, accumulation, (fastest, middle, slowest),
        functools.partial(_send_s, layout=layout, gpu=gpu, network=network),
    )  # fmt: skip
    compute = {kind: accumulation * each for kind, each in totals(parts).items()}
    if middle != 1.0:
        compute[BEYOND] = (middle - 1) * sum(compute.values())
    issuing = computing - sum(compute.values())
    if issuing > 1e-9 * computing:
        compute[ISSUING] = issuing
    share = num_parameters(config) / (layout.world if layout.stage else 1)
    offload = offload_s(layout, share, accumulation, gpu)
    compute[OFFLOADED if offload else "optimizer"] = offload or optimizer_s(share, gpu)
    after = stall + (offload or optimizer_s(share, gpu))
    total = computing + exposed + after
    useful, executed = accumulation * counted.useful, accumulation * counted.executed
    per_s = layout.world * accumulation / total
    examples: dict[str, float] = {}
    for each in work.examples:
        examples[each.task] = examples.get(each.task, 0.0) + each.count * per_s
    return StepTime(
        compute_s=compute, communication_s=sent, exposed_s=exposed, data_s=0.0, checkpoint_s=stall, total_s=total,
        useful_flops=useful, executed_flops=executed, mfu=useful / total / gpu.peak_flops,
        hfu=executed / total / gpu.peak_flops, tokens_per_s=work.tokens * per_s, examples_per_s=examples,
        low_s=low.computing + low.exposed + after, high_s=high.computing + high.exposed + after,
    )  # fmt: skip


class _Beside(NamedTuple):
    """Of all micro-batches of a step, seconds."""

    computing: float
    """As long as the GPU computes, or the host issues."""
    sent: float
    exposed: float


def _beside(
    config: ModelConfig, layout: Layout, image_groups: int, parts: list[Seconds], accumulation: int,
    factors: tuple[float, ...], send_s: Callable[[Collective], float],
) -> list[_Beside]:  # fmt: skip
    """parts: of one micro-batch, which takes each of `factors` times as long."""
    checkpointing = config.activation_checkpointing
    order = _order(config, layout.leaf_classes, image_groups, checkpointing)
    micro = min(accumulation, 2)  # the third is as the second
    steps = {
        number: Overlap(_timeline(config, layout, checkpointing, image_groups, number), order.own, parts)
        for number in {1, micro}
    }
    more, device, issuing = accumulation - micro, sum(totals(parts).values()), host_s(config)
    found = []
    for factor in factors:
        runs = {n: each.elapsed(send_s, overlap=layout.overlap, factor=factor) for n, each in steps.items()}
        one, many = runs[1], runs[micro]
        took = many.total + more * (many.total - one.total)
        computing = accumulation * max(factor * device, issuing)
        sent = many.sending + more * (many.sending - one.sending)
        found.append(_Beside(computing, sent, max(took - computing, 0.0)))
    return found


def _calibrated(parts: list[Seconds], executed: dict[str, float], calibration: Calibration) -> list[Seconds]:
    """Every kind whose rate was measured takes as long as that says, divided among its modules as before."""
    before = totals(parts)
    factors = {
        kind: executed[kind] / rate / before[kind]
        for kind, rate in calibration.rates.items()
        if rate and before.get(kind)
    }
    return [each.times(factors.get(each.kind, 1.0)) for each in parts]


def _send_s(call: Collective, *, layout: Layout, gpu: Gpu, network: Network | None) -> float:
    ranks = layout.hpz if call.group == "host" else layout.world
    passes = 2 if call.kind == "all_reduce" else 1
    copied = (
        fetch_s(call.bytes / layout.world, layout, gpu) if call.kind == "all_gather" and call.group == "world" else 0.0
    )
    return copied + ring_s(call.bytes, ranks, layout.ranks_per_host, gpu, network, passes=passes)


@functools.lru_cache(maxsize=64)
def _timeline(config: ModelConfig, layout: Layout, checkpointing: bool, image_groups: int, accumulation: int) -> list:
    return timeline(
        config, layout, accumulation=accumulation, checkpointing=checkpointing, image_groups=image_groups,
        alone=layout.offload_param != "none",
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _order(config: ModelConfig, leaf_classes: tuple[str, ...], image_groups: int, checkpointing: bool) -> Order:
    return Order(config, leaf_classes, image_groups=image_groups, checkpointing=checkpointing)

"""What a run holds between steps: weights, gradients, optimizer, buffers, as DeepSpeed 0.19.8 lays them out by stage.

Read in deepspeed/runtime: engine.py (`_do_optimizer_sanity_check`), bf16_optimizer.py, zero/stage_1_and_2.py,
zero/stage3.py, zero/partition_parameters.py. P parameters, W ranks, w bytes of a weight. Bytes a rank, unless said.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ofa_ds.plan.layout import BYTES, Layout

MASTER = 4
"""fp32 master weights."""
MOMENTS = 8
"""Two of AdamW, fp32."""
STAGE0_BUCKET = 500_000_000
"""Elements of gradients that the engine flattens at a time where ZeRO does not (MEMORY_OPT_ALLREDUCE_SIZE)."""
NVME_BUFFERS = 4
"""Sub-groups that the swapper holds in pinned memory (`offload_optimizer.buffer_count`)."""


@dataclass(slots=True)
class State:
    """Bytes by part. What is on the host is of one rank here; `memory` multiplies."""

    gpu: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)
    nvme: Counter[str] = field(default_factory=Counter)
    step: float = 0.0
    """More on the GPU while the optimizer steps, when activations are gone."""
    reduction: float = 0.0
    """More on the GPU while gradients are reduced after the backward (stages 0 and 1)."""


def shard_elements(sizes: Iterable[int], ranks: int) -> int:
    """Of the parameters of these sizes, each cut into `ranks` equal pieces, the last one padded: stage 3's."""
    return sum(-(-size // ranks) for size in sizes)


def pinned(size: float) -> float:
    """torch rounds pinned memory up to a power of two (CachingHostAllocator)."""
    return float(2 ** math.ceil(math.log2(size))) if size > 0 else 0.0


def state(sizes: list[int], layout: Layout, accumulation: int = 1) -> State:
    """sizes: elements of every parameter. accumulation: with several micro-batches a step, whole gradients stay."""
    if layout.stage == 3:
        return _stage3(sizes, layout)
    return (_stage12 if layout.stage else _stage0)(sizes, layout, accumulation > 1)


def _stage0(sizes: list[int], layout: Layout, stay: bool) -> State:
    total, out = sum(sizes), State()
    out.gpu["weights"] = total * layout.weight_bytes
    if stay:
        out.gpu["gradients"] = total * layout.weight_bytes
    out.gpu["optimizer"] = total * MOMENTS
    if layout.ema:
        out.gpu["moving average"] = total * 4
    if layout.world > 1:
        out.reduction = min(total, STAGE0_BUCKET + max(sizes)) * layout.weight_bytes
    if not stay:  # else counted already
        out.reduction += total * layout.weight_bytes
        out.step = total * layout.weight_bytes
    return out


def _stage12(sizes: list[int], layout: Layout, stay: bool) -> State:
    total, width, out = sum(sizes), layout.weight_bytes, State()
    shard = -(-total // layout.world)
    offload = layout.offload_optimizer
    out.gpu["weights"] = total * width
    _add_optimizer(out, shard, layout)
    if layout.keeps_whole_gradients:
        out.gpu["gradients"] = total * 4
        if layout.world > 1:
            out.reduction = min(total, STAGE0_BUCKET + max(sizes)) * 4
        return out
    buffers = 2 if layout.overlap else 1
    out.gpu["reduction buckets"] = buffers * layout.reduce_bucket * width
    accumulated = BYTES[layout.accumulate_precision]
    if layout.stage == 1:  # all are kept until the last micro-batch has been reduced
        out.reduction = (0 if stay else total * width) + (0 if offload != "none" else shard * accumulated)
        out.gpu["gradients"] = total * width if stay else 0
    elif offload == "none":
        out.gpu["gradients"] = shard * accumulated
    else:
        out.gpu["gradients"] = max(sizes) * width
    if BYTES[layout.reduce_precision] != width:  # a bucket is cast as a whole
        out.gpu["reduction buckets"] += layout.reduce_bucket * BYTES[layout.reduce_precision]
    out.step = 0.0 if offload != "none" else shard * 4
    return out


def _stage3(sizes: list[int], layout: Layout) -> State:
    width, out = layout.weight_bytes, State()
    shard = shard_elements(sizes, layout.world)
    if layout.offload_param == "none":
        out.gpu["weights"] = shard * width
    elif layout.offload_param == "cpu":
        out.host["weights"] = pinned(shard * width)
    else:
        out.nvme["weights"] = shard * width
        out.host["weights"] = NVME_BUFFERS * max(pinned(shard_elements([max(sizes)], layout.world) * width), 1)
    _add_optimizer(out, shard, layout)  # in fp32, too: it never finds the weights on the device it compares with
    accumulated, group = BYTES[layout.accumulate_precision], min(layout.sub_group, shard)
    if layout.offload_optimizer == "none":
        out.gpu["gradients"] = shard * accumulated
        out.step = group * 4  # a sub-group's gradients are flattened into a copy
    out.gpu["reduction buckets"] = layout.reduce_bucket * BYTES[layout.reduce_precision]
    if layout.hpz > 1:
        out.gpu["second copy (hpZ)"] = sum(-(-size // layout.hpz) for size in sizes) * width
    out.gpu["persistent weights"] = sum(each for each in sizes if each <= layout.persistence_threshold) * width
    if layout.world == 1:
        out.gpu["persistent weights"] = 0
    return out


def _add_optimizer(out: State, shard: int, layout: Layout) -> None:
    """Masters, moments, moving average; with offload also what then lies on the host."""
    device = layout.offload_optimizer
    if device == "none":
        out.gpu["optimizer"] = shard * (MASTER + MOMENTS)
        if layout.ema:
            out.gpu["moving average"] = shard * 4
        return
    # gradients: the sum of micro-batches, pinned, and each sub-group's fp32 copy that the optimizer reads
    out.host["gradients"] = pinned(shard * BYTES[layout.accumulate_precision])
    if device == "cpu":
        out.host["optimizer"] = shard * (MASTER + MOMENTS)
        out.host["gradients"] += pinned(shard * 4)
        out.host["moving average"] = shard * 4 if layout.ema else 0
        return
    group = min(layout.sub_group, shard)
    out.nvme["optimizer"] = shard * (MASTER + MOMENTS)
    out.nvme["gradients"] = shard * 4
    out.host["swap buffers"] = NVME_BUFFERS * pinned(group * 4)
    out.host["moving average"] = shard * 4 if layout.ema else 0

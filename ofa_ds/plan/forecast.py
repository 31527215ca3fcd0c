"""One run on one cluster, planned: memory, FLOPs, time of a step, and what the whole run takes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.config.schema import MixConfig, Recipe
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.cpu import CpuPlan, predict_cpu
from ofa_ds.plan.feed import Feed, feed_of
from ofa_ds.plan.flops import Flops, flops
from ofa_ds.plan.hardware import Gpu, Network
from ofa_ds.plan.layout import Layout, layout_of
from ofa_ds.plan.lengths import Lengths, work_of_recipe
from ofa_ds.plan.memory import Memory, checkpoint_bytes, memory
from ofa_ds.plan.parameters import num_parameters, parameters
from ofa_ds.plan.state import State, state
from ofa_ds.plan.step_time import StepTime, step_time
from ofa_ds.plan.work import Work

HOUR_S, DAY_S = 3_600.0, 86_400.0
TB = 1e12
HOST_BYTES = {"a100-40gb": 1 * TB, "a100-80gb": 2 * TB, "h100": 2 * TB, "h200": 2 * TB}
"""Memory of a host, where none is said: NVIDIA's DGX of that GPU, by its data sheet."""
NVME_BYTES = {"a100-40gb": 15 * TB, "a100-80gb": 30 * TB, "h100": 30 * TB, "h200": 30 * TB}
"""Local disks of the same."""
WRITE_BYTES_PER_S = 2.4e9
"""Of a checkpoint to a slow shared file system, all hosts together (docs/cluster.md, `Goodput`)."""


CPU = "cpu"
"""As a GPU's name: the ranks compute on the host's processor, with one thread each."""
_MEASURE = "--gpu cpu wants what was measured of it: ofa-ds bench step --output FILE, then --calibration FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    hosts: int
    ranks_per_host: int
    gpu: Gpu
    network: Network | None
    host_bytes: float
    """Memory of a host."""
    nvme_bytes: float

    @property
    def world(self) -> int:
        return self.hosts * self.ranks_per_host


def this_host(calibration: Calibration | None) -> Cluster:
    """One rank on CPUs of a host like this one. Raises ValueError without a calibration of a CPU."""
    if calibration is None or calibration.device != CPU:
        raise ValueError(_MEASURE)
    processor = Gpu(
        name=CPU, memory_bytes=math.inf, peak_flops=calibration.peak_flops, attainable=1.0, hbm_bytes_per_s=0.0,
        hbm_attainable=1.0, tdp_watts=0.0, link_bytes_per_s=0.0, host_link_bytes_per_s=math.inf, multiprocessors=0,
        issue_per_s=0.0, sources={"peak_flops": f"measured: {calibration.machine}, {calibration.date}"},
    )  # fmt: skip
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Cluster(hosts=1, ranks_per_host=1, gpu=processor, network=None, host_bytes=there, nvme_bytes=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is to be trained, and how."""

    name: str
    """As the user calls the recipe."""
    recipe: Recipe
    model: ModelConfig
    deepspeed: Mapping[str, Any]
    """DeepSpeed's JSON, as the file of ds_configs has it."""
    lengths: Lengths | None = None
    """Of the run's own texts; None: those of OFA's data."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    run: Run
    cluster: Cluster
    layout: Layout
    work: Work
    """The mean micro-batch of one rank, which time goes by."""
    heaviest: Work
    """The micro-batch with most vision-language rows, which memory goes by."""
    accumulation: int
    """Micro-batches of a rank in a step."""
    calibration: Calibration | None = None

    @cached_property
    def cpu(self) -> CpuPlan | None:
        """Of ranks on CPUs, which are planned by what was measured alone."""
        if self.cluster.gpu.name != CPU:
            return None
        if self.calibration is None:
            raise ValueError(_MEASURE)
        return predict_cpu(
            self.run.model, self.work, self.layout, calibration=self.calibration, accumulation=self.accumulation
        )

    @cached_property
    def memory(self) -> Memory:
        if self.cpu is not None:
            return Memory(host={name: size * self.cluster.ranks_per_host for name, size in self.cpu.bytes.items()})
        return memory(
            self.run.model, self.heaviest, self.layout, accumulation=self.accumulation,
            gpu_bytes=self.cluster.gpu.memory_bytes,
        )  # fmt: skip

    @cached_property
    def state_bytes(self) -> float:
        """What a GPU holds between steps: less than `memory`, and known at once."""
        return sum(self._state.gpu.values())

    @property
    def host_state_bytes(self) -> float:
        """The same of a host."""
        return sum(self._state.host.values()) * self.layout.ranks_per_host

    @cached_property
    def _state(self) -> State:
        sizes = [each.numel for each in parameters(self.run.model)]
        return state(sizes, self.layout, self.accumulation)

    @property
    def shortages(self) -> dict[str, tuple[float, float]]:
        """What does not fit: bytes wanted and had, by place."""
        had = {
            "GPU": (self.memory.gpu_total, self.cluster.gpu.memory_bytes),
            "host": (self.memory.host_total, self.cluster.host_bytes),
            "NVMe": (self.memory.nvme_total, self.cluster.nvme_bytes),
        }
        return {place: (wanted, there) for place, (wanted, there) in had.items() if wanted > there}

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def parameters(self) -> int:
        return num_parameters(self.run.model)

    @property
    def checkpoint_bytes(self) -> float:
        return checkpoint_bytes(self.run.model, self.layout)

    def flops(self) -> Flops:
        """Of one micro-batch of one rank."""
        return flops(
            self.run.model, self.work, on_gpu=self.cluster.gpu.name != CPU, stage=self.layout.stage,
            frozen_embedding=self.frozen_embedding,
        )  # fmt: skip

    @property
    def frozen_embedding(self) -> bool:
        """Whether the vocabulary's matrix has no gradient."""
        return "token_embedding" in self.run.recipe.optim.freeze

    @property
    def stall_s(self) -> float:
        """Training waits until each rank's share is copied into its host's memory."""
        return self.checkpoint_bytes / self.layout.world / self.cluster.gpu.host_link_bytes_per_s

    @property
    def write_s(self) -> float:
        return max(1.0, self.checkpoint_bytes / WRITE_BYTES_PER_S)

    @cached_property
    def feed(self) -> Feed | None:
        """What a rank's rows of a step take to make; None where that is not known."""
        return feed_of(self.run.recipe, self.cluster.world, self.calibration)

    def step(self) -> StepTime:
        computed = self._computed_step()
        return computed if self.feed is None else computed.waiting(self.feed.wait_s(computed.total_s))

    def _computed_step(self) -> StepTime:
        if self.cpu is not None:
            return self._step_on_cpu(self.cpu)
        return step_time(
            self.run.model, self.work, self.layout, accumulation=self.accumulation, gpu=self.cluster.gpu,
            network=self.cluster.network if self.cluster.hosts > 1 else None, calibration=self.calibration,
            checkpoint_every=self.run.recipe.train.save_every, checkpoint_stall_s=self.stall_s,
            frozen_embedding=self.frozen_embedding,
        )  # fmt: skip

    def _step_on_cpu(self, cpu: CpuPlan) -> StepTime:
        counted, seconds, peak = self.flops(), cpu.step_s, self.cluster.gpu.peak_flops
        useful, executed = self.accumulation * counted.useful, self.accumulation * counted.executed
        per_s = self.accumulation * self.cluster.world / seconds
        examples: Counter[str] = Counter()
        for each in self.work.examples:
            examples[each.task] += each.count * per_s
        return StepTime(
            compute_s=dict(cpu.seconds), communication_s=0.0, exposed_s=0.0, data_s=0.0, checkpoint_s=0.0,
            total_s=seconds, useful_flops=useful, executed_flops=executed, mfu=useful / seconds / peak if peak else 0.0,
            hfu=executed / seconds / peak if peak else 0.0, tokens_per_s=self.work.tokens * per_s,
            examples_per_s=dict(examples), low_s=seconds / (1 + cpu.seconds_error),
            high_s=seconds * (1 + cpu.seconds_error),
        )  # fmt: skip


def forecast(run: Run, cluster: Cluster, calibration: Calibration | None = None) -> Forecast:
    """Raises ValueError, one line: rows that do not divide among the ranks, a layout that DeepSpeed refuses there."""
    accumulation = run.recipe.batch.accumulation_steps(cluster.world)
    on_gpu = cluster.gpu.name != CPU
    layout = layout_of(
        run.deepspeed, hosts=cluster.hosts, ranks_per_host=cluster.ranks_per_host, on_gpu=on_gpu,
        ema=bool(run.recipe.optim.ema_decay),
    )  # fmt: skip
    _check_hpz(run, layout)
    planned = Forecast(
        run=run, cluster=cluster, layout=layout, work=work_of_recipe(run.recipe, run.lengths),
        heaviest=work_of_recipe(heaviest(run.recipe), run.lengths), accumulation=accumulation, calibration=calibration,
    )  # fmt: skip
    if not on_gpu:
        _ = planned.cpu  # what was not measured is told here
    return planned


def heaviest(recipe: Recipe) -> Recipe:
    """The recipe whose mean micro-batch has as many vision-language rows as any of this one's can have.

    Families take turns: of k rows in a row at most one more is of a family than its share rounded up. Micro-batches of
    whole rounds of the mix are all alike.
    """
    weights, rows = recipe.data.mix.weights(), recipe.batch.micro_rows
    own, total = weights["vision_language"], sum(weights.values())
    others = total - own
    whole_round = total // math.gcd(*weights.values())
    if recipe.data.task.name or not own or not others or rows % whole_round == 0:
        return recipe
    most = min(-(-rows * own // total) + 1, rows)
    mix = {family: (rows - most) * weight for family, weight in weights.items()} | {"vision_language": most * others}
    return replace(recipe, data=replace(recipe.data, mix=MixConfig(**mix)))


def _check_hpz(run: Run, layout: Layout) -> None:
    if layout.hpz <= 1:
        return
    where = f"deepspeed {run.recipe.deepspeed}: zero_hpz_partition_size {layout.hpz}"
    if layout.world % layout.hpz:
        raise ValueError(
            f"{where} does not divide {layout.world} ranks; set it to the ranks of a host, {layout.ranks_per_host}, "
            "or leave it out"
        )
    if layout.ranks_per_host % layout.hpz:
        raise ValueError(
            f"{where}: its second copy would lie on several hosts, which have {layout.ranks_per_host} ranks each; set "
            f"it to {layout.ranks_per_host}, or leave it out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a whole run without failures: as expected, and between the step's low and high."""

    steps: int
    seconds: tuple[float, float, float]
    """Low, expected, high."""
    gpu_hours: tuple[float, float, float]
    energy_kwh: tuple[float, float, float]
    """Of GPUs at their power limit; hosts, network and cooling are not in it."""
    price: tuple[float, float, float] | None = None


def cost(planned: Forecast, step: StepTime, *, steps: int, price_per_gpu_hour: float | None = None) -> Cost:
    """Raises ValueError: a price beyond all numbers."""
    seconds = (steps * step.low_s, steps * step.total_s, steps * step.high_s)
    low, middle, high = (each * planned.cluster.world / HOUR_S for each in seconds)
    hours = (low, middle, high)
    watts = planned.cluster.gpu.tdp_watts
    price = None if price_per_gpu_hour is None else tuple(each * price_per_gpu_hour for each in hours)
    if price is not None and math.isinf(price[-1]):
        raise ValueError(f"a price of {price_per_gpu_hour:g} per GPU-hour is more than can be counted")
    return Cost(
        steps=steps, seconds=seconds, gpu_hours=hours, price=price,
        energy_kwh=tuple(each * watts / 1e3 for each in hours),
    )  # fmt: skip

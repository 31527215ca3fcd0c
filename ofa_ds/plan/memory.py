"""Peak memory of a training step by part: of a rank's GPU, a host, its NVMe; the size of a checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.plan.activations import activations
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.parameters import Parameter, num_parameters, parameters
from ofa_ds.plan.state import state
from ofa_ds.plan.work import Work

CUDA_CONTEXT = 0.55 * 2**30
"""Of a process, with the kernels it loads: 543 MiB (pytorch/pytorch#81257), about 300 MB where few are loaded,
and lazily (pytorch/pytorch#107667)."""
NCCL_GROUP = 1.0 * 2**30
"""Of one group over hosts: 24 channels, each with a ring and a tree, 9 MiB a connection (NCCL's default buffers of its
three protocols); 1.6 GB was seen (NVIDIA/nccl#864)."""
NCCL_HOST_GROUP = 0.5 * 2**30
"""Of one more group inside a host (hpZ)."""
ALLOCATOR_SLACK = 0.04
"""Of what is allocated: torch's caching allocator keeps blocks of other sizes than it needs next. An allowance."""
HOST_PROCESS = 4.0 * 2**30
"""Of a rank: interpreter, libraries, CUDA's mappings and the loader's workers. An allowance."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part at the highest point of a step."""

    gpu: dict[str, float] = field(default_factory=dict)
    """Of one rank."""
    host: dict[str, float] = field(default_factory=dict)
    """Of one host: all its ranks."""
    nvme: dict[str, float] = field(default_factory=dict)
    """Of one host."""
    phase: str = "backward"
    """When the GPU's peak is: "backward", "reduction" (of whole gradients, after it) or "optimizer"."""

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())

    @property
    def nvme_total(self) -> float:
        return sum(self.nvme.values())


def memory(
    config: ModelConfig, work: Work, layout: Layout, *, params: list[Parameter] | None = None, accumulation: int = 1,
    gpu_bytes: float = 0.0,
) -> Memory:  # fmt: skip
    """Of a step whose micro-batches are as `work` says.

    params: `parameters(config)`, where the caller has it. accumulation: micro-batches a step. gpu_bytes: the GPU's
    memory, of which the vocabulary loss may take a part (1/256) where that spares a product.
    """
    params = parameters(config) if params is None else params
    held = state([math.prod(each.shape) for each in params], layout, accumulation)
    phases = {
        "backward": activations(config, work, layout, accumulation=accumulation, gpu_bytes=gpu_bytes),
        "reduction": Counter({"gradients while reduced": held.reduction}),
        "optimizer": Counter({"gradients of the step": held.step}),
    }
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    gpu = +(held.gpu + phases[phase])
    gpu["allocator slack"] = ALLOCATOR_SLACK * sum(gpu.values())
    gpu["CUDA context"] = CUDA_CONTEXT
    if layout.world > 1:
        gpu["NCCL"] = NCCL_GROUP + (NCCL_HOST_GROUP if layout.hpz > 1 else 0)
    return Memory(dict(gpu), _of_host(held.host, layout, HOST_PROCESS), _of_host(held.nvme, layout), phase)


def _of_host(of_rank: Counter[str], layout: Layout, process: float = 0.0) -> dict[str, float]:
    values = {name: size * layout.ranks_per_host for name, size in of_rank.items() if size}
    return values | ({"processes": process * layout.ranks_per_host} if process else {})


def checkpoint_bytes(config: ModelConfig, layout: Layout) -> float:
    """Of one checkpoint on disk: fp32 weights, both moments and, where one is kept, the moving average."""
    return num_parameters(config) * (4.0 + 8.0 + (4.0 if layout.ema else 0.0))

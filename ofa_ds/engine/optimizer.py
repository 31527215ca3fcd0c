"""AdamW: which of its kernels runs, and that of stage 0 which can leave a step out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ofa_ds.config import OptimConfig
from ofa_ds.engine.deepspeed_import import deepspeed
from ofa_ds.engine.ranks import Ranks

DeepSpeedCPUAdam = deepspeed.ops.adam.DeepSpeedCPUAdam
FusedAdam = deepspeed.ops.adam.FusedAdam


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves the step out while `overflow` is set: DeepSpeed's engine then counts it as skipped.

    ZeRO's own optimizers do that at stages 1 to 3; stage 0 has none.
    """

    overflow = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return None if self.overflow else super().step(closure)


def optimizer_factory(
    config: Mapping[str, Any], optim: OptimConfig, ranks: Ranks
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """AdamW on all parameters alike: DeepSpeed's fused kernels where they build, else torch's.

    docs/ofa.md, Training: optimiser and schedule.
    """
    options = {"lr": optim.peak_lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    zero = config["zero_optimization"]
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return lambda parameters: DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    if not zero.get("stage"):
        return lambda parameters: SkippingAdamW(parameters, fused=True, **options)
    problem = ""
    if ranks.device.type == "cuda":
        problem = _fused_adam_problem()
        usable = torch.tensor(not problem, dtype=torch.int32, device=ranks.device)
        dist.all_reduce(usable, op=dist.ReduceOp.MIN)  # one kernel on all ranks
        if usable.item():
            return lambda parameters: FusedAdam(parameters, adam_w_mode=True, **options)
        problem = problem or "another rank cannot build it"

    def torch_adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW(parameters, fused=True, **options)
        optimizer.problem = problem  # no subclass, as ZeRO takes this class alone
        return optimizer

    return torch_adamw


def kernel_name(optimizer: torch.optim.Optimizer) -> str:
    """What the start of a run says of it."""
    if isinstance(optimizer, DeepSpeedCPUAdam):
        return "DeepSpeed's CPU AdamW"
    if isinstance(optimizer, FusedAdam):
        return "DeepSpeed's fused AdamW"
    problem = getattr(optimizer, "problem", "")
    return "torch's fused AdamW" + (f" (not DeepSpeed's: {problem})" if problem else "")


def _fused_adam_problem() -> str:
    """Why DeepSpeed's kernel cannot be used, in a line; empty where it can."""
    try:
        FusedAdam([nn.Parameter(torch.zeros(1, device="cuda"))])
    except (ImportError, RuntimeError, OSError) as error:  # no nvcc, one it refuses, another CUDA than torch's
        return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return ""

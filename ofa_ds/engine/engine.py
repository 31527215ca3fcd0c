"""The one module that touches DeepSpeed: ZeRO stages 0-3, precision, AdamW, clipping and the learning rate.

The loss handed to `Engine.backward` is a share of a sum over all ranks and micro-batches that is already divided by
*global* counts. DeepSpeed averages over ranks and over accumulation; this module undoes that, so the gradient equals
that of one process on the whole global batch, whatever the ranks, the accumulation split or the stage.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig
from ofa_ds.engine import state as engine_state
from ofa_ds.engine.config import derive_config, load_deepspeed_config
from ofa_ds.engine.moving_average import MovingAverage
from ofa_ds.engine.ranks import Ranks, choose_device
from ofa_ds.engine.rendezvous import rendezvous
from ofa_ds.engine.schedule import polynomial_lr

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by the import below, which warns when it has to find out
import deepspeed as _deepspeed  # noqa: E402
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam  # noqa: E402

# DeepSpeed 0.19 calls two functions that torch 2.13 renamed; torch would say so in every step.
warnings.filterwarnings("ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor`", FutureWarning)

_TIMEOUT_MINUTES = 10
"""How long a rank waits for the others in one collective; DEEPSPEED_TIMEOUT (minutes) overrides it."""


def init_distributed(device: str | None = None) -> Ranks:
    """Join the other processes of this job; alone where no launcher is. Safe to call twice.

    device: "cpu", "cuda", or None for a GPU where there is one.
    """
    os.environ.update(rendezvous(os.environ))
    local_rank = int(os.environ["LOCAL_RANK"])
    place = choose_device(local_rank, os.environ, device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:  # a shared-memory all-reduce that only DeepSpeed's inference calls: compiling it takes a minute and g++
        _deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _deepspeed.utils.nvtx.enable_nvtx = False  # marks for a GPU profiler, two calls around each hook
    minutes = float(os.environ.get("DEEPSPEED_TIMEOUT", _TIMEOUT_MINUTES))
    _deepspeed.init_distributed(
        dist_backend="nccl" if place.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=minutes),
    )
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), local_rank=local_rank, device=place)


def leave_distributed() -> None:
    """Wait for the other processes of this job and end the connections; a rank that just exits may abort another."""
    if dist.is_initialized():
        dist.barrier()
        _deepspeed.comm.destroy_process_group()


def build(
    make_model: Callable[[], nn.Module],
    *,
    deepspeed: str | Path | Mapping[str, Any],
    optim: OptimConfig,
    batch: BatchConfig,
    train: TrainConfig,
    ranks: Ranks,
    zero_init: bool = False,
) -> Engine:
    """The model under DeepSpeed. Every rank starts from the same weights, drawn from `train.seed`.

    deepspeed: a shipped name, a path, or the loaded dict. zero_init: partition each module as soon as it is built, so
    that a model larger than one process's memory fits; only at stage 3.
    """
    config = dict(deepspeed) if isinstance(deepspeed, Mapping) else load_deepspeed_config(deepspeed)
    config = derive_config(config, optim=optim, batch=batch, world_size=ranks.world_size, device=ranks.device)
    if zero_init and config["zero_optimization"].get("stage") != 3:
        raise ValueError("building a model in pieces (zero_init) needs ZeRO stage 3")
    torch.manual_seed(train.seed)
    with _deepspeed.zero.Init(config_dict_or_path=config) if zero_init else nullcontext():
        model = make_model()
    make_optimizer = _optimizer_factory(config, optim, ranks)
    wrapped, *_ = _deepspeed.initialize(
        model=model,
        optimizer=make_optimizer,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=config,
        dist_init_required=False,
    )
    return Engine(wrapped, ranks=ranks, optim=optim, train=train)


def _optimizer_factory(
    config: Mapping[str, Any], optim: OptimConfig, ranks: Ranks
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """AdamW on all parameters alike: DeepSpeed's fused kernels where they build, else torch's.

        docs/ofa.md, Training: optimiser and schedule.
        """
    options = {"lr": optim.peak_lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    zero = config["zero_optimization"]
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return lambda parameters: DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    if ranks.device.type == "cuda" and zero.get("stage"):  # at stage 0 FusedAdam counts steps on its last tensor only
        usable = torch.tensor(_fused_adam_builds(), dtype=torch.int32, device=ranks.device)
        dist.all_reduce(usable, op=dist.ReduceOp.MIN)  # one kernel on all ranks
        if usable.item():
            return lambda parameters: FusedAdam(parameters, adam_w_mode=True, **options)
    return lambda parameters: torch.optim.AdamW(parameters, fused=True, **options)


def _fused_adam_builds() -> bool:
    try:
        FusedAdam([nn.Parameter(torch.zeros(1, device="cuda"))])
    except (ImportError, RuntimeError, OSError):  # no nvcc, a compiler it refuses, or another CUDA than torch's
        return False
    return True


class Engine:
    """A model that trains: call it, `backward` the loss, `step`; weights change at the last micro-batch of a step."""

    def __init__(self, wrapped: Any, *, ranks: Ranks, optim: OptimConfig, train: TrainConfig) -> None:
        self._wrapped = wrapped
        self._ranks = ranks
        self._optim = optim
        self._train = train
        self._stage0_norm: float | None = None
        self._average: MovingAverage | None = None
        if optim.ema_decay:
            self._average = MovingAverage(engine_state.masters(wrapped), self.buffers(), optim.ema_decay)
        self.rng_state: Tensor | None = None
        """Torch CPU generator as loaded from a checkpoint of the same world size."""

    @property
    def module(self) -> nn.Module:
        return self._wrapped.module

    @property
    def device(self) -> torch.device:
        return self._ranks.device

    @property
    def ranks(self) -> Ranks:
        return self._ranks

    @property
    def stage(self) -> int:
        """ZeRO stage, 0-3."""
        return int(self._wrapped.zero_optimization_stage())

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken; those that fp16 skipped for an overflow do not count."""
        return self._wrapped.global_steps - self._wrapped.skipped_steps

    @property
    def lr(self) -> float:
        """Learning rate of the last update."""
        return float(self._wrapped.optimizer.param_groups[0]["lr"])

    def _next_lr(self) -> float:
        """A function of the number of updates alone (docs/ofa.md, Training: optimiser and schedule)."""
        optim = self._optim
        return polynomial_lr(
            self.num_updates,
            peak_lr=optim.peak_lr,
            warmup_steps=optim.warmup_steps,
            num_steps=self._train.num_steps,
            end_lr=optim.end_lr,
        )

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping; inf where fp16 overflowed, 0 before any step."""
        norm = self._stage0_norm if self.stage == 0 else self._wrapped.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. At the start of a step the generators are seeded from (seed, step, rank)."""
        if self.module.training and self._wrapped.micro_steps % self._wrapped.gradient_accumulation_steps() == 0:
            torch.manual_seed(_mixed(self._train.seed, self._wrapped.global_steps, self._ranks.rank))
        return self._wrapped(*args, **kwargs)

    forward = __call__

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`: this micro-batch's sums, divided by the counts of the whole global batch."""
        self._wrapped.backward(loss * self._ranks.world_size, scale_wrt_gas=False)

    def step(self) -> bool:
        """End a micro-batch. At the last one of a step: clip, set the learning rate, update. Returns whether it was."""
        last = self._wrapped.is_gradient_accumulation_boundary()
        if last:
            for group in self._wrapped.optimizer.param_groups:
                group["lr"] = self._next_lr()
            if self.stage == 0:
                gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
                self._stage0_norm = torch.nn.utils.get_total_norm(gradients).item()
        before = self.num_updates
        self._wrapped.step()
        if self._average is not None and self.num_updates > before:
            self._average.update()
        return last

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self._ranks.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, by rank; all ranks must call it together."""
        if self._ranks.world_size == 1:
            return [value]
        values = [None] * self._ranks.world_size
        dist.all_gather_object(values, value)
        return values

    def full_weights(self) -> dict[str, Tensor] | None:
        """Every parameter and buffer, whole, on the CPU of rank 0 (None elsewhere). All ranks must call it together."""
        keep = self._ranks.rank == 0
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with _deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                if keep:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        if not keep:
            return None
        buffers = engine_state.saved_buffers(self.module)
        return weights | {name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers.items()}

    # What ofa_ds.checkpoint needs; the state itself is engine_state's business.

    def pieces(self) -> Iterator[engine_state.Piece]:
        """This rank's share of weights and moments. Only between optimizer steps: RuntimeError within one."""
        if self._wrapped.micro_steps % self._wrapped.gradient_accumulation_steps():
            raise RuntimeError("the training state is read within an accumulation; call it after the last micro-batch")
        return engine_state.pieces(self._wrapped, self._averages)

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights is kept (`optim.ema_decay`)."""
        return self._average is not None

    @property
    def _averages(self) -> engine_state.Averages | None:
        return None if self._average is None else self._average.by_master

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every parameter, partitioned or not."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.module.named_parameters()
        }

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers."""
        return engine_state.saved_buffers(self.module)

    def average_buffers(self) -> dict[str, Tensor]:
        """Those of the moving average; empty where none is kept."""
        return {} if self._average is None else self._average.buffers

    def agree_on_buffers(self) -> None:
        """Running statistics that differ between ranks become their mean."""
        engine_state.agree_on_buffers(self.buffers())
        engine_state.agree_on_buffers(self.average_buffers())

    def counters(self) -> dict[str, Any]:
        """Step numbers and the loss scale."""
        return engine_state.counters(self._wrapped)

    def rng_states(self) -> dict[str, Tensor]:
        return engine_state.rng_states(self.device)

    def set_rng_states(self, states: dict[str, Tensor]) -> None:
        engine_state.set_rng_states(self.device, states)
        self.rng_state = states.get("torch")

    def restore(
        self,
        read: engine_state.Read,
        read_buffer: Callable[[str], Tensor],
        saved: dict[str, Any],
        read_average_buffer: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Weights, moments, buffers and counters from a checkpoint of any stage and world size.

        read_average_buffer: where the checkpoint has a moving average; else one starts anew at these weights.
        """
        averages = self._averages if read_average_buffer is not None else None
        engine_state.restore(self._wrapped, read, saved, averages)
        with torch.no_grad():
            for name, buffer in self.buffers().items():
                buffer.copy_(read_buffer(name))
            if read_average_buffer is not None:
                for name, buffer in self.average_buffers().items():
                    buffer.copy_(read_average_buffer(name))
        if self._average is not None and read_average_buffer is None:
            self._average.restart()


def _mixed(seed: int, step: int, rank: int) -> int:
    """A 63-bit number that differs for any two (seed, step, rank): splitmix64 over the three."""
    value = 0
    for part in (seed, step, rank):
        value = (value + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1

"""The model under DeepSpeed: ZeRO stages 0-3, precision, AdamW, clipping and the learning rate.

The loss handed to `Engine.backward` is a share of a sum over all ranks and micro-batches that is already divided by
*global* counts. DeepSpeed averages over ranks and over accumulation; this module undoes that, so the gradient equals
that of one process on the whole global batch, whatever the ranks, the accumulation split or the stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig
from ofa_ds.engine import coalesced, replicas
from ofa_ds.engine import state as engine_state
from ofa_ds.engine.config import derive_config, load_deepspeed_config
from ofa_ds.engine.construction import construct
from ofa_ds.engine.deepspeed_import import deepspeed as _deepspeed
from ofa_ds.engine.gathering import gathered
from ofa_ds.engine.held import held
from ofa_ds.engine.host_memory import returning_freed_memory
from ofa_ds.engine.moving_average import MovingAverage
from ofa_ds.engine.optimizer import SkippingAdamW, kernel_name, optimizer_factory
from ofa_ds.engine.own_time import OwnTime
from ofa_ds.engine.process_group import gather
from ofa_ds.engine.ranks import Ranks
from ofa_ds.engine.schedule import generator_seed, polynomial_lr


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
    coalesced.install()
    torch.manual_seed(train.seed)
    on_cpu = ranks.device.type == "cpu"
    with returning_freed_memory(keep_after=on_cpu) if zero_init else nullcontext():
        model = construct(make_model, config, in_pieces=zero_init)
        make_optimizer = optimizer_factory(config, optim, ranks)
        wrapped, *_ = _deepspeed.initialize(
            model=model,
            optimizer=make_optimizer,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            config=config,
            dist_init_required=False,
        )
    return Engine(wrapped, config, ranks=ranks, optim=optim, train=train)


class Engine:
    """A model that trains: call it, `backward` the loss, `step`; weights change at the last micro-batch of a step."""

    def __init__(
        self, wrapped: Any, config: Mapping[str, Any], *, ranks: Ranks, optim: OptimConfig, train: TrainConfig
    ) -> None:
        """wrapped: DeepSpeed's engine, made from `config`."""
        self._wrapped = wrapped
        self._config = config
        self._ranks = ranks
        self._optim = optim
        self._train = train
        self._stage0_norm: float | None = None
        self._live_buffers = list(self.buffers().values())
        self._buffers_before = [buffer.clone() for buffer in self._live_buffers]
        self._skipped = self._rescaled = False
        self._discarding: Tensor | None = None
        self.own_time = OwnTime(ranks.device)
        """How long this rank is busy itself in a step; whoever takes the steps begins and ends it."""
        self._average: MovingAverage | None = None
        if optim.ema_decay:
            self._average = MovingAverage(engine_state.masters(wrapped), self.buffers(), optim.ema_decay)
        if hasattr(self._scaler, "raise_error_at_min_scale"):
            self._scaler.raise_error_at_min_scale = False  # what is skipped there is told, counted and bounded by us

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

    def describe(self) -> str:
        """How this engine trains, in one line: stage, offload, precision, optimiser kernel, batch, ranks, device."""
        config, zero = self._config, self._config["zero_optimization"]
        offloaded = [
            f"{what} on {zero[key]['device']}"
            for what, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param"))
            if zero.get(key, {}).get("device", "none") != "none"
        ]
        precision = next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")), "fp32")
        micro, steps = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
        world_size, device = self._ranks.world_size, self.device
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return (
            f"ZeRO stage {self.stage}; offload: {', '.join(offloaded) or 'none'}; {precision}; "
            f"{kernel_name(engine_state.base(self._wrapped))}; {micro * steps * world_size} rows a step = {micro} x "
            f"{steps} micro-batches x {world_size} {'rank' if world_size == 1 else 'ranks'} on {place}"
        )

    @property
    def num_updates(self) -> int:
        """Optimizer steps taken; those that were skipped do not count."""
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
            torch.manual_seed(generator_seed(self._train.seed, self._wrapped.global_steps, self._ranks.rank))
            self._copy_buffers(back=False)
        return self._wrapped(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`: this micro-batch's sums, divided by the counts of the whole global batch.

        A loss that is not finite makes all of the gradient so, and with it the norm, on which all ranks agree anyway:
        that is how one rank's loss stops the step of all without a message of its own.
        """
        factor = self._ranks.world_size + 0 * loss.detach()  # nan where the loss is infinite or nan
        if self._discarding is not None:
            factor = factor.masked_fill(self._discarding, math.nan)
        self._wrapped.backward(loss * factor, scale_wrt_gas=False)

    def discard(self, when: Tensor) -> None:
        """Before the last `backward` of a step: where `when` (bool scalar) is true, it is skipped on all ranks.

        On any rank is enough. It is read when the step has ended, so that nothing waits for it before.
        """
        self._discarding = when

    def step(self) -> None:
        """End a micro-batch. At the last one of a step: clip, set the learning rate, update.

        Where the loss of any rank or the norm of the gradient is not finite, nothing is updated: weights, moments,
        moving average, buffers and the count of updates stay as they were, on all ranks; `skipped` then says so.
        """
        if not self._wrapped.is_gradient_accumulation_boundary():
            self._wrapped.step()
            return
        for group in self._wrapped.optimizer.param_groups:
            group["lr"] = self._next_lr()
        if self.stage == 0:
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            self._stage0_norm = torch.nn.utils.get_total_norm(gradients).item()
            assert isinstance(self._wrapped.optimizer, SkippingAdamW)
            self._wrapped.optimizer.overflow = not math.isfinite(self._stage0_norm)
        before, scale = self.num_updates, self.loss_scale
        scaler = engine_state.scaler_state(self._wrapped)
        self._wrapped.step()
        if self._discarding is not None:
            if bool(self._discarding):  # which is no overflow
                engine_state.set_scaler_state(self._wrapped, scaler)
            self._discarding = None
        self._skipped = self.num_updates == before
        self._rescaled = self._skipped and self.loss_scale < scale
        if self._skipped:
            self._copy_buffers(back=True)
        elif self._average is not None:
            self._average.update()

    def pass_over(self) -> None:
        """Count a step that nobody takes: what follows has its own number's randomness, all else stays as it is."""
        self._wrapped.global_steps += 1
        self._wrapped.skipped_steps += 1
        self._wrapped.global_samples += self._wrapped.train_batch_size()

    @property
    def skipped(self) -> bool:
        """Whether the last step changed nothing: a loss or the gradient was not finite, or `discard` was called."""
        return self._skipped

    @property
    def rescaled(self) -> bool:
        """Whether it was skipped with a loss scale of fp16 that could be lowered and was: that may be all."""
        return self._rescaled

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's loss scaler; None where there is none."""
        return getattr(self._wrapped.optimizer, "loss_scaler", None)

    @property
    def loss_scale(self) -> float:
        """By which fp16 multiplies the loss; 1 in other precisions."""
        return float(getattr(self._scaler, "cur_scale", 1.0))

    @torch.no_grad()
    def _copy_buffers(self, *, back: bool) -> None:
        """Running statistics move in the forward, before anyone knows whether the step is to count."""
        if self._live_buffers:
            pair = (self._live_buffers, self._buffers_before)
            torch._foreach_copy_(*(pair if back else reversed(pair)))

    def replay(self, *args: Any, **kwargs: Any) -> int:
        """A forward of the first micro-batch of a step that leaves no trace: the bits of its first output, summed.

        All ranks call it together; the same again gives the same number, unless something is broken.
        """
        with torch.no_grad():
            output, *_ = self(*args, **kwargs)
            self._copy_buffers(back=True)
            return int(replicas.bits(output))

    def replicated_sums(self, *, with_buffers: bool) -> dict[str, int]:
        """A number per tensor that all ranks hold alike; see `replicas`. with_buffers: these too are to be alike."""
        tensors = dict(replicas.replicated(self._wrapped))
        for prefix, buffers in (("", self.buffers()), ("average of ", self.average_buffers())):
            tensors |= {
                f"{prefix}{name}": buffer
                for name, buffer in buffers.items()
                if with_buffers or not buffer.is_floating_point()
            }
        return replicas.sums(tensors)

    def unlike_master(self) -> list[str]:
        """Parameters of which this rank's share is not what its fp32 master says."""
        return replicas.unlike_master(self._wrapped)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self._ranks.world_size > 1:
            with self.own_time.waits.inside():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, by rank; all ranks must call it together."""
        return gather(self._ranks, value)

    def gathered(self, *, average: bool = False) -> AbstractContextManager[nn.Module]:
        """The model with every weight whole, in evaluation mode, for generation between two steps.

        It may be called as often as a rank likes and without the others; all enter and leave together. average: the
        moving average of the weights, as far as one is kept. Only between optimizer steps.
        """
        return gathered(self._wrapped, self._averages if average else None, self.average_buffers())

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

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """What is held for good, and what for (`ofa_ds.engine.held`)."""
        return held(self._wrapped)

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

"""Training state inside a DeepSpeed engine, piece by piece: which flat range of a tensor this rank holds, and where.

A piece is a run of a parameter's elements in row-major order. Stage 3 cuts a parameter of n elements into
ceil(n / world) contiguous pieces, the last ones shorter or empty; stages 1 and 2 cut one flat buffer of all parameters,
so pieces are uneven; what is replicated (stage 0, frozen parameters at 1 and 2) is shared out by the stage 3 rule.
Padding is never shown.

Works on attributes of DeepSpeed's optimizers (0.16-0.19) and imports nothing of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ofa_ds.engine.partition import AVERAGE, KINDS, MOMENTS, even_range

_FLAT_BUFFERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Names of the fp32 master buffers: stage 3, stages 1 and 2, stage 1 with bf16 and fp32 accumulation."""

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Averages = Mapping[Tensor, Tensor]
"""The moving average of each of `masters`, in its shape."""
Read = Callable[[str, str, int, int], Tensor]
"""read(name, kind, start, numel) -> fp32 tensor [numel] on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    trainable: bool
    kinds: tuple[str, ...]
    """What there is of the parameter, on any rank: the moments exist from the first optimizer step on."""
    even: bool
    """Cut by the stage 3 rule, so that (shape, rank, world size) tells start and numel."""
    tensors: dict[str, Tensor]
    """Live fp32 views [numel] per kind; a copy where the engine keeps no fp32 one. Empty where numel is 0."""


def pieces(wrapped: Any, averages: Averages | None = None) -> Iterator[Piece]:
    """Every parameter, tied ones once, in the order of `named_parameters`, with what this rank is to write of it."""
    trained = KINDS if _adam_step(wrapped) > 0 else KINDS[:1]
    trained += (AVERAGE,) if averages is not None else ()
    local = _Local(wrapped, averages)
    for name, parameter in wrapped.module.named_parameters():
        shape, start, numel, even = local.owned(parameter)
        kinds = trained if parameter.requires_grad else KINDS[:1]
        tensors = {}
        if numel:
            views = local.views(parameter, numel)
            if views is not None:
                tensors = {kind: view for kind, view in views.items() if kind in kinds}
            elif hasattr(parameter, "ds_id"):
                tensors = {"weight": parameter.ds_tensor.detach().view(-1)[:numel].float()}
            else:
                whole = local.replicated(parameter)
                tensors = {kind: view[start : start + numel].float() for kind, view in whole.items()}
        yield Piece(
            name=name,
            shape=shape,
            start=start,
            numel=numel,
            trainable=parameter.requires_grad,
            kinds=kinds,
            even=even,
            tensors=tensors,
        )


def local_state(wrapped: Any, averages: Averages | None = None) -> _Local:
    """This rank's share of each parameter, looked up."""
    return _Local(wrapped, averages)


class _Local:
    """What this rank has of each parameter. Looks each of the engine's buffers up once: training waits meanwhile."""

    def __init__(self, wrapped: Any, averages: Averages | None) -> None:
        self._optimizer = wrapped.optimizer
        self._state = base(wrapped).state
        self._averages = averages
        self._masters = masters(wrapped)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._known: dict[Tensor, dict[str, Tensor]] = {}

    def owned(self, parameter: nn.Parameter) -> tuple[tuple[int, ...], int, int, bool]:
        """(full shape, start, numel, cut evenly) of this rank's piece."""
        if hasattr(parameter, "ds_id"):  # stage 3
            return (tuple(parameter.ds_shape), *even_range(parameter.ds_numel, self._rank, self._world_size), True)
        shape = tuple(parameter.shape)
        if not hasattr(parameter, "_hp_mapping"):  # replicated
            return (shape, *even_range(parameter.numel(), self._rank, self._world_size), True)
        if parameter._hp_mapping is None:  # stage 1 or 2, held by other ranks
            return shape, 0, 0, False
        address = parameter._hp_mapping.lp_fragment_address
        return shape, address.start, address.numel, False

    def views(self, parameter: nn.Parameter, numel: int | None = None) -> dict[str, Tensor] | None:
        """Live fp32 master, moments and average of this rank's piece; None: no master.

        numel: elements from the first on; None: all, stage 3 padding included.
        """
        if hasattr(parameter, "ds_id"):
            if not parameter.requires_grad:
                return None
            group, offset, room = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        elif getattr(parameter, "_hp_mapping", None) is not None:
            mapping = parameter._hp_mapping
            group, address = mapping.param_group_index, mapping.hp_fragment_address
            offset, room = address.start, address.numel
        else:
            return None
        count = room if numel is None else numel
        return {kind: tensor.narrow(0, offset, count) for kind, tensor in self._kept(self._masters[group]).items()}

    def replicated(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Live and whole, flat."""
        return {kind: tensor.view(-1) for kind, tensor in self._kept(parameter).items()}

    def _kept(self, master: Tensor) -> dict[str, Tensor]:
        """A master and what there is beside it, by kind."""
        if master not in self._known:
            state = self._state.get(master, {})
            tensors = {"weight": master.detach()} | {kind: state[kind] for kind in MOMENTS if kind in state}
            if self._averages is not None and master in self._averages:
                tensors[AVERAGE] = self._averages[master]
            self._known[master] = tensors
        return self._known[master]


def base(wrapped: Any) -> torch.optim.Optimizer:
    """The AdamW inside the ZeRO optimizer."""
    return getattr(wrapped.optimizer, "optimizer", wrapped.optimizer)


def masters(wrapped: Any) -> list[Tensor]:
    """What AdamW updates: flat fp32 buffers, or at stage 0 the parameters."""
    for name in _FLAT_BUFFERS:
        if hasattr(wrapped.optimizer, name):
            return getattr(wrapped.optimizer, name)
    return [parameter for group in base(wrapped).param_groups for parameter in group["params"]]


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by name, in the order of `state_dict`, which would take four times as long."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, each in module.named_modules()
        for name, buffer in each._buffers.items()
        if buffer is not None and name not in each._non_persistent_buffers_set
    }


@torch.no_grad()
def agree_on_buffers(buffers: Mapping[str, Tensor]) -> None:
    """Make buffers the same on all ranks: the mean of those that differ (running statistics); the largest counter."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers.values():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for dtype, group in by_dtype.items():  # a ResNet has hundreds of small ones: few messages, not many
        flat = torch.cat([buffer.reshape(-1) for buffer in group])
        bounds = torch.stack([flat, -flat])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        agreed, low = bounds[0], -bounds[1]
        if dtype.is_floating_point and not torch.equal(low, agreed):
            dist.all_reduce(flat)
            agreed = torch.where(low == agreed, agreed, flat / world_size)
        sizes = [buffer.numel() for buffer in group]
        for buffer, values in zip(group, agreed.split(sizes), strict=True):
            buffer.copy_(values.view_as(buffer))


def counters(wrapped: Any) -> dict[str, Any]:
    """Everything beside tensors that the next step depends on; plain JSON values."""
    return {
        "adam_step": _adam_step(wrapped),
        "global_steps": wrapped.global_steps,
        "skipped_steps": wrapped.skipped_steps,
        "global_samples": wrapped.global_samples,
        "loss_scaler": scaler_state(wrapped),
    }


def scaler_state(wrapped: Any) -> dict[str, Any]:
    """Of fp16's loss scale; empty where there is none that moves."""
    scaler = getattr(wrapped.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_STATE if hasattr(scaler, key)}


def set_scaler_state(wrapped: Any, saved: Mapping[str, Any]) -> None:
    scaler = getattr(wrapped.optimizer, "loss_scaler", None)
    for key, value in saved.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _adam_step(wrapped: Any) -> int:
    adam = base(wrapped)
    found = {int(state["step"]) for state in adam.state.values() if "step" in state}
    found |= {int(group["step"]) for group in adam.param_groups if "step" in group and not adam.state}
    if len(found) > 1:
        raise RuntimeError(f"the optimizer counts different steps for its parameters: {sorted(found)}; cannot be saved")
    return found.pop() if found else 0


@torch.no_grad()
def restore(wrapped: Any, read: Read, saved: dict[str, Any], averages: Averages | None = None) -> None:
    """Fill weights, moments, averages and counters, whatever stage and world size wrote them.

    saved: from `counters`. averages: those to be filled; None where the state has none.
    """
    optimizer = wrapped.optimizer
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if stage3:
        optimizer.checkpoint_event_prologue()  # partitions every parameter, those that stay gathered too
    _make_state(wrapped, saved["adam_step"])
    local = _Local(wrapped, averages)
    for name, parameter in wrapped.module.named_parameters():
        _restore_parameter(local, name, parameter, read)
    if stage3:
        for parameter in wrapped.module.parameters():
            parameter.ds_secondary_tensor = None  # hpZ: the epilogue forgets only those of trainable parameters
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        if hasattr(optimizer, "_hp_optimizer_states_linked"):
            optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for key in ("global_steps", "skipped_steps", "global_samples"):
        setattr(wrapped, key, saved[key])
    set_scaler_state(wrapped, saved["loss_scaler"])


def _restore_parameter(local: _Local, name: str, parameter: nn.Parameter, read: Read) -> None:
    _, start, numel, even = local.owned(parameter)
    views = local.views(parameter)
    if views is not None:
        for kind, view in views.items():
            view.zero_()  # padding too
            view[:numel].copy_(read(name, kind, start, numel))
        if hasattr(parameter, "ds_id"):
            parameter.ds_tensor.view(-1).copy_(views["weight"])  # the copy that forward gathers
    elif hasattr(parameter, "ds_id"):  # frozen, stage 3
        parameter.ds_tensor.view(-1)[:numel].copy_(read(name, "weight", start, numel))
    elif even:  # replicated: this rank needs all of it
        for kind, view in local.replicated(parameter).items():
            view.copy_(read(name, kind, 0, parameter.numel()))


def _make_state(wrapped: Any, step: int) -> None:
    """Give a fresh optimizer the moments it lacks, in the form its class wants, learnt from a one-element probe."""
    adam = base(wrapped)
    flats = masters(wrapped)
    known = inspect.signature(type(adam).__init__).parameters  # AdamW.defaults holds a key that AdamW() refuses
    probe_weight = nn.Parameter(torch.zeros(1, device=flats[0].device))
    probe_weight.grad = torch.zeros_like(probe_weight)
    probe = type(adam)([probe_weight], **{key: value for key, value in adam.defaults.items() if key in known})
    probe.step()
    for flat in flats:
        adam.state[flat].clear()
        if not step:
            continue
        for key, value in probe.state[probe_weight].items():
            if key == "step":
                adam.state[flat][key] = torch.full_like(value, step) if torch.is_tensor(value) else type(value)(step)
            else:
                adam.state[flat][key] = torch.zeros_like(flat, dtype=value.dtype)
    for group in adam.param_groups:
        if "step" in probe.param_groups[0]:
            group["step"] = type(probe.param_groups[0]["step"])(step)


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Generator states as uint8 tensors."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(device: torch.device, states: dict[str, Tensor]) -> None:
    """Inverse of `rng_states`; states of a device that is not here are left out."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)

"""A model whose every weight is whole, for generation between training steps: gathered once, not once a token.

Under ZeRO-3 a module's weights exist inside its own call, and the calls of all ranks go together. Generation calls the
model for every token, and ranks need different numbers of them. So the weights are gathered before and partitioned
after, and in between a copy of the modules that shares their storage, but none of DeepSpeed's hooks, is called freely.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ofa_ds.engine import state as engine_state
from ofa_ds.engine.deepspeed_import import deepspeed as _deepspeed
from ofa_ds.engine.partition import AVERAGE


@contextmanager
def gathered(
    wrapped: Any, averages: engine_state.Averages | None, buffers: Mapping[str, Tensor]
) -> Iterator[nn.Module]:
    """The model in evaluation mode, under no_grad; all ranks enter and leave together, between optimizer steps.

    averages: take these instead of the weights, and `buffers` instead of the model's own; None for what is trained.
    """
    with torch.no_grad():
        if averages is not None:
            model = twin(wrapped.module)
            _put(model, _whole_averages(wrapped, averages), buffers)
            yield model
            return
        parameters = list(wrapped.module.parameters())
        stage3 = wrapped.zero_optimization_stage() == 3
        with _deepspeed.zero.GatheredParameters(parameters) if stage3 else nullcontext():
            yield twin(wrapped.module)


def twin(module: nn.Module) -> nn.Module:
    """The same modules in evaluation mode on the same parameters and buffers, without any hook."""
    return _twin(module, {})


def _twin(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in known:
        fresh = nn.Module().__dict__  # its empty hooks
        new = copy.copy(module)
        new.__dict__ = {
            **module.__dict__, **{name: value for name, value in fresh.items() if name.endswith(("hooks", "kwargs"))},
            "training": False, "_buffers": dict(module._buffers),
            "_parameters": {
                name: None if each is None else nn.Parameter(each.data, requires_grad=False)
                for name, each in module._parameters.items()
            },
        }  # fmt: skip
        known[id(module)] = new
        new.__dict__["_modules"] = {
            name: None if child is None else _twin(child, known) for name, child in module._modules.items()
        }
    return known[id(module)]


def _put(model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    for kind, tensors in (("_parameters", parameters), ("_buffers", buffers)):
        for name, tensor in tensors.items():
            owner, _, last = name.rpartition(".")
            own = getattr(model.get_submodule(owner), kind)
            own[last] = nn.Parameter(tensor, requires_grad=False) if kind == "_parameters" else tensor


def _whole_averages(wrapped: Any, averages: engine_state.Averages) -> dict[str, Tensor]:
    """The moving average of every parameter, whole, in the precision of the forward; a frozen one itself."""
    whole: dict[str, Tensor] = {}
    parameters = dict(wrapped.module.named_parameters())
    for piece in engine_state.pieces(wrapped, averages):
        parameter = parameters[piece.name]
        total = torch.zeros(piece.shape, device=wrapped.device)
        if piece.numel:
            own = piece.tensors[AVERAGE if AVERAGE in piece.tensors else "weight"]
            total.view(-1)[piece.start : piece.start + piece.numel] = own.to(total.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)  # each element is one rank's
        whole[piece.name] = total.to(parameter.dtype)
    return whole

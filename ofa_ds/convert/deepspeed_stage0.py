"""DeepSpeed's checkpoints without ZeRO (stage 0): one file, in which moments have numbers and parameters have names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.checkpoint.format import TensorInfo
from ofa_ds.checkpoint.state import ForeignState
from ofa_ds.convert.deepspeed_states import facts_of, open_states, origin_of, plain_name, step_of
from ofa_ds.engine.partition import KINDS, MOMENTS


def read_stage0(path: Path) -> ForeignState:
    """The state in a `mp_rank_00_model_states.pt` of stage 0, in fp32.

    Raises ValueError where it does not say which parameter a moment is of: some are frozen or tied.
    """
    file = open_states(path, "module", "buffer_names", "optimizer")
    content = file.content
    optimizer = content["optimizer"] or {"state": {}, "param_groups": []}
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    buffers = {plain_name(name): content["module"][name] for name in content["buffer_names"]}
    weights = {plain_name(name): tensor for name, tensor in content["module"].items()}
    weights = {name: tensor for name, tensor in weights.items() if name not in buffers}
    if len(numbers) != len(weights):
        raise ValueError(
            f"{path}: an optimizer of {len(numbers)} tensors and {len(weights)} parameters: stage 0 does not say "
            "which are frozen or tied; save it at stage 1, 2 or 3"
        )
    states = dict(zip(weights, (optimizer["state"].get(number, {}) for number in numbers), strict=True))
    group = optimizer["param_groups"][0]
    adam_step = _check(path, weights, states, group)
    kinds = KINDS if adam_step else KINDS[:1]
    return ForeignState(
        tensors={name: TensorInfo(shape=tuple(tensor.shape), kinds=kinds) for name, tensor in weights.items()},
        buffers={name: tuple(tensor.shape) for name, tensor in buffers.items()},
        facts=facts_of(file, adam_step=adam_step, scaler=None, origin=origin_of(0, content["dp_world_size"], group)),
        read=lambda name, kind, start, numel: file.read(
            weights[name] if kind == "weight" else states[name][kind], start, numel
        ),
        buffer=lambda name: buffers[name].clone(),
    )


def _check(path: Path, weights: dict[str, Tensor], states: dict[str, dict[str, Any]], group: dict[str, Any]) -> int:
    """Adam's step. Raises ValueError where weights are no fp32 or moments of another shape."""
    steps = {step_of(path, state, group) for state in states.values()}
    if len(steps) != 1:
        raise ValueError(f"{path}: its optimizer counts different steps: {sorted(steps)}")
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{path}: {name} is {tensor.dtype}: at stage 0 only fp32 is read")
        for kind in MOMENTS if steps != {0} else ():
            if states[name][kind].shape != tensor.shape:
                found = tuple(states[name][kind].shape)
                raise ValueError(f"{path}: {kind} of {name} is {found}, want {tuple(tensor.shape)}")
    return steps.pop()

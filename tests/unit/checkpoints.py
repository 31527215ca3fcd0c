"""Small checkpoints for tests: of any tensors, and of a real OFA with every kind of state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.checkpoint.format import Facts, TensorInfo
from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.checkpoint.manifest import read_manifest
from ofa_ds.checkpoint.state import ForeignState, Reader
from ofa_ds.config import load_recipe, recipe_from_dict, recipe_to_dict
from ofa_ds.convert.architecture import recipe_change
from ofa_ds.model.config import ModelConfig
from ofa_ds.model.ofa import OFA

COUNTERS = {
    "adam_step": 7, "global_steps": 8, "skipped_steps": 1, "global_samples": 96,
    "loss_scaler": {"cur_scale": 65536.0, "cur_iter": 8, "last_overflow_iter": 1, "cur_hysteresis": 2},
}  # fmt: skip


def state_of(
    tensors: Mapping[str, Tensor],
    *,
    kinds: Mapping[str, tuple[str, ...]],
    buffers: Mapping[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
) -> ForeignState:
    """A training state in memory: weights as given; moments and averages differ from them by a constant."""
    offsets = {"weight": 0.0, "exp_avg": 1.0, "exp_avg_sq": 2.0, "ema": 3.0}
    buffers = dict(buffers or {})
    average = any("ema" in each for each in kinds.values())
    return ForeignState(
        tensors={
            name: TensorInfo(shape=tuple(each.shape), trainable="exp_avg" in kinds[name], kinds=kinds[name])
            for name, each in tensors.items()
        },
        buffers={name: tuple(each.shape) for name, each in buffers.items()},
        ema_buffers={name: tuple(each.shape) for name, each in buffers.items()} if average else {},
        facts=Facts(step=8, state=COUNTERS, rng_ranks=0, extra=extra or {}),
        read=lambda name, kind, start, n: tensors[name].reshape(-1)[start : start + n].float() + offsets[kind],
        buffer=lambda name: buffers[name],
        ema_buffer=lambda name: buffers[name] + 1,
    )


def whole(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, put together from all files."""
    reader = Reader(path, read_manifest(path))
    found = {
        f"{kind}|{name}": reader.read(name, kind, 0, info.numel).reshape(info.shape)
        for name, info in reader.tensors.items()
        for kind in info.kinds
    }
    found |= {f"buffer|{name}": reader.buffer(name) for name in reader.buffers}
    return found | {f"ema_buffer|{name}": reader.ema_buffer(name) for name in reader.ema_buffers}


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names that only one has, or whose dtype, shape or any bit differs."""
    both = one.keys() & other.keys()
    unlike = (name for name in both if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name]))
    return sorted(one.keys() ^ other.keys()) + sorted(unlike)


def ofa_checkpoint(
    path: Path, config: ModelConfig, *, ranks: int = 2, kinds: tuple[str, ...] = ("weight", "exp_avg", "exp_avg_sq"),
    scale: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """A checkpoint of a random OFA; returns its parameters and buffers."""
    torch.manual_seed(5)
    model = OFA(config)
    parameters = {name: scale * torch.randn_like(each) for name, each in model.named_parameters()}
    buffers = {name: each for name, each in model.state_dict().items() if name not in parameters}
    buffers = {name: torch.rand_like(each) if each.is_floating_point() else each + 41 for name, each in buffers.items()}
    recipe = recipe_to_dict(load_recipe("pretrain-tiny"))
    recipe["model"] |= recipe_change(config)
    recipe["data"]["code_image_size"] = config.code_image_size
    extra = {"recipe": recipe_to_dict(recipe_from_dict(recipe)), "identity": {"data": "d", "vocab": None}}
    state = state_of(parameters, kinds=dict.fromkeys(parameters, kinds), buffers=buffers, extra=extra)
    write_checkpoint(path, state, ranks=ranks, stage=3)
    return parameters | buffers

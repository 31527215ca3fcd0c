"""How a model runs on the device it is on: which implementations compute it, and whether its bits repeat."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ofa_ds.model.config import ModelConfig
from ofa_kernels.choice import describe


def implementations(model: nn.Module, config: ModelConfig, *, training: bool) -> str:
    """One line: what computes attention, norms and the vocabulary's loss, and why."""
    weight = next(model.parameters())
    kernels = dataclasses.asdict(config.kernels)
    return describe(**kernels, device=weight.device, dtype=weight.dtype, training=training)


def repeat_bits(config: ModelConfig) -> None:
    """Before training: where the recipe promises the same bits in every run, cuDNN's convolutions keep to it.

    Of the whole process.
    """
    if config.kernels.deterministic:
        torch.backends.cudnn.deterministic = True

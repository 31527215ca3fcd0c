"""Run by test_zero_init.py in a process of its own: DeepSpeed keeps global state."""

from __future__ import annotations

import dataclasses
import sys

import deepspeed
import torch

from ofa_ds.engine.process_group import init_distributed
from ofa_ds.model.config import ModelConfig, ResNetConfig, ViTConfig, preset
from ofa_ds.model.ofa import OFA

SMALL = preset("nano", vocab_size=60, dim=16, ffn_dim=32, num_heads=2)
CONFIGS = (
    SMALL,
    dataclasses.replace(SMALL, backbone=ResNetConfig(depths=(1, 1, 1))),
    dataclasses.replace(SMALL, backbone=ViTConfig(resolution=28, patch_size=14, channels=8, layers=1, heads=2)),
    dataclasses.replace(SMALL, use_ofasys=True, gamma=0.5),
)
ZERO3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def differing(config: ModelConfig) -> list[str]:
    """Parameters and buffers that plain construction and zero.Init build differently from one seed."""
    torch.manual_seed(3)
    plain = OFA(config)
    torch.manual_seed(3)
    with deepspeed.zero.Init(config_dict_or_path=ZERO3):
        partitioned = OFA(config)
    names = [name for name, buffer in partitioned.named_buffers() if not torch.equal(buffer, plain.get_buffer(name))]
    for name, parameter in partitioned.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter.data, plain.get_parameter(name).data):
                names.append(name)
    return names


if __name__ == "__main__":
    init_distributed("cpu")
    sys.exit("; ".join(name for config in CONFIGS for name in differing(config)) or 0)

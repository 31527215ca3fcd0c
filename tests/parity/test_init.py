"""Freshly built models are distributed as the original's."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from ofa_ds.model.config import ModelConfig, ViTConfig, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.terms import PAD_ID

VIT_B16 = ViTConfig(resolution=224, patch_size=16, channels=768, layers=9, heads=12)
SIGMAS = 6
"""Both sides are one draw; this many standard errors of their difference are allowed (1 in 10^8 for one figure)."""


def config_of(name: str) -> ModelConfig:
    """`ofa_tiny`, or `ofa_tiny_vit` for the same with the official ViT."""
    name = name.removeprefix("ofa_")
    config = preset(name.removesuffix("_vit"))
    return dataclasses.replace(config, backbone=VIT_B16) if name.endswith("_vit") else config


@pytest.mark.golden("init_stats.json")
def test_initial_weights_are_distributed_as_the_original(golden_file: Path) -> None:
    for name, expected in json.loads(golden_file.read_text()).items():
        torch.manual_seed(0)
        parameters = dict(OFA(config_of(name)).named_parameters())
        parameter_stats = {key: stats for key, stats in expected.items() if not key.startswith("__")}
        assert parameter_stats.keys() == parameters.keys()
        for key, stats in parameter_stats.items():
            assert list(parameters[key].shape) == stats["shape"]
            check_draw(key, parameters[key].detach(), stats)
        pad_row = parameters["encoder.embed_tokens.weight"][PAD_ID]
        assert (pad_row.abs().max().item() > 0) == (expected.get("__embed_pad_row_absmax", 1.0) > 0)


def check_draw(key: str, value: torch.Tensor, stats: dict[str, float]) -> None:
    if stats["const"]:
        assert float(value.min()) == float(value.max()) == stats["mean"], f"{key}: want the constant {stats['mean']}"
        return
    num, std = value.numel(), stats["std"]
    error = SIGMAS * math.sqrt(2 / num)
    assert abs(value.mean().item() - stats["mean"]) <= error * std, f"{key}: mean"
    assert abs(value.std().item() / std - 1) <= error, f"{key}: std {value.std().item()}, want {std}"
    if num >= 1000:  # tells a uniform draw (at most 1.7 std) from a normal one (over 3)
        assert 0.6 <= value.abs().max().item() / stats["absmax"] <= 1.67, f"{key}: largest value"


def test_the_seed_decides_the_weights() -> None:
    def built(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return OFA(preset("nano", vocab_size=50)).state_dict()

    first, same, other = built(1), built(1), built(2)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["encoder.embed_tokens.weight"], other["encoder.embed_tokens.weight"])

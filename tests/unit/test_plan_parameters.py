"""The inventory of parameters that plans are made from is the model's."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import nn

from ofa_ds.config.architecture import PRESETS, ModelConfig, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.plan.parameters import LEAF_CLASSES, num_parameters, parameters

CHANGES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PRESETS),
    ("tiny", {"batch_norm": "frozen"}),
    ("nano", {"max_positions": 64, "image_bucket_size": 4, "token_bucket_size": 8, "vocab_size": 7}),
    ("nano", {"use_ofasys": True, "gamma": 0.1}),
    ("nano", {"use_ofasys": True, "entangle_position_embedding": True, "share_attn_bias": True, "gamma": 1.0}),
    ("nano", {"backbone": {"patch_size": 4, "channels": 24}}),
    ("nano", {"backbone": {"resolution": 32, "patch_size": 8, "channels": 24, "layers": 3, "heads": 2}}),
]


@pytest.mark.parametrize("name, changes", CHANGES)
def test_names_and_shapes_are_those_of_the_model_in_its_order(name, changes):
    config = preset(name, **changes)
    with torch.device("meta"):
        model = OFA(config)
    real = [(name, tuple(each.shape)) for name, each in model.named_parameters()]
    planned = [(each.name, each.shape) for each in parameters(config)]
    assert planned == real
    assert num_parameters(config) == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("name", ["nano", "tiny", "6b_share_attn_bias"])
def test_units_are_the_modules_that_gather_whatever_class_is_a_leaf(name):
    config = dataclasses.replace(PRESETS[name], encoder_layers=12, decoder_layers=2)
    with torch.device("meta"):
        modules = dict(OFA(config).named_modules())
    with_parts = {type(each).__name__ for each in modules.values() if [*each.children()] and [*each.parameters()]}
    with_parts -= {"OFA", "ModuleList"}
    for classes in ((), LEAF_CLASSES, ("Attention", "Decoder"), *((each,) for each in with_parts)):
        check_units(config, modules, classes)


def check_units(config: ModelConfig, modules: dict[str, nn.Module], classes: tuple[str, ...]) -> None:

    def unit(name: str) -> str:
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts))]
        return next((each for each in above if type(modules[each]).__name__ in classes), above[-1])

    for each in parameters(config, leaf_classes=classes):
        assert each.unit == unit(each.name), each.name


def test_an_unknown_leaf_class_is_told():
    with pytest.raises(ValueError, match="leaf module class Encodr: the model has none; classes are Encoder, "):
        parameters(PRESETS["nano"], leaf_classes=("Encodr",))


def test_the_largest_model_takes_a_moment():
    begin = time.process_time()
    assert num_parameters(PRESETS["6b"]) > 6e9
    assert time.process_time() - begin < 1

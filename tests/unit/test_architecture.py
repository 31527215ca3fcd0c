"""No model is made of sizes that make none, whether a recipe, an import or a test asks for it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from recipes import problem

from ofa_ds.config import load_recipe, recipe_from_dict, recipe_to_dict, saved
from ofa_ds.config.architecture import OWNED_BY_RECIPE, PRESETS, ModelChange, ModelConfig, ViTConfig, preset
from ofa_ds.config.sections import keys_of


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("encoder_layers=-1", "model.change.encoder_layers: Input should be greater than or equal to 1, got -1"),
        ("num_heads=0", "model.change.num_heads: Input should be greater than or equal to 1, got 0"),
        ("num_heads=3", "model.change: dim 128 is not a multiple of num_heads 3, in preset nano"),
        ("encoder_layrs=2", "unknown key model.change.encoder_layrs; did you mean encoder_layers?"),
        ("dropout=0.1", "unknown key model.change.dropout; the recipe sets it as model.dropout"),
        ("init_std=0", "model.change.init_std: Input should be greater than 0, got 0"),
        ("token_bucket_size=1", "model.change.token_bucket_size: Input should be greater than or equal to 2, got 1"),
        ("token_bucket_size=2046", "model.change.token_bucket_size: Input should be less than or equal to 2045"),
        ("gamma=0.5", "model.change: share_attn_bias, entangle_position_embedding and gamma need use_ofasys = true"),
        ("backbone=3", "model.change.backbone is a section, got 3; want model.change.backbone.NAME=VALUE"),
        ("backbone={channels=8}", "model.change.backbone.patch_size: is missing"),
        ("backbone={chanels=8}", "unknown key model.change.backbone.chanels; did you mean channels?"),
        ("backbone={patch_size=12,channels=8}", "convolutional stem: patch_size 12 is not a power of 2"),
        ("backbone={patch_size=16,channels=7}", "convolutional stem: channels 7 is less than half of patch_size 16"),
        ("backbone={depths=[1,1,1],patch_size=14}", "model.change.backbone.patch_size: Input should be 16, got 14"),
        ("backbone={depths=[1,0,1]}", "model.change.backbone.depths.1: Input should be greater than or equal to 1"),
        (
            "backbone={resolution=28,patch_size=14,channels=30,layers=1,heads=4}",
            "model.change.backbone: ViT: channels 30 is not a multiple of heads 4",
        ),
    ],
)
def test_a_change_of_the_model_is_typed_like_the_rest_of_the_recipe(change, message) -> None:
    assert message in problem(f"model.change.{change}")


def test_a_backbone_is_known_by_what_it_has_and_may_be_set_key_by_key() -> None:
    keys = ("resolution=28", "patch_size=14", "channels=32", "layers=1", "heads=4")
    recipe = load_recipe("pretrain-nano", [f"model.change.backbone.{key}" for key in keys])
    wanted = ViTConfig(resolution=28, patch_size=14, channels=32, layers=1, heads=4)
    assert recipe.model.change == {"backbone": wanted}
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


WRONG = [-1, 2**40, float("inf"), float("nan"), "many", [], {}]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_no_model_is_made_with_a_wrong_size_whoever_makes_it(field) -> None:
    for value in WRONG:
        if value == 2**40 and field in ("attn_scale_factor", "gamma") or (field, value) == ("kernels", {}):
            continue  # right
        with pytest.raises(ValueError, match=f"^model: {field}") as caught:
            preset("6b", **{field: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backbone", [PRESETS["tiny"].backbone, PRESETS["nano"].backbone, PRESETS["6b"].backbone])
def test_no_backbone_is_made_with_a_wrong_size_either(backbone) -> None:
    values = dataclasses.asdict(backbone)
    for field in values:
        for value in WRONG:
            with pytest.raises(ValueError, match=field):
                type(backbone)(**values | {field: value})
            if isinstance(value, int):
                text = ", ".join(f"{key} = {saved._toml(each)}" for key, each in (values | {field: value}).items())
                assert f"model.change.backbone.{field}: " in problem(f"model.change.backbone={{{text}}}")


def test_a_model_s_configuration_survives_being_copied_and_taken_apart() -> None:
    for config in PRESETS.values():
        assert copy.deepcopy(config) == config
        assert ModelConfig(**dataclasses.asdict(config)) == config


def test_what_the_recipe_owns_are_fields_of_the_model() -> None:
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert OWNED_BY_RECIPE.keys() <= fields
    assert fields - OWNED_BY_RECIPE.keys() == keys_of(ModelChange).keys()

"""Recipes: strict, one-line errors, overrides, and a round trip through TOML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_ds.config import (
    BatchConfig,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    recipe_to_toml,
    shipped_recipes,
)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_survives_toml_and_dict(name, tmp_path):
    recipe = load_recipe(name)
    file = tmp_path / "saved.toml"
    file.write_text(recipe_to_toml(recipe))
    assert load_recipe(file) == recipe
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_the_promised_recipes_are_shipped():
    sizes = ("nano", "tiny", "medium", "base", "large", "huge", "6b")
    assert {f"pretrain-{size}" for size in sizes} | {"scenes-long"} <= set(shipped_recipes())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.peak_rl=1", "pretrain-nano: unknown key optim.peak_rl; did you mean peak_lr?"),
        ("data.mix.images=1", "pretrain-nano: unknown key data.mix.images; did you mean image?"),
        ("data=3", "pretrain-nano: data is a section, got 3; want data.NAME=VALUE"),
        ("batch.global_rows=many", "batch.global_rows: Input should be a valid integer"),
        ("train.num_steps=1.5", "train.num_steps: Input should be a valid integer"),
        ("optim.betas=[1.0, 2.0]", "optim.betas: want two numbers in [0, 1), got [1.0, 2.0]"),
        ("model.dropout=1.0", "model.dropout: Input should be less than 1, got 1.0"),
        ("model.batch_norm=none", "Input should be 'frozen', 'batch' or 'sync', got 'none'"),
        ("peak_lr", "override 'peak_lr': want KEY=VALUE"),
        ("data.code_image_size=30", "Input should be a multiple of 8, got 30"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_key_and_value(override, message):
    with pytest.raises(ValueError, match=".") as caught:
        load_recipe("pretrain-nano", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_take_toml_values_and_plain_strings():
    recipe = load_recipe(
        "pretrain-nano", ["optim.peak_lr=2e-3", "run_dir=runs/a b=c", 'data.vocab="v"', "data.mix.text=0"]
    )
    assert recipe.optim.peak_lr == 2e-3
    assert recipe.run_dir == "runs/a b=c"
    assert recipe.data.vocab == "v"
    assert recipe.data.mix.weights()["text"] == 0


def test_a_recipe_extends_another_beside_it_and_keeps_what_it_does_not_set(tmp_path):
    (tmp_path / "base.toml").write_text('extends = "pretrain-nano"\n[optim]\npeak_lr = 5e-4\n')
    (tmp_path / "mine.toml").write_text('extends = "base.toml"\n[train]\nseed = 7\n')
    recipe = load_recipe(tmp_path / "mine.toml")
    assert (recipe.optim.peak_lr, recipe.train.seed, recipe.model.preset) == (5e-4, 7, "nano")


def test_recipes_that_extend_one_another_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(ValueError, match="is there a circle"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("recipe", "message"), [("pretrain-nanno", "did you mean pretrain-nano"), ("no/such.toml", "no such file")]
)
def test_an_unknown_recipe_says_what_there_is(recipe, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe)


def test_malformed_toml_names_the_file_and_place(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("[model\npreset = 3")
    with pytest.raises(ValueError, match=r"bad\.toml: not valid TOML: .*line 1"):
        load_recipe(file)


@given(micro=st.integers(1, 64), world=st.integers(1, 64), steps=st.integers(1, 64))
def test_accumulation_covers_the_global_batch_exactly(micro, world, steps):
    config = BatchConfig(global_rows=micro * world * steps, micro_rows=micro)
    assert config.accumulation_steps(world) == steps


def test_a_global_batch_that_does_not_divide_names_the_nearest_that_does():
    with pytest.raises(
        ValueError,
        match="batch.global_rows 2048 is not a multiple of batch.micro_rows 16 x 24 ranks = 384; use global_rows 1920",
    ):
        BatchConfig(global_rows=2048, micro_rows=16).accumulation_steps(24)

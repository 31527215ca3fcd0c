"""What is saved of a recipe is read back as it was, by later versions too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import PATHS, TEXT, leaves, problem

from ofa_ds.config import load_recipe, recipe_from_dict, recipe_to_dict, recipe_to_toml, saved
from ofa_ds.config.recipe import tomllib
from ofa_ds.config.sections import is_text
from ofa_ds.config.values import LARGEST_SEED

OLD_RECIPE = Path(__file__).parents[1] / "fixtures" / "checkpoint_0f884a0" / "run" / "recipe.toml"


def test_every_key_of_text_is_known_to_these_tests() -> None:
    listed = {key for key, kind in leaves() if is_text(kind)}
    choices = {
        "model.preset",
        "model.batch_norm",
        "data.augment",
        "data.decode",
        "kernels.attention",
        "kernels.layer_norm",
    }
    choices |= {"model.pixel_norm", "data.task.name", "data.task.prompt", "data.task.language", "criterion.kind"}
    assert listed == {*PATHS, *choices, "kernels.cross_entropy", "train.profile_steps"}


@pytest.mark.parametrize("key", PATHS)
@given(text=TEXT)
def test_any_text_is_written_and_read_back_as_it_was(key, text, tmp_path_factory) -> None:
    file = tmp_path_factory.getbasetemp() / "saved.toml"
    values = recipe_to_dict(load_recipe("pretrain-nano"))
    *sections, name = key.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[name] = text
    recipe = recipe_from_dict(values)
    file.write_text(recipe_to_toml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert inner[name] == text and recipe_to_dict(recipe) == values


@given(lr=st.floats(0, allow_infinity=False), seed=st.integers(0, LARGEST_SEED), std=st.floats(0, 10, exclude_min=True))
def test_any_number_is_written_and_read_back_as_it_was(lr, seed, std, tmp_path_factory) -> None:
    recipe = load_recipe("pretrain-nano", [f"optim.peak_lr={lr}", f"train.seed={seed}", f"model.change.init_std={std}"])
    assert (recipe.optim.peak_lr, recipe.train.seed, recipe.model.change["init_std"]) == (lr, seed, std)
    file = tmp_path_factory.getbasetemp() / "numbers.toml"
    file.write_text(recipe_to_toml(recipe))
    assert load_recipe(file) == recipe


def test_a_saved_recipe_says_its_version_and_one_without_is_of_version_1() -> None:
    recipe = load_recipe("pretrain-nano")
    assert recipe_to_dict(recipe)["version"] == saved.VERSION == tomllib.loads(recipe_to_toml(recipe))["version"]
    values = recipe_to_dict(recipe) | {"version": 1}
    values["model"]["change"] = {"batch_norm_eps": 1e-5, "dim": 64}  # version 1 had it, and it did nothing
    before = repr(values)
    assert recipe_from_dict(values).model.change == {"dim": 64}
    assert repr(values) == before
    del values["version"]
    assert recipe_from_dict(values).model.change == {"dim": 64}
    with pytest.raises(ValueError, match="unknown key model.change.batch_norm_eps"):
        recipe_from_dict(values | {"version": 2})


def test_each_file_of_a_chain_is_read_by_its_own_version(tmp_path) -> None:
    (tmp_path / "old.toml").write_text("[model.change]\nbatch_norm_eps = 1e-5\ndim = 64\n")
    (tmp_path / "new.toml").write_text('version = 2\nextends = "old.toml"\n[model]\npreset = "nano"\n')
    assert load_recipe(tmp_path / "new.toml").model.change == {"dim": 64}


def test_a_recipe_of_a_version_to_come_is_refused_with_both_versions(tmp_path) -> None:
    newer = saved.VERSION + 1
    message = f"a recipe of version {newer}, this ofa-ds reads up to version {saved.VERSION}"
    with pytest.raises(ValueError, match=f"^saved recipe: {message}"):
        recipe_from_dict({"version": newer, "key_to_come": 1})
    (tmp_path / "r.toml").write_text(f"version = {newer}\nkey_to_come = 1\n")
    assert f"r.toml: {message}" in problem(recipe=tmp_path / "r.toml")


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_a_version_is_a_whole_number(version) -> None:
    with pytest.raises(ValueError, match="saved recipe: version: want a whole number from 1 on"):
        recipe_from_dict({"version": version})


def test_the_recipe_of_a_run_of_version_1_is_read_as_it_was_meant() -> None:
    then = tomllib.loads(OLD_RECIPE.read_text())
    now = recipe_to_dict(load_recipe(OLD_RECIPE))
    assert "version" not in then
    assert now | {"version": None} == then | {"version": None, "criterion": now["criterion"]} | {
        key: now[key] | then[key] for key in then if isinstance(then[key], dict)
    }

"""Recipes: strict, one-line errors, overrides."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import PATHS, TEXT, leaves, problem

from ofa_ds.config import (
    BatchConfig,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    recipe_to_toml,
    saved,
    shipped_recipes,
)
from ofa_ds.config.sections import is_text
from ofa_ds.config.values import LARGEST_SEED
from ofa_ds.terms import FAMILIES


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
        (
            "train.accept_changed=data",
            "train.accept_changed: want a list such as [0.9, 0.98] or [\"data\"], got 'data'",
        ),
        ("train.accept_changed=['dta']", "train.accept_changed.0: Input should be "),
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


def test_steps_and_epochs_given_together_are_refused_in_a_line_and_a_recipe_s_own_are_no_error(tmp_path):
    both = ["train.num_epochs=2", "train.num_steps=9"]
    for order in (both, both[::-1]):
        with pytest.raises(ValueError, match="^overrides: train.num_epochs=2 and train.num_steps=9 both .* leave one"):
            load_recipe("finetune-refcoco-large", order)
    mine = 'extends = "finetune-refcoco-large"\n[train]\nnum_epochs = 2.5\nnum_steps = 9\n'
    (tmp_path / "mine.toml").write_text(mine)
    with pytest.raises(ValueError, match=r"mine\.toml: train.num_epochs=2.5 and train.num_steps=9 both .*; leave one"):
        load_recipe(tmp_path / "mine.toml")
    epochs, steps = load_recipe("finetune-refcoco-large").train, load_recipe("finetune-vqa-nano").train
    assert epochs.num_epochs and not steps.num_epochs
    assert load_recipe("finetune-vqa-nano", both[:1]).train.num_epochs == 2


def test_steps_take_back_the_epochs_of_the_recipe_that_they_change(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "finetune-refcoco-large"\n[train]\nnum_steps = 9\n')
    (tmp_path / "other.toml").write_text('extends = "mine.toml"\n[train]\nnum_epochs = 3\n')
    for recipe, words, length in (
        ("finetune-refcoco-large", ["train.num_steps=9"], (0, 9)), (tmp_path / "mine.toml", [], (0, 9)),
        (tmp_path / "other.toml", [], (3, 9)), (tmp_path / "other.toml", ["train.num_epochs=0"], (0, 9)),
        (tmp_path / "other.toml", ["train.num_epochs=0", "train.num_steps=4"], (0, 4)),
    ):  # fmt: skip
        found = load_recipe(recipe, words).train
        assert (found.num_epochs, found.num_steps) == length, (recipe, words)


def test_a_saved_recipe_that_has_epochs_and_the_steps_that_they_are_is_read_as_it_is(tmp_path):
    recipe = load_recipe("finetune-refcoco-large")
    settled = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, num_steps=77))
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(settled))
    assert load_recipe(tmp_path / "recipe.toml") == settled
    longer = load_recipe(tmp_path / "recipe.toml", ["train.num_steps=99"]).train
    assert (longer.num_epochs, longer.num_steps) == (0, 99)


@pytest.mark.parametrize("given", ["[3, 9]", "[9, 9]", "[9, 5]", "[-4, 9]", "[5]", "[5, 6, 7]", "5", "[true, 9]"])
def test_ids_that_are_no_range_are_refused_with_the_recipe(given):
    told = problem(f"criterion.constraint_range={given}")
    assert "criterion.constraint_range" in told and "\n" not in told
    assert load_recipe("finetune-refcoco-nano", ["criterion.constraint_range=[4, 5]"]).criterion.constraint_range


def test_recipes_that_extend_one_another_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(
        ValueError, match=r"b\.toml: extends: goes round in a circle: .*a\.toml -> .*b\.toml -> .*a\.toml"
    ):
        load_recipe(tmp_path / "a.toml")
    (tmp_path / "self.toml").write_text('extends = "self.toml"\n')
    with pytest.raises(ValueError, match="goes round in a circle"):
        load_recipe(tmp_path / "self.toml")


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


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    "text",
    ["2026-11-28", "2026-11-28T10:00:00Z", "10:00:00", "1", "1e5", "0x1f", "true", "inf", "[1]", "{a = 1}", "a #b"],
)
def test_text_that_looks_like_something_else_is_taken_as_typed(key, text) -> None:
    values = recipe_to_dict(load_recipe("pretrain-nano", [f"{key}={text}"]))
    for part in key.split("."):
        values = values[part]
    assert values == text


@given(text=TEXT)
def test_text_in_quotes_is_what_is_in_them(text) -> None:
    assert load_recipe("pretrain-nano", [f"run_dir={saved._toml(text)}"]).run_dir == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run_dir: want more than nothing, got ''"),
        (" \t", "run_dir: want more than blanks, got ' \\t'"),
        ('"a\\u0000b"', "run_dir: want text without NUL characters, got 'a\\x00b'"),
        ("runs/\udcff", "run_dir: want text that is valid UTF-8, got 'runs/\\udcff'"),
    ],
)
def test_text_that_names_no_directory_is_refused(text, message) -> None:
    assert message in problem(f"run_dir={text}")


def numbers() -> list[str]:
    """Keys of one number or switch; those of a backbone are tried with the rest of one."""
    found = [key for key, kind in leaves() if not is_text(kind) and "tuple" not in str(kind)]
    return [key for key in found if "backbone" not in key]


def whole_number(key: str) -> bool:
    return "float" not in str(dict(leaves())[key])


NOT_FINITE = {
    "inf": "inf", "-inf": "-inf", "nan": "nan", "1e400": "inf", "-1e400": "-inf", "2026-11-28": "2026-11-28",
    "[1]": "[1]", "many": "'many'",
}  # fmt: skip
"""What is given, and how the refusal shows it."""


@pytest.mark.parametrize("key", numbers())
def test_no_number_takes_what_is_not_a_finite_one(key) -> None:
    for value, shown in NOT_FINITE.items():
        found = problem(f"{key}={value}")
        assert found.startswith(f"pretrain-nano: {key}: ") and found.endswith(f"got {shown}")


@pytest.mark.parametrize("key", [key for key in numbers() if whole_number(key)])
def test_no_whole_number_is_too_large_for_who_uses_it(key) -> None:
    assert problem(f"{key}={'9' * 25}").startswith(f"pretrain-nano: {key}: ")
    assert problem(f"{key}=0x{'f' * 9999}").endswith("got a number of 39996 bits")


@pytest.mark.parametrize("seed", ["-1", str(LARGEST_SEED + 1), "1.5", "true"])
def test_a_seed_is_of_64_bits_and_the_refusal_says_so(seed) -> None:
    message = problem(f"train.seed={seed}")
    assert "train.seed: " in message
    assert "from 0 to 18446744073709551615 (64 bits)" in message or seed in ("1.5", "true")


@pytest.mark.parametrize("extends", ["3", "[1]", "true", '""', '" "', "2026-11-28", "{}"])
def test_what_extends_must_name_is_a_recipe(extends, tmp_path) -> None:
    (tmp_path / "r.toml").write_text(f"extends = {extends}\n")
    assert "r.toml: extends: want the name or the file of another recipe, got " in problem(recipe=tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run_dir = 2026-11-28", "run_dir: Input should be a valid string, got 2026-11-28; put it in quotes"),
        ("[train]\nnum_steps = 2026-11-28", "train.num_steps: Input should be a valid integer, got 2026-11-28"),
        ("[optim]\nbetas = [0.9, inf]", "optim.betas.1: want a finite number, got inf"),
        ("a = " + "[" * 9999, "not valid TOML: brackets too deep"),
        ("a = " + "9" * 9999, "not valid TOML: Exceeds the limit"),
        (f"{'k' * 9999} = 1", "unknown key 'kkkk"),
    ],
)
def test_a_file_s_wrong_value_is_one_short_line_that_names_the_file(text, message, tmp_path) -> None:
    (tmp_path / "r.toml").write_text(text)
    found = problem(recipe=tmp_path / "r.toml")
    assert "r.toml: " in found and message in found


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path) -> None:
    (tmp_path / "r.toml").write_bytes(b'\xef\xbb\xbfrun_dir = "a"\r\n[train]\r\nseed = 3\r\n')
    recipe = load_recipe(tmp_path / "r.toml")
    assert (recipe.run_dir, recipe.train.seed) == ("a", 3)


@pytest.mark.parametrize("override", ["", "=", "=1", " =1", "a..b=1", ".a=1", "a.=1", "word"])
def test_an_override_without_a_key_says_what_one_looks_like(override) -> None:
    assert "want KEY=VALUE, such as optim.peak_lr=2e-4" in problem(override)


@pytest.mark.parametrize("override", ["run_dir.x=1", "optim.betas.x=1", "train.seed.x.y=1", "model.change.dim.x=1"])
def test_a_value_is_no_section(override) -> None:
    assert "is a value, not a section" in problem(override)


def test_a_key_given_twice_is_refused_with_both() -> None:
    assert problem("run_dir=a", "run_dir=b") == "run_dir is given twice: 'run_dir=a' and 'run_dir=b'; leave one out"


def test_an_override_of_a_section_keeps_what_it_does_not_name() -> None:
    recipe = load_recipe("pretrain-nano", ["optim={peak_lr=0.5}", "train.seed=2\n"])
    assert (recipe.optim.peak_lr, recipe.optim.warmup_steps, recipe.train.seed) == (0.5, 60, 2)
    assert "train.seed: " in problem("train.seed=2\n[optim]\npeak_lr=3")


def test_a_run_directory_in_the_place_of_a_recipe_is_told_where_its_recipe_is(tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    assert f"is a run directory; its recipe is {tmp_path / 'recipe.toml'}" in problem(recipe=tmp_path)


def test_families_keep_their_places_which_seed_generators() -> None:
    assert FAMILIES[:4] == ("vision_language", "text", "image", "detection"), "only append"

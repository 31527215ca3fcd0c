"""Every shipped recipe of fine-tuning against a table: the hyper-parameters of the original's scripts."""

from __future__ import annotations

from typing import Any

import pytest

from ofa_ds.config import Recipe, load_recipe, shipped_recipes
from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.terms import DOWNSTREAM_TASKS

SIZES = ("nano", "tiny", "medium", "base", "large", "huge")
AS = {"tiny": "base", "medium": "base", "base": "base", "large": "large", "huge": "large"}
"""Whose script a released size takes: there are some for base and large alone."""

# lr, global batch, micro-batch, ("epochs" | "steps", how many), warm-up (a share, or steps), label smoothing,
# drop-path, (picture, source words, target words or tokens), frozen embedding, further keys
GLUE = {
    name: (5e-5, rows, micro, ("epochs", 5), 0.06, 0.0, 0.1, (None, 512, 30), False, {"data.task.prompt": "src"})
    for name, rows, micro in (
        ("cola", 64, 16), ("mnli", 256, 8), ("mrpc", 64, 16), ("qnli", 256, 8), ("qqp", 256, 8), ("rte", 64, 8),
        ("sst2", 64, 16),
    )
}  # fmt: skip
VQA = {"data.task.prompt": "prev_output", "data.task.objects": True, "data.task.max_objects": 30,
       "optim.ema_decay": 0.9999}  # fmt: skip
IMAGENET = {"model.pixel_norm": "imagenet", "data.augment": "ofa"}
SNLI_VE = {"data.task.prompt": "prev_output", "data.task.premise": True}
SCST = {"criterion.kind": "scst", "model.dropout": 0.0, "criterion.scst_beams": 5, "criterion.scst_max_tokens": 16,
        "criterion.scst_no_repeat_ngram": 3}  # fmt: skip
BOX = (512, 80, 20)
LARGE: dict[str, tuple[Any, ...]] = {
    "caption": (1e-5, 128, 8, ("epochs", 2), 0.06, 0.1, 0.1, (480, 80, 20), True,
                {"criterion.drop_worst_ratio": 0.2, "criterion.drop_worst_after": 2500}),
    "caption_scst": (1e-5, 64, 2, ("epochs", 3), 0.06, 0.0, 0.0, (480, 80, 20), True, SCST | {"optim.end_lr": 2e-7}),
    "vqa": (5e-5, 512, 4, ("steps", 40_000), 1000, 0.1, 0.2, (480, 80, 30), True, VQA),
    "refcoco": (3e-5, 128, 4, ("epochs", 10), 0.06, 0.1, 0.2, BOX, False, {}),
    "refcocoplus": (3e-5, 128, 4, ("epochs", 10), 0.06, 0.1, 0.2, BOX, False, {}),
    "refcocog": (3e-5, 128, 4, ("epochs", 10), 0.06, 0.1, 0.2, BOX, False, {}),
    "snli_ve": (2e-5, 256, 4, ("epochs", 6), 0.06, 0.0, 0.2, (480, 80, 20), False, SNLI_VE),
    **GLUE,
    "imagenet": (5e-5, 256, 4, ("steps", 160_000), 1000, 0.1, 0.1, (480, 128, 30), True, IMAGENET),
    "gigaword": (1e-4, 512, 64, ("epochs", 6), 0.06, 0.1, 0.1, (None, 512, 64), False,
                 {"data.task.decoder_noise": 0.2}),
    "text_to_image": (1e-3, 512, 4, ("steps", 40_000), 2000, 0.0, 0.1, (None, 64, 30), False,
                      {"data.code_image_size": 256, "criterion.constraint_range": (50265, 58457)}),
}  # fmt: skip
BASE = {
    **LARGE,
    "caption": (1e-5, 128, 8, ("epochs", 5), 0.06, 0.1, 0.1, (480, 80, 20), True,
                {"criterion.drop_worst_ratio": 0.2, "criterion.drop_worst_after": 6000}),
    "caption_scst": (1e-5, 64, 2, ("epochs", 3), 0.06, 0.0, 0.0, (480, 80, 20), True, SCST | {"optim.end_lr": 0.0}),
    "vqa": (5e-5, 512, 4, ("epochs", 15), 0.04, 0.1, 0.1, (480, 80, 30), True, VQA),
    "refcoco": (5e-5, 128, 4, ("epochs", 10), 0.06, 0.1, 0.1, BOX, False, {}),
    "refcocoplus": (5e-5, 128, 4, ("epochs", 10), 0.06, 0.1, 0.1, BOX, False, {}),
    "refcocog": (5e-5, 128, 4, ("epochs", 12), 0.06, 0.1, 0.1, BOX, False, {}),
    "snli_ve": (5e-5, 256, 4, ("epochs", 5), 0.06, 0.0, 0.1, (480, 80, 20), False, SNLI_VE),
}  # fmt: skip
TABLES = {"base": BASE, "large": LARGE}
ENCOURAGING = {
    "caption-large-el": {"criterion.drop_worst_ratio": 0.05, "criterion.drop_best_ratio": 0.0},
    "caption-large-el_db": {"criterion.drop_worst_ratio": 0.05, "criterion.drop_best_ratio": 0.05,
                            "criterion.drop_best_after": 2500},
    "refcoco-large-el": {}, "refcocoplus-large-el": {}, "refcocog-large-el": {},
}  # fmt: skip
STAGE_2 = tuple(f"image-gen-stage2-{size}" for size in ("nano", "base", "large"))
FILES = {"text_to_image": "image-gen-stage1"}
"""What recipes of a task are called, where that is not its name."""
TOKENS = {"vqa", "imagenet", *GLUE}
"""Tasks whose answers are measured in tokens."""


def recipe_of(task: str, size: str) -> str:
    return f"finetune-{FILES.get(task, task)}-{size}"


def value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


def test_there_is_a_recipe_of_each_task_and_size_and_no_other():
    shipped = {name for name in shipped_recipes() if name.startswith("finetune-")}
    assert shipped == {recipe_of(task, size) for task in DOWNSTREAM_TASKS for size in SIZES} | {
        f"finetune-{name}" for name in (*ENCOURAGING, *STAGE_2)
    }


@pytest.mark.parametrize("name", STAGE_2)
def test_the_second_stage_of_text_to_image_is_the_first_with_the_script_s_rewards(name):
    recipe, first = load_recipe(f"finetune-{name}"), load_recipe(f"finetune-{name.replace('stage2', 'stage1')}")
    assert (recipe.data, recipe.model.preset) == (first.data, first.model.preset)
    assert recipe.criterion.constraint_range == first.criterion.constraint_range
    assert (recipe.criterion.kind, recipe.criterion.scst_beams, recipe.criterion.scst_top_k) == ("clip_scst", 5, 256)
    assert (recipe.model.dropout, recipe.model.drop_path, recipe.optim.label_smoothing) == (0, 0, 0)
    assert recipe.optim.warmup_steps == recipe.optim.warmup_ratio == 0
    if not name.endswith("nano"):
        assert (recipe.optim.peak_lr, recipe.optim.end_lr, recipe.batch.global_rows) == (1e-6, 0, 32)
        assert (recipe.train.num_steps, recipe.train.evaluate_every, recipe.batch.micro_rows) == (5000, 200, 1)


@pytest.mark.parametrize("size", AS)
@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
def test_a_recipe_has_the_hyper_parameters_of_the_script(task, size):
    recipe = load_recipe(recipe_of(task, size))
    lr, rows, micro, length, warmup, smoothing, drop_path, (side, source, target), frozen, more = TABLES[AS[size]][task]
    optim, train = recipe.optim, recipe.train
    assert (recipe.model.preset, recipe.data.task.name) == (size, task)
    assert (optim.peak_lr, recipe.batch.global_rows, recipe.batch.micro_rows) == (lr, rows, micro)
    # Epochs count where there are some; warm-up steps count where there are some.
    assert length == (("epochs", train.num_epochs) if train.num_epochs else ("steps", train.num_steps))
    assert warmup == (optim.warmup_steps or optim.warmup_ratio)
    assert (optim.label_smoothing, recipe.model.drop_path) == (smoothing, drop_path)
    assert side in (None, recipe.data.image_size) and recipe.data.max_source_words == source
    assert (recipe.data.task.max_target_tokens if task in TOKENS else recipe.data.max_target_words) == target
    assert optim.freeze == (("token_embedding",) if frozen else ())
    assert {key: value(recipe, key) for key in more} == more


DEFAULTS = {
    "model.dropout": 0.1, "model.attention_dropout": 0.0, "model.pixel_norm": "half", "optim.end_lr": 0.0,
    "optim.betas": (0.9, 0.999), "optim.eps": 1e-8, "optim.weight_decay": 0.01, "optim.clip_norm": 1.0,
    "optim.ema_decay": 0.0, "data.sample_patches": 0, "data.task.decoder_noise": 0.0, "criterion.kind": "cross_entropy",
    "criterion.drop_worst_ratio": 0.0, "criterion.rdrop_alpha": 0.0, "train.seed": 1, "data.task.constrained": True,
    "criterion.constraint_range": (), "model.batch_norm": "batch", "criterion.log_end": 0.75,
}  # fmt: skip
"""Of every script, where the table says nothing else."""


@pytest.mark.parametrize("size", AS)
@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
def test_what_the_scripts_have_in_common_is_in_every_recipe(task, size):
    recipe, own = load_recipe(recipe_of(task, size)), TABLES[AS[size]][task][-1]
    for key, expected in DEFAULTS.items():
        assert value(recipe, key) == own.get(key, expected), key


@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_says_of_the_data_what_the_task_says(task, size):
    recipe = load_recipe(recipe_of(task, size))
    for key, wanted in DOWNSTREAM[task].settings.items():
        if size != "nano" or not key.endswith("image_size"):
            assert value(recipe, f"data.{key}") == wanted, key


@pytest.mark.parametrize("name", ENCOURAGING)
def test_the_encouraging_recipes_are_those_of_large_with_its_loss(name):
    recipe, plain = load_recipe(f"finetune-{name}"), load_recipe(f"finetune-{name.rpartition('-')[0]}")
    assert (recipe.criterion.kind, recipe.criterion.log_end) == ("encouraging", 0.75)
    for section in ("optim", "data", "batch", "model"):
        assert getattr(recipe, section) == getattr(plain, section)
    assert {key: value(recipe, key) for key in ENCOURAGING[name]} == ENCOURAGING[name]


@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
def test_nano_goes_on_from_the_quick_start(task):
    recipe, quick = load_recipe(recipe_of(task, "nano")), load_recipe("pretrain-nano")
    assert (recipe.model.preset, recipe.data.image_size) == ("nano", quick.data.image_size)
    assert recipe.data.max_image_size == quick.data.max_image_size

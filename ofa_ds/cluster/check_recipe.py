"""Refuses a recipe that would fail on every rank, before anything is started on a cluster.

python -m ofa_ds.cluster.check_recipe RANKS RECIPE [KEY=VALUE ...]     silent where it is right, else exit code 2
"""

from __future__ import annotations

import os
import sys

from ofa_ds.config import CriterionConfig, DataConfig, Recipe, load_recipe
from ofa_ds.engine.config import check_second_copy, load_deepspeed_config
from ofa_ds.model.config import VOCAB_SIZE, ModelConfig, model_config


def check_run(recipe: Recipe, num_ranks: int) -> None:
    """Raises ValueError, one line, for what every rank would refuse; reads no data, imports no torch.

    What a recipe says against itself (preset, model.change, ranges) is refused when it is loaded.
    """
    recipe.batch.accumulation_steps(num_ranks)
    check_second_copy(load_deepspeed_config(recipe.deepspeed), num_ranks)
    recipe.data.check_given()
    check_sense(recipe)
    if recipe.criterion.kind == "clip_scst":
        _check_rewarding(recipe.criterion)


def check_sense(recipe: Recipe) -> None:
    """The part of it that neither ranks nor data have to do with."""
    recipe.data.check_sizes()
    _check_scst(recipe)
    _check_codes(recipe.data)
    _check_pictures(recipe.data, model_config(recipe, VOCAB_SIZE))


def check_command(name: str, recipe: Recipe) -> None:
    """Raises ValueError where `ofa-ds NAME` is not what this recipe is for."""
    task = recipe.data.task.name
    if name == "pretrain" and task:
        raise ValueError(f"data.task.name={task}: is fine-tuning; run it with ofa-ds finetune")
    if not task and (recipe.train.num_epochs or recipe.train.evaluate_every):
        key = "num_epochs" if recipe.train.num_epochs else "evaluate_every"
        raise ValueError(f"train.{key}: is of fine-tuning; pretraining has train.num_steps, and ofa-ds evaluate")
    if not task and recipe.criterion != CriterionConfig():
        raise ValueError("criterion: is of fine-tuning; pretraining has optim.label_smoothing alone")
    if name == "finetune" and not task:
        raise ValueError("data.task.name: want a task to fine-tune on, got none; ofa-ds pretrain runs this recipe")


def _check_scst(recipe: Recipe) -> None:
    """Rewards are of captions, or of pictures; and where nothing is a label, nothing is smoothed."""
    kind, task = recipe.criterion.kind, recipe.data.task.name
    if kind == "scst" and task not in ("caption", "caption_scst"):
        raise ValueError(f"criterion.kind scst rewards captions, not {task!r}; use caption_scst")
    if kind == "clip_scst" and task != "text_to_image":
        raise ValueError(f"criterion.kind clip_scst rewards pictures, not {task!r}; use text_to_image")
    if kind not in ("scst", "clip_scst"):
        return
    if recipe.optim.label_smoothing:
        raise ValueError(
            f"criterion.kind {kind} has no labels to smooth; set optim.label_smoothing=0, not "
            f"{recipe.optim.label_smoothing}"
        )
    if recipe.criterion.rdrop_alpha or recipe.criterion.drop_worst_ratio or recipe.criterion.drop_best_ratio:
        raise ValueError(
            f"criterion.kind {kind} drops no token and has no R-Drop: set drop_*_ratio and rdrop_alpha to 0"
        )


def _check_rewarding(criterion: CriterionConfig) -> None:
    """What rewards pictures is there."""
    wanted = {
        "scst_vqgan": 'the VQGAN that the codes are of, or "scenes"',
        "scst_clip": "weights of CLIP, which reward",
    }
    for key, what in wanted.items():
        path = getattr(criterion, key)
        if not path:
            raise ValueError(f"criterion.{key}: want {what}, got none; add criterion.{key}=PATH")
        if not os.path.exists(path) and (key, path) != ("scst_vqgan", "scenes"):
            raise ValueError(f"criterion.{key} {path}: is not there; want {what}")


def _check_codes(data: DataConfig) -> None:
    """A picture's codes come right after bos, where their places are counted from."""
    if data.task.name == "text_to_image" and data.task.prompt != "none":
        raise ValueError(f"data.task.prompt={data.task.prompt}: image codes come right after bos; want none")


def _check_pictures(data: DataConfig, model: ModelConfig) -> None:
    """Pictures divide into the model's patches, and its tables have a row for each."""
    patch, rows = model.patch_size, model.image_bucket_size
    for key in ("image_size", "infill_image_size"):
        side = getattr(data, key)
        if side % patch:
            near = max(side // patch, 1) * patch
            raise ValueError(f"data.{key} {side} does not divide into patches of {patch} pixels; use {near}")
        if side // patch > rows:
            raise ValueError(
                f"data.{key} {side} has {side // patch} patches of {patch} pixels a side, the model's table has {rows} "
                f"(image_bucket_size); use at most {rows * patch}"
            )
    codes = data.code_image_size // 8
    if ("image" in data.ever_drawn() or data.task.name == "text_to_image") and not model.use_ofasys and codes > rows:
        raise ValueError(
            f"data.code_image_size {data.code_image_size} has {codes} codes a side, the model's table has {rows} "
            f"(image_bucket_size); use at most {rows * 8}, or data.mix.image=0"
        )


def main(arguments: list[str]) -> int:
    """0 where nothing is wrong with the recipe on so many ranks, else 2 and one line on stderr."""
    if len(arguments) < 2 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        print("want RANKS RECIPE [KEY=VALUE ...]", file=sys.stderr)
        return 2
    num_ranks, recipe, *overrides = arguments
    try:
        check_run(load_recipe(recipe, overrides), int(num_ranks))
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

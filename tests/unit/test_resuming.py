"""A run goes on only as the run it was: each key of a recipe may either change, or is refused and named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ofa_ds.config import DataSet, MixConfig, Recipe, load_recipe, recipe_to_dict
from ofa_ds.config.meaning import FREE, MEANING, differences
from ofa_ds.train.resuming import changed, refuse_other_run

IDENTITY = {"data": "d1", "vocab": "v1"}
OTHER: dict[str, Any] = {
    "train.seed": 7, "batch.global_rows": 48, "data.mix": MixConfig(text=5),
    "data.mix_changes": ({"step": 2, "text": 5},),
    "data.sets": {"a": DataSet(shards="a", weight=3)}, "data.image_size": 128,
    "data.infill_image_size": 128, "data.code_image_size": 64, "data.max_image_size": 128, "data.sample_patches": 9,
    "data.augment": "ofa", "data.decode": "dct_scaled", "data.max_source_words": 9, "data.max_target_words": 9,
    "data.max_text_tokens": 9, "data.extra_confidence": 3.0, "optim.label_smoothing": 0.1, "model.preset": "tiny",
    "model.change": {"attn_scale_factor": 3.0}, "model.dropout": 0.2, "model.attention_dropout": 0.2,
    "model.drop_path": 0.2, "model.batch_norm": "frozen", "model.pixel_norm": "imagenet",
    "data.task.name": "vqa",
    "data.task.prompt": "src", "data.task.objects": True, "data.task.premise": True, "data.task.constrained": False,
    "data.task.decoder_noise": 0.2, "data.task.max_objects": 9, "data.task.max_target_tokens": 9,
    "data.task.language": "zh", "optim.freeze": ("token_embedding",), "criterion.kind": "encouraging",
    "criterion.drop_worst_ratio": 0.2, "criterion.drop_worst_after": 9, "criterion.drop_best_ratio": 0.2,
    "criterion.drop_best_after": 9, "criterion.rdrop_alpha": 1.0, "criterion.log_end": 1.0,
    "criterion.constraint_range": (9, 99), "criterion.scst_beams": 9,
    "criterion.scst_max_tokens": 9, "criterion.scst_no_repeat_ngram": 9, "criterion.scst_top_k": 9,
    "criterion.scst_document_frequency": "words.json",
    "criterion.scst_vqgan": "vqgan",
    "criterion.scst_clip": "clip.pt",
}  # fmt: skip


class Past:
    """What is asked of a manifest."""

    step = 4
    identity = IDENTITY

    def __init__(self, recipe: dict[str, Any] | None) -> None:
        self.recipe = recipe


def leaves(section: Any, prefix: str = "") -> list[str]:
    """Every key of a recipe; model.change is one."""
    found = []
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        found += leaves(value, f"{key}.") if dataclasses.is_dataclass(value) else [key]
    return found


def replaced(recipe: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return dataclasses.replace(recipe, **{name: replaced(getattr(recipe, name), rest, value) if rest else value})


def test_every_key_of_a_recipe_is_in_one_of_the_two_lists_and_each_list_names_keys():
    for key in leaves(Recipe()):
        owners = [each for each in (*MEANING, *FREE) if key == each or key.startswith(f"{each}.")]
        assert len(owners) == 1, f"{key}: is in {owners or 'neither list'} of ofa_ds/config/meaning.py"
    for each in (*MEANING, *FREE):
        assert any(key == each or key.startswith(f"{each}.") for key in leaves(Recipe())), each


def test_every_key_that_may_not_change_has_another_value_in_this_test():
    assert OTHER.keys() == set(MEANING)


@pytest.mark.parametrize("key", MEANING)
def test_a_setting_of_order_or_meaning_is_refused_with_both_values_unless_accepted(key):
    before = load_recipe("pretrain-nano", ["data.shards="])
    now = replaced(before, key, OTHER[key])
    past = Past(recipe_to_dict(before))
    with pytest.raises(ValueError) as caught:
        refuse_other_run(past, now, IDENTITY)
    message = str(caught.value)
    assert "\n" not in message and f"train.accept_changed='[\"{key}\"]'" in message and f"{key} " in message
    for pair in differences(before, now, (key,)).values():
        assert all(str(getattr(value, "text", value)).strip("'").lower() in message.lower() for value in pair)
    accepting = replaced(now, "train.accept_changed", (key,))
    refuse_other_run(past, accepting, IDENTITY)
    assert key in changed(past, accepting), "what is accepted is told"


def test_what_may_change_changes_and_what_acts_on_learning_is_told():
    before = load_recipe("pretrain-nano")
    now = load_recipe("pretrain-nano", [
        "train.num_steps=2000", "train.save_every=7", "train.keep=9", "train.log_every=1", "train.sample_every=0",
        "train.save_in_background=false", "train.max_bad_steps=3", "batch.micro_rows=6", "data.workers=3",
        "kernels.attention=torch", "deepspeed=zero1", "model.activation_checkpointing=true", "optim.peak_lr=1e-5",
        "optim.clip_norm=2.0", "run_dir=elsewhere",
    ])  # fmt: skip
    refuse_other_run(Past(recipe_to_dict(before)), now, IDENTITY)
    told = changed(Past(recipe_to_dict(before)), now)
    assert "optim.peak_lr 0.001 (now 1e-05)" in told and "train.num_steps 900 (now 2000)" in told
    assert "save_every" not in told and "micro_rows" not in told


@pytest.mark.parametrize("name", IDENTITY)
def test_other_data_or_another_vocabulary_is_refused_unless_accepted(name):
    recipe = load_recipe("pretrain-nano")
    past = Past(recipe_to_dict(recipe))
    with pytest.raises(ValueError, match=f"was trained with {name} .1, this run has x"):
        refuse_other_run(past, recipe, {**IDENTITY, name: "x"})
    refuse_other_run(past, replaced(recipe, "train.accept_changed", (name,)), {**IDENTITY, name: "x"})


def test_a_recipe_of_an_older_version_is_compared_as_this_version_reads_it():
    recipe = load_recipe("pretrain-nano")
    old = recipe_to_dict(recipe)
    del old["version"]
    old["model"]["change"] = {"batch_norm_eps": 1e-5}
    refuse_other_run(Past(old), recipe, IDENTITY)


def test_an_imported_model_has_no_settings_of_a_run():
    past = Past(recipe_to_dict(load_recipe("pretrain-tiny")))
    past.identity = {"vocab": "v1"}
    refuse_other_run(past, load_recipe("pretrain-nano"), IDENTITY)
    refuse_other_run(Past(None), load_recipe("pretrain-nano"), IDENTITY)


class Rows:
    """What is asked of shards for what a mixture draws."""

    families = {"vision_language": 900, "text": 900, "image": 90, "detection": 90}


def test_a_mixture_that_changes_only_after_the_checkpoint_is_no_other_run_and_is_told():
    before = load_recipe("pretrain-nano", ["data.shards="])
    past = Past(recipe_to_dict(before))
    later = replaced(before, "data.mix_changes", ({"step": 9, "text": 5},))
    refuse_other_run(past, later, IDENTITY, Rows())
    assert "data.mix_changes () (now ({'step': 9, 'text': 5},))" in changed(past, later)
    refuse_other_run(Past(recipe_to_dict(later)), before, IDENTITY, Rows())  # taken back before it came


def test_a_mixture_that_would_have_changed_before_the_checkpoint_is_refused_with_the_step_that_would_do():
    before = load_recipe("pretrain-nano", ["data.shards="])
    past = Past(recipe_to_dict(before))
    earlier = replaced(before, "data.mix_changes", ({"step": 3, "text": 5},))
    with pytest.raises(ValueError, match=r"a change from step (\d+) on would leave what is done as it is$") as caught:
        refuse_other_run(past, earlier, IDENTITY, Rows())
    step = int(str(caught.value).split("a change from step ")[1].split()[0])
    assert past.step < step <= past.step + 3
    refuse_other_run(past, replaced(before, "data.mix_changes", ({"step": step, "text": 5},)), IDENTITY, Rows())


def test_sets_may_lie_elsewhere_and_not_weigh_other_than_before():
    before = load_recipe("pretrain-nano", ["data.shards=", "data.sets.a.shards=here/a", "data.sets.b.shards=here/b"])
    past = Past(recipe_to_dict(before))
    moved = load_recipe("pretrain-nano", ["data.shards=", "data.sets.a.shards=/there/a", "data.sets.b.shards=b"])
    refuse_other_run(past, moved, IDENTITY, Rows())
    heavier = replaced(before, "data.sets", {**before.data.sets, "b": DataSet(shards="here/b", weight=2)})
    with pytest.raises(ValueError, match="was trained with other settings: data.sets"):
        refuse_other_run(past, heavier, IDENTITY, Rows())

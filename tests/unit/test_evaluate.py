"""Evaluation: what a model that sees gains over itself blinded, on a few rows that a nano has learned by heart."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ofa_ds.config import BatchConfig, DataConfig, MixConfig, ModelOptions, Recipe
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.example import Example
from ofa_ds.data.scenes import write_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.inference.answers import readable, sample_cards, sample_sheet
from ofa_ds.inference.evaluate import beside_blind, blinded, collect, judge_tasks
from ofa_ds.inference.loaded_model import LoadedModel, batches, generated, token_sums
from ofa_ds.inference.table import format_table
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.boxes import boxes_of, objects_of
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.task import ask
from ofa_ds.tasks.texts import train_from_shards
from ofa_ds.terms import PRETRAINING_TASKS

STEPS = 90


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("evaluate")
    write_scenes(folder / "tsv", rows=16, seed=1)
    names = ("vision_language", "text", "image", "detection")
    sources = {name: [folder / "tsv" / f"{name}_examples.tsv"] for name in names}
    build_shards(folder / "shards", negatives=folder / "tsv" / "negative_sample", workers=1, **sources)
    train_from_shards(folder / "shards", size=400, out=folder / "vocab", num_codes=128, num_bins=65)
    return Shards(folder / "shards")


@pytest.fixture(scope="module")
def untrained(shards: Shards) -> LoadedModel:
    from ofa_ds.data.vocab import load_vocab

    torch.manual_seed(0)
    vocab = load_vocab(shards.path.parent / "vocab")
    sizes = {
        "image_size": 64,
        "infill_image_size": 64,
        "code_image_size": 32,
        "max_image_size": 64,
        "sample_patches": 0,
    }
    data = DataConfig(shards=str(shards.path), vocab=str(shards.path.parent / "vocab"), augment="none", **sizes)
    recipe = Recipe(model=ModelOptions(preset="nano"), data=data, batch=BatchConfig(global_rows=12, micro_rows=12))
    config = dataclasses.replace(model_config(recipe, vocab.size), dim=64, ffn_dim=128, init_std=64**-0.5)
    return LoadedModel(model=OFA(config).eval(), vocab=vocab, recipe=recipe)


@pytest.fixture(scope="module")
def ctx(untrained: LoadedModel, shards: Shards) -> Context:
    return untrained.context(shards)


@pytest.fixture(scope="module")
def asked(shards: Shards, ctx: Context) -> dict[str, list[Example]]:
    return collect(shards, ctx, PRETRAINING_TASKS, 100)


@pytest.fixture(scope="module")
def learned(untrained: LoadedModel, asked: dict[str, list[Example]]) -> LoadedModel:
    """The model after it has learned all rows by heart."""
    model = OFA(untrained.model.config)
    model.load_state_dict(untrained.model.state_dict())
    batch = untrained.pack([example for examples in asked.values() for example in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for _ in range(STEPS):
        model(batch)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dataclasses.replace(untrained, model=model.eval())


@pytest.fixture(scope="module")
def judged(learned: LoadedModel, shards: Shards) -> dict:
    return judge_tasks(learned, shards)


def test_every_task_has_its_examples(asked: dict[str, list[Example]]) -> None:
    counts = {task: len(examples) for task, examples in asked.items()}
    assert counts == {
        "caption": 5, "vqa": 6, "itm": 22, "visual_grounding": 5, "grounded_caption": 5, "detection": 2,
        "image_infilling": 2, "text_infilling": 4,
    }  # fmt: skip


def test_the_limit_is_per_task_and_keeps_row_order(
    shards: Shards, ctx: Context, asked: dict[str, list[Example]]
) -> None:
    few = collect(shards, ctx, PRETRAINING_TASKS, 3)
    for task, examples in few.items():
        assert [e.row_id for e in examples] == [e.row_id for e in asked[task]][:3]
        assert all((a.source == b.source).all() for a, b in zip(examples, asked[task], strict=False))


def test_a_held_out_row_that_does_not_fit_the_model_is_named_with_family_number_file_and_id(
    shards: Shards, ctx: Context
) -> None:
    larger = dataclasses.replace(ctx, config=dataclasses.replace(ctx.config, infill_image_size=96, max_image_size=96))
    where = r"shards: image row 0 \(image-00000.arrow row 0, id '[^']+'\): .*data.infill_image_size"
    with pytest.raises(ValueError, match=where):
        collect(shards, larger, ["image_infilling"], 1)


def test_matching_is_asked_as_often_with_a_true_as_with_a_false_statement(asked: dict[str, list[Example]]) -> None:
    answers = [example.target_text.strip() for example in asked["itm"]]
    assert answers == ["yes", "no"] * (len(answers) // 2)
    assert all(a.source_text != b.source_text for a, b in zip(asked["itm"][::2], asked["itm"][1::2], strict=True))


def test_shuffled_pictures_are_of_another_row_and_grey_ones_empty(asked: dict[str, list[Example]]) -> None:
    for task in ("vqa", "itm", "caption"):
        picture_of = {example.row_id: example.image for example in asked[task]}
        for before, after in zip(asked[task], blinded(asked[task], "shuffled"), strict=True):
            assert after.source is before.source and after.target is before.target
            assert (after.image != picture_of[before.row_id]).any()
        assert {value for each in blinded(asked[task], "grey") for value in np.unique(each.image)} == {128}


def test_there_is_no_blind_view_without_a_picture_or_another_row(asked: dict[str, list[Example]]) -> None:
    assert blinded(asked["text_infilling"], "grey") is None
    assert blinded(asked["itm"][:2], "shuffled") is None


def test_blind_is_the_best_of_what_there_is() -> None:
    got = beside_blind({"own": 0.7, "grey": 0.1, "shuffled": 0.4, "constant": 0.3})
    assert got == {"own": 0.7, "grey": 0.1, "shuffled": 0.4, "constant": 0.3, "blind": 0.4, "gain": pytest.approx(0.3)}
    assert beside_blind({"own": 1.0, "grey": 3.0, "shuffled": 2.0}, best=min)["gain"] == 1
    assert beside_blind({"own": 1.0})["blind"] is None


def test_a_model_that_knows_the_rows_scores_high_and_blinded_does_not(judged: dict) -> None:
    assert list(judged) == list(PRETRAINING_TASKS)
    exact = {task: judged[task]["scores"]["exact match"] for task in ("caption", "vqa", "grounded_caption")}
    boxes = judged["visual_grounding"]["scores"]["acc@IoU0.5"]
    objects = judged["detection"]["scores"]["F@IoU0.5, named"]
    for values in (*exact.values(), boxes, objects):
        assert values["own"] > 0.75
    assert all(values["gain"] > 0.2 for values in (exact["caption"], exact["vqa"], boxes, objects))
    assert judged["itm"]["scores"]["accuracy"]["own"] > 0.7
    for task in set(PRETRAINING_TASKS) - {"text_infilling", "grounded_caption"}:
        assert judged[task]["loss"]["gain"] > 0, task
    assert judged["text_infilling"]["loss"]["blind"] is None


def test_an_untrained_model_gains_nothing(untrained: LoadedModel, shards: Shards) -> None:
    scores = judge_tasks(untrained, shards, tasks=["vqa"])["vqa"]["scores"]["exact match"]
    assert scores["own"] < scores["blind"] and scores["gain"] < 0


def test_question_types_add_up_to_all_questions(judged: dict) -> None:
    kinds = judged["vqa"]["by_type"]
    assert sum(values["examples"] for values in kinds.values()) == judged["vqa"]["examples"]
    own = sum(values["examples"] * values["own"] for values in kinds.values()) / judged["vqa"]["examples"]
    assert own == pytest.approx(judged["vqa"]["scores"]["exact match"]["own"])


def test_loss_and_accuracy_do_not_depend_on_how_examples_are_batched(
    learned: LoadedModel, asked: dict[str, list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = token_sums(learned, asked["caption"])
    monkeypatch.setattr("ofa_ds.inference.loaded_model.MAX_TOKENS_A_BATCH", 1)
    assert len(list(batches(asked["caption"], 16))) == len(asked["caption"])
    assert token_sums(learned, asked["caption"]) == pytest.approx(whole, rel=1e-5)


def test_the_result_is_json_and_the_table_has_a_line_per_score(judged: dict) -> None:
    facts = {"checkpoint": "runs/x", "step": 7, "shards": "data/y", "beam": 1, "seconds": 1.5, "tasks": judged}
    assert json.loads(json.dumps(facts)) == facts
    table = format_table(facts)
    assert all(f"{task} (" in table for task in PRETRAINING_TASKS)
    assert table.count("  loss ") == len(PRETRAINING_TASKS) and table.count("token accuracy") == 2


def test_a_task_that_the_shards_lack_is_an_error(untrained: LoadedModel, shards: Shards) -> None:
    shards = Shards(shards.path)
    del shards.families["detection"]
    with pytest.raises(ValueError, match="has no row for detection"):
        judge_tasks(untrained, shards, tasks=["detection"])


def test_the_sheet_has_a_card_per_task(learned: LoadedModel, shards: Shards, tmp_path: Path) -> None:
    one = sample_sheet(learned, shards, tasks=["visual_grounding"])
    every = sample_sheet(learned, shards)
    assert every.height >= 3.5 * one.height and every.width > 2 * one.width
    colours = {colour for _, colour in one.getcolors(1 << 20)}
    assert (60, 180, 75) in colours and (230, 25, 75) in colours, "expected and generated box"


def test_generated_codes_are_as_many_as_the_picture_has_room_for(
    learned: LoadedModel, asked: dict[str, list[Example]]
) -> None:
    for ids in generated(learned, asked["image_infilling"]):
        assert len(ids) == 16 and all(learned.vocab.is_code(token) for token in ids)


def test_boxes_and_names_are_read_from_generated_ids(ctx: Context) -> None:
    vocab = ctx.vocab
    first, second = [vocab.bin(k) for k in (0, 16, 32, 64)], [vocab.bin(k) for k in (1, 2, 3, 4)]
    ids = [*first, *vocab.encode(" red circle"), *second, *vocab.encode(" white square")]
    assert objects_of(ctx, ids) == [((0, 16, 32, 64), "red circle"), ((1, 2, 3, 4), "white square")]
    assert boxes_of(ctx, [*first[:3], *vocab.encode(" red"), *second]) == [(1, 2, 3, 4)]
    assert boxes_of(ctx, vocab.encode(" nothing")) == []


def test_what_a_user_asks_is_worded_as_in_training(ctx: Context, asked: dict[str, list[Example]]) -> None:
    for task in ("caption", "vqa", "visual_grounding", "grounded_caption", "image_infilling", "detection"):
        example = asked[task][0]
        text = example.source_text.split('"')[1] if task == "visual_grounding" else example.source_text
        if task == "grounded_caption":
            text = ",".join(str(int(value)) for value in example.boxes[0])
        mine = ask(ctx, task, example.image, text)
        assert mine.source.tolist() == example.source.tolist(), task
        assert mine.hole == example.hole and mine.code == example.code


def test_masks_in_a_text_become_the_mask_token(ctx: Context) -> None:
    source = ask(ctx, "text_infilling", None, "the <mask> circle").source.tolist()
    assert source.count(ctx.vocab.mask) == 1
    assert readable(ctx, source).replace(" ", "") == 'whatisthecompletetextof"the<mask>circle"?'


@pytest.mark.parametrize(
    "task, text, message",
    [("vqa", " ", "needs --text: the question"), ("grounded_caption", "1,2,3", "want a region"),
     ("grounded_caption", "0,0,99,10", "not a region inside the picture, which is 64 x 64")],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_says_why(ctx: Context, task: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(ctx, task, np.zeros((64, 64, 3), np.uint8), text)


def test_a_larger_picture_is_brought_to_the_networks_size(ctx: Context) -> None:
    example = ask(ctx, "grounded_caption", np.array(Image.new("RGB", (128, 256))), "0,0,64,128")
    assert example.image.shape == (64, 64, 3)
    assert example.boxes.tolist() == [[0, 0, 32, 32]]


def test_what_the_recipe_does_not_train_is_judged_and_drawn_only_if_asked_for(
    untrained: LoadedModel, shards: Shards
) -> None:
    data = dataclasses.replace(untrained.recipe.data, mix=MixConfig(vision_language=0, image=0))
    model = dataclasses.replace(untrained, recipe=dataclasses.replace(untrained.recipe, data=data))
    assert list(judge_tasks(model, shards, rows=1)) == ["detection", "text_infilling"]
    assert list(sample_cards(model, shards)) == ["detection", "text_infilling"]
    assert list(judge_tasks(model, shards, tasks=["image_infilling"], rows=1)) == ["image_infilling"]
    assert list(sample_cards(model, shards, tasks=["vqa"])) == ["vqa"]


def test_examples_that_the_model_cannot_hold_are_cut_and_counted_once(
    untrained: LoadedModel, shards: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(untrained.model.config, max_positions=16)
    model = dataclasses.replace(untrained, model=OFA(config).eval())
    judged = judge_tasks(model, shards, tasks=["text_infilling", "caption"], rows=4)
    lines = capsys.readouterr().err.splitlines()
    assert list(judged) == ["caption", "text_infilling"]
    assert lines == ["text_infilling: 4 of 4 examples cut to the 16 positions of the model"]


def test_judging_tells_how_far_it_is(
    untrained: LoadedModel, shards: Shards, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ofa_ds.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("ofa_ds.inference.loaded_model.MAX_TOKENS_A_BATCH", 1)
    judge_tasks(untrained, shards, tasks=["vqa"], rows=3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 3 * 3, "loss and answers of three examples in three views"
    assert lines[0].startswith("judging vqa: 1 of 18 examples") and lines[-1].startswith("judging vqa: 18 of 18")


def test_a_model_with_other_patches_is_asked_and_drawn_with_them(untrained: LoadedModel, shards: Shards) -> None:
    backbone = dataclasses.replace(untrained.model.config.backbone, patch_size=8)
    data = dataclasses.replace(untrained.recipe.data, image_size=56, mix=MixConfig(image=0, detection=0))
    model = OFA(dataclasses.replace(untrained.model.config, backbone=backbone)).eval()
    loaded = dataclasses.replace(untrained, model=model, recipe=dataclasses.replace(untrained.recipe, data=data))
    assert loaded.context(shards).patch_size == 8
    assert len(sample_cards(loaded, shards)) == 6

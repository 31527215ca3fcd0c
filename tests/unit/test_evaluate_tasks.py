"""Every downstream task is judged beside its blind baselines, drawn, and asked zero-shot; or says why it is not."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import task_models
from PIL import Image

from ofa_ds.cli import main
from ofa_ds.data.scenes_tasks import write_task_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.inference.asking import How, answers_to, asked_as
from ofa_ds.inference.evaluate import blinded, judge_tasks
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.inference.predict import predict
from ofa_ds.inference.share import Share
from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.tasks.task_shards import build_task_shards
from ofa_ds.terms import DOWNSTREAM_TASKS

TASKS = ("caption", "vqa", "refcoco", "snli_ve", "cola", "gigaword")
"""Of each kind one; the rest differ in wording alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def shards(folder: Path) -> dict[str, Shards]:
    return task_models.build(folder, rows=6)


@pytest.fixture(scope="module")
def untrained(folder: Path, shards: dict[str, Shards]) -> LoadedModel:
    return task_models.model_of(folder)


@pytest.fixture(scope="module")
def learned(folder: Path, shards: dict[str, Shards]) -> LoadedModel:
    """One model that knows the rows of TASKS by heart."""
    models = {task: task_models.model_of(folder, task) for task in TASKS}
    examples = [each for task in TASKS for each in task_models.examples_of(models[task], shards[task], task)]
    return task_models.learn_by_heart(models["vqa"], examples, steps=70)


def tuned(model: LoadedModel, folder: Path, task: str) -> LoadedModel:
    return dataclasses.replace(model, recipe=task_models.recipe_of(folder, task))


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_the_rows_scores_high_and_above_its_blind_baselines(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path, task: str
) -> None:
    judged = judge_tasks(tuned(learned, folder, task), shards[task])[task]
    best = judged["scores"][DOWNSTREAM[task].metric]
    assert judged["examples"] == 6 and best["constant"] is not None
    assert best["own"] > (5 if task == "caption" else 0.8) and best["own"] > best["constant"]
    has_pictures = DOWNSTREAM[task].needs_picture
    assert (best["grey"] is not None) == (best["shuffled"] is not None) == has_pictures
    assert judged["loss"]["own"] < 0.5


@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
def test_every_task_is_judged_zero_shot_by_a_pretrained_model(
    untrained: LoadedModel, shards: dict[str, Shards], task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = judge_tasks(untrained, shards[task], rows=3, blind=False)
    name = next(iter(judged))
    assert DOWNSTREAM[name].row_types == DOWNSTREAM[task].row_types and judged[name]["examples"] == 3
    assert judged[name]["scores"][DOWNSTREAM[task].metric]["own"] is not None
    assert f"{name}: zero-shot, as the model was not fine-tuned" in capsys.readouterr().err


def test_zero_shot_has_no_prompt_objects_or_premise_and_settings_come_on_top(untrained: LoadedModel) -> None:
    plain = asked_as(untrained, "snli_ve").recipe.data
    assert (plain.task.name, plain.task.prompt, plain.task.premise, plain.image_size) == ("snli_ve", "none", False, 64)
    settings = ("data.task.prompt=prev_output", "data.task.premise=true", "data.image_size=32")
    given = asked_as(untrained, "snli_ve", How(settings=settings)).recipe.data
    assert (given.task.prompt, given.task.premise, given.image_size) == ("prev_output", True, 32)
    assert asked_as(untrained, "cola").recipe.data.max_source_words == 512
    with pytest.raises(ValueError, match="optim.peak_lr=1: want data.KEY=VALUE or model.pixel_norm"):
        asked_as(untrained, "cola", How(settings=("optim.peak_lr=1",)))


def test_a_model_from_elsewhere_is_told_how_pixels_were_normalised(folder: Path) -> None:
    model = task_models.model_of(folder)
    told = asked_as(model, "imagenet", How(settings=("model.pixel_norm=imagenet",)))
    assert told.model.encoder.config.pixel_norm == told.recipe.model.pixel_norm == "imagenet"
    assert asked_as(model, "imagenet", How(settings=("data.image_size=32",))).model.encoder.config.pixel_norm == "half"


def test_the_recipe_of_a_fine_tuned_model_says_how_it_is_asked(learned: LoadedModel, folder: Path) -> None:
    model = tuned(learned, folder, "vqa")
    assert asked_as(model, "vqa").recipe == model.recipe
    assert asked_as(model, "vqa").recipe.data.task.prompt == "prev_output"


def test_vqa_is_decoded_among_all_candidates_with_beams_or_openly(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path
) -> None:
    model, task = tuned(learned, folder, "vqa"), DOWNSTREAM["vqa"]
    ctx, examples = model.context(shards["vqa"]), task_models.examples_of(model, shards["vqa"], "vqa")
    given = {how: answers_to(model, ctx, task, examples, How(search=how)) for how in ("all", "beam", "open", "")}
    assert given["all"] == given[""] and len(given["open"]) == len(examples)
    listed = {tuple(ids) for ids in ctx.candidates.ids}
    assert all(tuple(ids) in listed for how in ("all", "beam") for ids in given[how])
    decoding, candidates = How(search="open", beams=3).decoding(task, ctx)
    assert (decoding.beams, decoding.candidates, candidates) == (3, False, None)
    trained_open = asked_as(model, "vqa", How(settings=("data.task.constrained=false",))).context(shards["vqa"])
    assert How().decoding(task, trained_open)[1] is None
    assert How(search="all").decoding(task, trained_open)[1] is trained_open.candidates


@pytest.mark.parametrize("task", TASKS)
def test_in_bfloat16_a_model_gives_the_answers_that_it_knows(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path, task: str
) -> None:
    model = tuned(learned, folder, task)
    low = dataclasses.replace(model, model=copy.deepcopy(model.model).bfloat16())
    ctx, examples = model.context(shards[task]), task_models.examples_of(model, shards[task], task)
    exact, given = (answers_to(each, ctx, DOWNSTREAM[task], examples) for each in (model, low))
    assert sum(a == b for a, b in zip(exact, given, strict=True)) >= 5 and len(exact) == 6


def test_a_model_that_learned_a_list_is_not_asked_without_one_unless_that_is_said(
    learned: LoadedModel, untrained: LoadedModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_task_scenes(tmp_path, "vqa", 4, seed=3)
    build_task_shards(tmp_path / "shards", "vqa", [file], workers=1)
    model, shards = tuned(learned, folder, "vqa"), Shards(tmp_path / "shards")
    for asked in (lambda: judge_tasks(model, shards), lambda: predict(model, shards, "vqa", tmp_path / "out.json")):
        with pytest.raises(ValueError, match="learned to answer vqa from a list, and there is none here;.*--answers"):
            asked()
    with pytest.raises(ValueError, match="--decoding beam: vqa has no list of answers here; build the shards with"):
        judge_tasks(model, shards, how=How(search="beam"))
    assert judge_tasks(model, shards, how=How(search="open"), rows=1)
    assert judge_tasks(model, shards, how=How(settings=("data.task.constrained=false",)), rows=1)
    assert judge_tasks(untrained, shards, rows=1), "zero-shot answers are open"
    (tmp_path / "a.png").write_bytes(shards.row("downstream", 0)["image"])
    checkpoint = str(task_models.saved(model, tmp_path / "vqa"))
    question = ["generate", checkpoint, "--task", "vqa", "--image", str(tmp_path / "a.png"), "--text", "what is it?"]
    assert main(question) == 1
    assert "there is none here; give one with --answers FILE, or search" in capsys.readouterr().err
    assert main([*question, "--decoding", "open", "--beam", "1"]) == 0


def test_right_answers_outside_the_list_are_counted_and_have_no_gain(
    learned: LoadedModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_task_scenes(tmp_path, "vqa", 4, seed=3)
    (tmp_path / "answers.txt").write_text("zebra\ngiraffe\n")
    build_task_shards(tmp_path / "a", "vqa", [file], answers=tmp_path / "answers.txt", held_out=True, workers=1)
    found = judge_tasks(tuned(learned, folder, "vqa"), Shards(tmp_path / "a"))["vqa"]
    assert found["loss"]["own"] == float("inf") and found["loss"]["gain"] is None
    told = capsys.readouterr().err
    assert "vqa: of 4 of 4 examples the right answer is not in the list: their loss is infinite" in told


def test_all_candidates_need_a_list(untrained: LoadedModel, shards: dict[str, Shards]) -> None:
    with pytest.raises(ValueError, match="--decoding all: gigaword has no list of answers here"):
        judge_tasks(untrained, shards["gigaword"], how=How(search="all"), rows=2)


def test_a_score_of_vqa_counts_its_references_for_each_kind_of_question(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path
) -> None:
    judged = judge_tasks(tuned(learned, folder, "vqa"), shards["vqa"])["vqa"]
    own = sum(each["own"] * each["examples"] for each in judged["by_type"].values()) / judged["examples"]
    assert own == pytest.approx(judged["scores"]["soft accuracy"]["own"])


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_several_processes_judge_together_what_one_judges_alone(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path, task: str
) -> None:
    """Each in turn, with what the others would send."""
    from threading import Barrier, Thread

    model, size = tuned(learned, folder, task), 3
    sent, barrier, results = [None] * size, Barrier(size), [None] * size

    def run(rank: int) -> None:
        def gather(value: object) -> list:
            sent[rank] = value
            barrier.wait()
            values = list(sent)
            barrier.wait()
            return values

        share = Share(rank=rank, world_size=size, gather=gather)
        results[rank] = judge_tasks(model, shards[task], share=share)

    threads = [Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = judge_tasks(model, shards[task])
    assert results[0] == results[1] == results[2]
    assert results[0][task]["scores"] == alone[task]["scores"]
    assert results[0][task]["loss"]["own"] == pytest.approx(alone[task]["loss"]["own"], rel=1e-4)


def test_a_shuffled_picture_is_of_another_picture_even_where_rows_share_one(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path
) -> None:
    model = tuned(learned, folder, "vqa")
    asked = task_models.examples_of(model, shards["vqa"], "vqa")
    shared = [dataclasses.replace(each, image_id=str(k // 3), image=np.full_like(each.image, k // 3))
              for k, each in enumerate(asked)]  # fmt: skip
    for before, after in zip(shared, blinded(shared, "shuffled"), strict=True):
        assert after.image[0, 0, 0] != before.image[0, 0, 0]
    assert blinded([dataclasses.replace(each, image_id="one") for each in asked], "shuffled") is None


def test_rows_that_do_not_say_what_is_right_are_not_judged(learned: LoadedModel, folder: Path, tmp_path: Path) -> None:
    file = write_task_scenes(tmp_path, "snli_ve", 4, seed=3)
    build_task_shards(tmp_path / "shards", "snli_ve", [file], references=False, workers=1)
    with pytest.raises(ValueError, match=r"row id '.*' and 3 more of 4 do not say what is right.*ofa-ds predict"):
        judge_tasks(tuned(learned, folder, "snli_ve"), Shards(tmp_path / "shards"))


def test_a_model_that_was_fine_tuned_on_another_task_is_asked_only_if_that_is_said(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path
) -> None:
    model = tuned(learned, folder, "vqa")
    with pytest.raises(ValueError, match="has no row for vqa, but for snli_ve; the model was fine-tuned on vqa"):
        judge_tasks(model, shards["snli_ve"])
    assert list(judge_tasks(model, shards["snli_ve"], tasks=["snli_ve"], rows=2)) == ["snli_ve"]


@pytest.mark.long
def test_the_command_judges_and_draws_every_task_and_the_constant_stands_beside(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in TASKS:
        checkpoint = task_models.saved(tuned(learned, folder, task), tmp_path / task)
        arguments = ["evaluate", str(checkpoint), "--task", task, "--shards", str(shards[task].path)]
        assert main([*arguments, "--json", "--png", str(tmp_path / f"{task}.png")]) == 0
        told = json.loads(capsys.readouterr().out)
        scores = told["tasks"][task]["scores"]
        assert scores[DOWNSTREAM[task].metric]["own"] > 0.8 and scores[DOWNSTREAM[task].metric]["constant"] is not None
        sheet = Image.open(tmp_path / f"{task}.png")
        assert sheet.width > 500 and len(sheet.getcolors(1 << 20)) > 3
        assert main([*arguments, "--rows", "2", "--beam", "1", "--prompt", "none"]) == 0
        assert DOWNSTREAM[task].metric in capsys.readouterr().out


def test_a_user_asks_each_task_and_gives_a_free_instruction(
    learned: LoadedModel, shards: dict[str, Shards], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = shards["vqa"].row("downstream", 0)
    (tmp_path / "a.png").write_bytes(row["image"])
    checkpoint = str(task_models.saved(tuned(learned, folder, "vqa"), tmp_path / "vqa"))
    image = ["--image", str(tmp_path / "a.png")]
    listed = tmp_path / "answers.txt"
    listed.write_text("zebra\n")
    assert main(["generate", checkpoint, "--task", "vqa", *image, "--text", row["text"], "--answers", str(listed)]) == 0
    assert capsys.readouterr().out == "zebra\n"
    assert main(["generate", checkpoint, "--task", "snli_ve", *image, "--text", "a circle"]) == 0
    assert capsys.readouterr().out.strip() in ("yes", "no", "maybe")
    assert main(["generate", checkpoint, "--task", "refcoco", *image, "--text", "the circle"]) == 0
    assert len(capsys.readouterr().out.split(",")) == 4
    region = "what color is this? region: <box:0,0,20,20>"
    for text, more in ((region, image), ("say something", [])):
        drawing = ["--png", str(tmp_path / "drawn.png")]
        assert main(["generate", checkpoint, "--task", "instruction", "--text", text, *more, *drawing]) == 0
        capsys.readouterr()
        colours = {colour for _, colour in Image.open(tmp_path / "drawn.png").getcolors(1 << 20)}
        assert ((60, 180, 75) in colours) == bool(more), "the region of the question"
    assert main(["generate", checkpoint, "--task", "instruction", "--text", region]) == 1
    assert "is a region of a picture: give --image FILE" in capsys.readouterr().err

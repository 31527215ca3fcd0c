"""What fine-tuning refuses before it starts, and how epochs become steps; which checkpoint is the best one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_ds.cluster.check_recipe import check_command
from ofa_ds.config import Recipe, load_recipe
from ofa_ds.data.shards import Shards
from ofa_ds.tasks.task_shards import build_task_shards
from ofa_ds.train.judging import Best
from ofa_ds.train.settling import held_out_shards, settled


def shards_of(folder, task: str, lines: list[str], **options) -> Shards:
    file = folder / f"{task}.tsv"
    file.write_text("".join(f"{line}\n" for line in lines))
    if "answers" in options:
        (folder / "answers.txt").write_text("".join(f"{answer}\n" for answer in options["answers"]))
        options["answers"] = folder / "answers.txt"
    build_task_shards(folder / "shards", task, [file], workers=1, **options)
    return Shards(folder / "shards")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Shards:
    return shards_of(tmp_path_factory.mktemp("sst2"), "sst2", [f"a film of number {n}\t{n % 2}" for n in range(10)])


def recipe(*words: str, task: str = "sst2") -> Recipe:
    return load_recipe("pretrain-nano", [f"data.task.name={task}", "data.shards=s", "data.vocab=v", *words])


def test_epochs_are_as_many_steps_as_it_takes_to_see_each_row_so_often(sentences):
    given = recipe("train.num_epochs=2.5", "batch.global_rows=4", "batch.micro_rows=4", "optim.warmup_ratio=0.3",
                   "optim.warmup_steps=0")  # fmt: skip
    found = settled(given, sentences)
    assert (found.train.num_steps, found.optim.warmup_steps) == (7, 2)  # 25 rows in steps of 4
    assert settled(found, sentences) == found


def test_steps_and_warm_up_that_are_given_stay(sentences):
    given = recipe("train.num_steps=9", "optim.warmup_ratio=0.5", "optim.warmup_steps=3")
    assert settled(given, sentences) == given
    assert settled(recipe("optim.warmup_steps=0", "optim.warmup_ratio=0.5"), sentences).optim.warmup_steps == 450


def test_shards_of_another_task_are_refused_and_the_command_that_builds_the_right_ones_is_named(sentences):
    with pytest.raises(ValueError, match="want rows of cola, got rows of sst2; .* --task cola"):
        settled(recipe(task="cola"), sentences)


def test_rows_without_an_answer_are_nothing_to_learn_from(tmp_path):
    unanswered = shards_of(tmp_path, "sst2", ["a film", "another"], columns={"text": 0}, references=False)
    with pytest.raises(ValueError, match="2 of 2 rows have no answer"):
        settled(recipe(), unanswered)
    with pytest.raises(ValueError, match="data.heldout .* have no answers"):
        held_out_shards(recipe(f"data.heldout={unanswered.path}"))


def picture() -> str:
    import base64
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_list_of_answers_must_be_there_and_hold_every_answer_where_the_loss_is_over_it(tmp_path):
    lines = [f"{n}\t{n}\twhat is it?\t1.0|!+{answer}\t\t{picture()}" for n, answer in enumerate(["dog", "cat"])]
    (tmp_path / "open").mkdir()
    without = shards_of(tmp_path / "open", "vqa", lines)
    with pytest.raises(ValueError, match="have no list of answers.*--answers FILE.*constrained=false"):
        settled(recipe(task="vqa"), without)
    (tmp_path / "listed").mkdir()
    listed = shards_of(tmp_path / "listed", "vqa", lines, answers=["dog", "bird"], held_out=True)
    with pytest.raises(ValueError, match="the answer of 1 of 2 rows is not in their list"):
        settled(recipe(task="vqa"), listed)
    is_open = recipe("data.task.constrained=false", task="vqa")
    for shards in (without, listed):
        assert settled(is_open, shards).data == is_open.data


@pytest.mark.parametrize("key", ["train.num_epochs=2", "train.evaluate_every=5", "criterion.rdrop_alpha=1.0"])
def test_pretraining_refuses_what_is_of_fine_tuning(key):
    with pytest.raises(ValueError, match=r"[a-z.]+: is of fine-tuning"):
        check_command("pretrain", load_recipe("pretrain-nano", [key]))


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=20))
def test_the_best_is_the_first_of_the_highest_scores_and_goes_on_from_what_a_checkpoint_says(values):
    best = Best()
    for step, value in enumerate(values):
        if best.is_better(step, "accuracy", value):
            assert best.record == {"step": step, "metric": "accuracy", "value": value}
        best = Best(best.record)
    known = [value for value in values if not math.isnan(value)]
    assert (best.record is None) == (not known)
    if known:
        assert best.record["step"] == values.index(max(known))


@given(values=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12))
def test_the_best_is_the_highest_of_those_that_became_checkpoints_whichever_saves_failed(values):
    """As a run does it: before each save the fate of the one before is known."""
    best, saved = Best(), {}
    named, worth = None, -1
    for step, (value, becomes) in enumerate(values):
        is_best = best.is_better(step, "accuracy", float(value))
        best.settle(saved)
        if is_best:
            saved = {step: becomes}
            if becomes and value > worth:
                named, worth = step, value
    best.settle(saved)
    assert (best.record or {"step": None})["step"] == named


def test_a_best_checkpoint_that_could_not_be_saved_is_none():
    best = Best({"step": 3, "metric": "CIDEr", "value": 0.5})
    assert best.is_better(6, "CIDEr", 0.6)
    best.settle({6: False})
    assert best.record["step"] == 3
    best.settle({3: True})
    assert best.record["step"] == 3


def test_another_metric_begins_anew():
    best = Best({"step": 3, "metric": "CIDEr", "value": 0.9})
    assert best.is_better(6, "BLEU-4", 0.1) and best.record["step"] == 6


@pytest.mark.parametrize("known", [None, 3, {}, {"step": "3", "metric": "a", "value": 1.0}, {"step": 3, "value": 1.0}])
def test_what_is_no_record_is_none(known):
    assert Best(known).record is None


def test_frozen_backbone_norms_are_constants_of_the_model():
    import torch

    from ofa_ds.model.config import model_config
    from ofa_ds.model.ofa import OFA

    given = load_recipe("finetune-vqa-tiny", ['optim.freeze=["token_embedding", "backbone_norms"]'])
    with torch.device("meta"):
        trained = dict(OFA(model_config(given, 100)).named_parameters())
    assert not any(".bn" in name for name in trained) and any(".conv1." in name for name in trained)

"""Pretraining rows in the form of each downstream task: lines that shards accept, and labels that follow their rule."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from ofa_ds.cli import main
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.recast import ANSWER_OF, BAD, FORMS, GOOD, HEADLINE_WORDS, UNSEEN, write_recast
from ofa_ds.data.scenes import write_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.tasks.task_shards import build_task_shards
from ofa_ds.terms import DOWNSTREAM_TASKS

TEXTS = [
    f"the {a} dog of house {k} was {b} to every guest , and then it went away over the hills to rest a little while"
    for k, (a, b) in enumerate(
        [("good", "kind"), ("bad", "cruel"), ("old", "polite"), ("good", "bad"), ("sad", "slow")]
    )
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recast")
    write_scenes(folder / "tsv", 120, seed=3)
    text = folder / "text.tsv"
    text.write_text("".join(f"{k}\t{line}\n" for k, line in enumerate(TEXTS)))
    build_shards(
        folder / "shards", vision_language=[folder / "tsv/vision_language_examples.tsv"], text=[text],
        detection=[folder / "tsv/detection_examples.tsv"], workers=1,
    )  # fmt: skip
    return folder / "shards"


def recast(given: Path, tmp_path: Path, task: str) -> list[list[str]]:
    path, count = write_recast(given, tmp_path, task)
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    assert len(rows) == count
    return rows


def test_every_downstream_task_has_a_form_but_the_one_whose_codes_no_row_has(given: Path, tmp_path: Path) -> None:
    assert set(FORMS) == set(DOWNSTREAM_TASKS) - {"text_to_image"}
    assert set(ANSWER_OF) == {name for name, task in DOWNSTREAM.items() if task.candidates == "file"}
    with pytest.raises(
        ValueError, match="text_to_image: rows of pretraining have no codes .*; see ofa-ds codes encode"
    ):
        write_recast(given, tmp_path, "text_to_image")


@pytest.mark.parametrize("task", FORMS)
def test_the_command_writes_lines_that_shards_accept_with_every_answer_in_the_list(
    task: str, given: Path, tmp_path: Path
) -> None:
    assert main(["shards", "recast", str(given), "--task", task, "--out", str(tmp_path), "--rows", "30"]) == 0
    answers = tmp_path / "answers.txt" if task in ANSWER_OF else None
    manifest = build_task_shards(
        tmp_path / "out", task, [tmp_path / f"{task}.tsv"], answers=answers, workers=1, strict=True
    )
    part = manifest.families["downstream"]
    assert 1 <= part.rows <= 30 and (part.unanswered, part.unlisted) == (0, 0)


def test_the_same_seed_gives_the_same_file(given: Path, tmp_path: Path) -> None:
    for task in FORMS:
        first, _ = write_recast(given, tmp_path / task / "a", task, seed=4)
        again, _ = write_recast(given, tmp_path / task / "b", task, seed=4)
        assert first.read_bytes() == again.read_bytes()


def test_what_rows_say_themselves_is_kept(given: Path, tmp_path: Path) -> None:
    shards = Shards(given)
    rows = [shards.row("vision_language", i) for i in range(120)]
    captions = [row for row in rows if row["type"] == "caption"]
    found = recast(given, tmp_path, "caption")
    assert [columns[2] for columns in found] == [row["caption"] for row in captions]
    assert [base64.b64decode(columns[4]) for columns in found] == [row["image"] for row in captions]
    joined = [caption for columns in recast(given, tmp_path, "caption_scst") for caption in columns[2].split("&&")]
    assert set(joined) == {row["caption"] for row in captions}
    questions = [row for row in rows if row["type"] == "qa"]
    assert [columns[2:4] for columns in recast(given, tmp_path, "vqa")] == [
        [row["question"], f"{row['answers'][0][1]}|!+{row['answers'][0][0]}"] for row in questions
    ]
    regions = [row for row in rows if row["type"] == "visual_grounding"]
    found = recast(given, tmp_path, "refcoco")
    assert [tuple(map(float, columns[3].split(","))) for columns in found] == [row["box"] for row in regions]


def test_labels_follow_their_rule(given: Path, tmp_path: Path) -> None:
    captions = {columns[4]: columns[2] for columns in recast(given, tmp_path, "caption")}
    labels = set()
    for _, _, image, hypothesis, _, label in recast(given, tmp_path, "snli_ve"):
        own = captions[image]
        labels.add(label)
        assert (hypothesis == own) == (label == "entailment")
        assert hypothesis.endswith(UNSEEN) == (label == "neutral")
    assert len(labels) == 3
    for _, sentence, right in recast(given, tmp_path, "cola"):
        assert (right == "1") == any(text.startswith(sentence) for text in TEXTS)
    for premise, hypothesis, label in recast(given, tmp_path, "mnli"):
        denied = hypothesis.startswith("it is not true that ")
        assert label == ("2" if denied else "1" if premise.startswith(hypothesis) else "0")
    for _, question, sentence, label in recast(given, tmp_path, "qnli"):
        asked = question.removeprefix("what comes after ").removesuffix(" ?")
        assert (label == "entailment") == (asked in sentence.split())
    for *_, one, other, label in recast(given, tmp_path, "qqp"):
        assert (label == "1") == (other == f"please tell me {one}")
    for one, other, label in recast(given, tmp_path, "mrpc"):
        assert (label == "1") == (sorted(one.split()) == sorted(other.split()))
    for sentence, label in recast(given, tmp_path, "sst2"):
        assert bool(set(sentence.split()) & (GOOD if label == "1" else BAD))
    for article, headline in recast(given, tmp_path, "gigaword"):
        assert article.startswith(headline) and len(headline.split()) == HEADLINE_WORDS
    for _, number, name in recast(given, tmp_path, "imagenet"):
        assert number.isdigit() and name in (tmp_path / "answers.txt").read_text().splitlines()


def test_shards_without_the_rows_that_a_task_is_made_of_are_named(given: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.tsv"
    path.write_text("1\tone two three four\n2\tnone of these words is either\n")
    build_shards(tmp_path / "shards", text=[path], workers=1)
    with pytest.raises(ValueError, match="has no vision_language rows, of which vqa is made"):
        write_recast(tmp_path / "shards", tmp_path / "out", "vqa")
    with pytest.raises(ValueError, match="none of its text rows can be made into rows of sst2"):
        write_recast(tmp_path / "shards", tmp_path / "out", "sst2")
    assert not (tmp_path / "out").exists()

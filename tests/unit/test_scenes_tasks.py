"""The embedded data in the form of each downstream task: right answers, nothing likely before looking, two parts."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from test_scenes import pixels, right_answer, seen

from ofa_ds.data import scenes
from ofa_ds.data.scenes_tasks import ANSWERS, BACK, CLASSES, MAKERS, NUMBERS, write_task_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.tasks.task_shards import build_task_shards
from ofa_ds.terms import DOWNSTREAM_TASKS

ROWS = 600
LOOKING = {"vqa", "snli_ve", "imagenet", "refcoco", "refcocoplus", "refcocog", "caption", "caption_scst"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    for task in DOWNSTREAM_TASKS:
        for split in scenes.SPLITS:
            write_task_scenes(out / split / task, task, ROWS, seed=5, split=split)
    return out


def rows(folder: Path, task: str, split: str = "train") -> list[list[str]]:
    text = (folder / split / task / f"{task}.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


def test_every_downstream_task_has_scenes() -> None:
    assert set(MAKERS) == set(DOWNSTREAM_TASKS)
    assert set(ANSWERS) == {name for name, task in DOWNSTREAM.items() if task.candidates == "file"}


@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
def test_every_line_is_good_for_shards_without_a_doubt(task: str, folder: Path, tmp_path: Path) -> None:
    answers = folder / f"train/{task}/answers.txt" if task in ANSWERS else None
    manifest = build_task_shards(
        tmp_path / "out", task, [folder / f"train/{task}/{task}.tsv"], answers=answers, workers=1, strict=True
    )
    part = manifest.families["downstream"]
    assert (part.rows, part.warnings, part.unanswered, part.unlisted) == (ROWS, 0, 0, 0)
    assert len(Shards(tmp_path / "out").answers) == len(ANSWERS.get(task, ()))


def test_the_same_seed_gives_the_same_file_and_more_rows_begin_with_those_of_fewer(tmp_path: Path) -> None:
    for task in DOWNSTREAM_TASKS:
        here = tmp_path / task
        one = write_task_scenes(here / "a", task, 20, seed=1).read_bytes()
        assert write_task_scenes(here / "b", task, 30, seed=1).read_bytes().startswith(one)
        assert write_task_scenes(here / "c", task, 20, seed=2).read_bytes() != one


@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
def test_training_and_held_out_rows_share_nothing_that_is_asked(task: str, folder: Path) -> None:
    columns = DOWNSTREAM[task].columns
    asked = ["image"] if "image" in columns else [name for name in ("text", "text_pair") if name in columns]
    train, heldout = ({tuple(row[columns[name]] for name in asked) for row in rows(folder, task, split)}
                      for split in scenes.SPLITS)  # fmt: skip
    assert train and heldout and not train & heldout


def test_captions_questions_and_boxes_are_what_the_pixels_show(folder: Path) -> None:
    for _, _, caption, _, image in rows(folder, "caption")[:200]:
        assert caption == " above ".join(f"a {color} {kind}" for color, kind, _ in seen(pixels(image)))
    for _, _, question, answers, objects, image in rows(folder, "vqa")[:200]:
        right = right_answer(question, seen(pixels(image)))
        assert answers == f"1.0|!+{right}" + (f"&&0.3|!+{NUMBERS[right]}" if right in NUMBERS else "") and not objects
    for task in ("refcoco", "refcocoplus", "refcocog"):
        for _, _, phrase, box, image in rows(folder, task)[:200]:
            words = phrase.split(" that ")[0].split()
            fitting = [each for each in seen(pixels(image)) if list(each[:2]) == words[-2:]]
            assert [",".join(map(str, each[2])) for each in fitting] == [box]


def test_entailment_holds_as_the_pixels_say(folder: Path) -> None:
    for _, _, image, hypothesis, premise, label in rows(folder, "snli_ve"):
        shapes = seen(pixels(image))
        words = hypothesis.removeprefix("there is a ").removeprefix("the ").split()
        there = any(list(shape[:2]) == words[:2] for shape in shapes)
        if hypothesis.startswith("there"):
            assert label == ("entailment" if there else "contradiction")
        else:
            assert label == ("neutral" if there else "contradiction")
        assert premise.split()[2] == ("one", "two")[len(shapes) - 1]


def test_a_class_is_what_the_pixels_show(folder: Path) -> None:
    for image, number, words in rows(folder, "imagenet"):
        shapes = seen(pixels(image))
        assert CLASSES[int(number) - 1] == words and len(CLASSES) == 20
        if len(shapes) == 1:
            assert words.startswith(f"{shapes[0][0]} {shapes[0][1]},")
        else:
            assert len(shapes) == 3 and {shape[1] for shape in shapes} == {words.split("s,")[0]}


def facts_of(sentence: str) -> frozenset:
    """A sentence of two shapes and a relation -> the same set whichever way round it is said."""
    a, b = sentence.removeprefix("the ").split(" the ")
    first, where = a.split(" is ")
    return frozenset({(first, where, b), (b, BACK[where], first)})


def test_entailment_of_sentences_follows_from_what_they_say(folder: Path) -> None:
    for premise, hypothesis, label in rows(folder, "mnli"):
        a, b = facts_of(premise), facts_of(hypothesis)
        denied = frozenset((x, BACK[where], y) for x, where, y in a)
        assert label == ("1" if a == b else "2" if b == denied else "0")
    for _, premise, hypothesis, label in rows(folder, "rte"):
        assert (label == "entailment") == (facts_of(premise) == facts_of(hypothesis))
    for one, other, label in rows(folder, "mrpc"):
        assert (label == "1") == (facts_of(one) == facts_of(other))
    for *_, one, other, label in rows(folder, "qqp"):
        one = one.removeprefix("is ").replace(" ", " is ", 3).replace(" is ", " ", 2)  # "the red circle is above ..."
        other = other.removeprefix("can you see ").replace(" ", " is ", 3).replace(" is ", " ", 2)
        assert (label == "1") == (facts_of(one.rstrip("?")) == facts_of(other.rstrip("?")))
    for _, question, sentence, label in rows(folder, "qnli"):
        assert (label == "entailment") == (question.removeprefix("where is ").rstrip("?") in sentence)


def test_codes_are_a_picture_of_the_caption_and_of_where_its_shapes_lie(folder: Path) -> None:
    for _, codes, text in rows(folder, "text_to_image"):
        cells = scenes.picture_of_codes([int(code) for code in codes.split()])
        middles = {
            name: np.argwhere((cells == color).all(-1)).mean(0) for name, color in scenes.COLORS.items()
            if (cells == color).all(-1).any()
        }  # fmt: skip
        first, *rest = (words.split()[0] for words in text.removeprefix("a ").split(" a "))
        assert set(middles) == {first, *rest}
        where = next((where for where in BACK if f" {where} " in text), "")
        if where and first != rest[0]:
            (y, x), (other_y, other_x) = middles[first], middles[rest[0]]
            right = {"above": y < other_y, "below": y > other_y, "left of": x < other_x, "right of": x > other_x}
            assert right[where], text


def test_a_headline_is_what_the_article_begins_with(folder: Path) -> None:
    for article, headline in rows(folder, "gigaword"):
        where = next(where for where in BACK if f" {where} " in headline)
        a, b = headline.split(f" {where} ")
        assert article.startswith(f"the {a} is {where} the {b} and ")


@pytest.mark.parametrize(
    "task", [name for name in DOWNSTREAM_TASKS if not {"captions", "box", "codes"} & set(DOWNSTREAM[name].columns)]
)
def test_no_label_is_likely_before_looking(task: str, folder: Path) -> None:
    """The best constant label, and the best label of each text of a picture, is right about as often as a guess."""
    columns = DOWNSTREAM[task].columns
    answer = next(columns[name] for name in ("label", "answers", "answer") if name in columns)
    labels = Counter(row[answer] for row in rows(folder, task))
    guess = {"vqa": 0.2, "mnli": 1 / 3, "imagenet": 1 / 20, "gigaword": 1 / 100}.get(task, 1 / 2)
    assert max(labels.values()) / ROWS < guess + 0.07
    if task == "snli_ve":
        by_kind = defaultdict(Counter)
        for row in rows(folder, task):
            by_kind[row[3].split()[0]][row[answer]] += 1
        assert sum(max(count.values()) for count in by_kind.values()) / ROWS < 0.57


@pytest.mark.parametrize(
    "change, message",
    [({"task": "itm"}, "no scenes for task 'itm'"), ({"rows": 0}, "1 row"), ({"split": "x"}, "heldout"),
     ({"seed": -1}, "seed")],
)  # fmt: skip
def test_wrong_arguments_are_named_before_a_file_is_made(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_task_scenes(tmp_path / "out", **{"task": "vqa", "rows": 1, "seed": 0, **change})
    assert not (tmp_path / "out").exists()


def test_drawing_that_is_broken_off_leaves_no_file_that_lacks_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MAKERS["sst2"]

    def full(draw: scenes.Draw, number: int) -> tuple[str, ...]:
        if number == 3:
            raise OSError(28, "No space left on device")
        return real(draw, number)

    monkeypatch.setitem(MAKERS, "sst2", full)
    with pytest.raises(OSError, match="No space"):
        write_task_scenes(tmp_path, "sst2", 5, seed=1)
    assert not list(tmp_path.iterdir())

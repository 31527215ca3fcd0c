"""Text to image as a downstream task: what rows, questions and recipes may say, and what comes out of a model."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import task_models
from test_tsv import picture

from ofa_ds.cli import main
from ofa_ds.cluster.check_recipe import check_sense
from ofa_ds.config import load_recipe
from ofa_ds.data import scenes
from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.inference.answering import answer
from ofa_ds.inference.evaluate import blinded, judge_tasks
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.tasks.downstream.text_to_image import PROMPT
from ofa_ds.tasks.kind import Decoding
from ofa_ds.tasks.task import DOWNSTREAM, ask, examples_of
from ofa_ds.tasks.task_shards import build_task_shards

TASK = DOWNSTREAM["text_to_image"]
NAME = TASK.name
ROWS = 6
SIDE = scenes.SIDE // scenes.CELL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_models.build_painting(tmp_path_factory.mktemp("painting"), rows=ROWS)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return task_models.painting_model(folder)


@pytest.fixture(scope="module")
def examples(folder: Path, model: LoadedModel) -> list[Example]:
    return task_models.examples_of(model, Shards(folder / NAME), NAME)


def shards_of(tmp_path: Path, *lines: bytes, **options: object) -> Shards:
    (tmp_path / "a.tsv").write_bytes(b"".join(line + b"\n" for line in lines))
    build_task_shards(tmp_path / "out", NAME, [tmp_path / "a.tsv"], workers=1, **options)
    return Shards(tmp_path / "out")


def codes(count: int) -> bytes:
    return b" ".join(str(k % 128).encode() for k in range(count))


def test_a_caption_becomes_the_question_and_codes_become_the_answer(model: LoadedModel, tmp_path: Path) -> None:
    words = " ".join(["A", "Red", *["Circle"] * 70])
    shards = shards_of(tmp_path, b"7\t" + codes(64) + b"\t" + words.encode())
    (example,) = examples_of(shards, [NAME], "downstream", 0, model.context(shards))
    vocab = model.vocab
    wanted = " what is the complete image? caption: " + " ".join(["a", "red", *["circle"] * 62])
    assert vocab.decode(example.source[1:-1]) == wanted == example.source_text and len(PROMPT) == 38
    assert example.target.tolist() == [*(vocab.code_start + k for k in range(64)), vocab.eos]
    assert example.prev.tolist() == [vocab.bos, *example.target[:-1]] and example.code and example.image is None


def test_files_of_two_three_and_four_columns_are_told_apart(tmp_path: Path) -> None:
    image = base64.b64encode(picture())
    four = (
        shards_of(tmp_path / "d", b"\t".join((b"7", image, b"A circle", codes(4))))
        if (tmp_path / "d").mkdir() is None
        else None
    )
    row = four.row("downstream", 0)
    assert (row["id"], row["image"], row["text"], row["answers"]) == ("7", picture(), "A circle", [("0 1 2 3", 1.0)])
    (tmp_path / "c").mkdir()
    two = shards_of(tmp_path / "c", b"8\ta square", references=False)
    assert two.row("downstream", 0)["text"] == "a square" and not two.row("downstream", 0)["answers"]
    with pytest.raises(ValueError, match=r"columns: none holds what is right \(codes\); --no-references"):
        shards_of(tmp_path, b"8\ta square")


@pytest.mark.parametrize(
    "column, message",
    [(b"1 2 x 4", "codes: want whole numbers 0 ... 8191, got 'x' at place 2"), (b"1 2 3 8192", "got '8192' at place 3"),
     (b"1 -2 3 4", "got '-2' at place 1"), (b"1 2 3", "as many as a square has.*got 3"), (b"", "square has.*got 0")],
)  # fmt: skip
def test_codes_that_are_none_are_one_line(tmp_path: Path, column: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        shards_of(tmp_path, b"7\t" + column + b"\ta circle")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "column, message",
    [(codes(16), "16 codes, want 64: data.code_image_size 64"), (codes(63) + b" 128", "image code 128 is outside 0")],
)
def test_rows_that_do_not_fit_the_model_name_the_row(
    model: LoadedModel, tmp_path: Path, column: bytes, message: str
) -> None:
    shards = shards_of(tmp_path, b"7\t" + column + b"\ta circle")
    with pytest.raises(ValueError, match=rf"row.*{message}"):
        examples_of(shards, [NAME], "downstream", 0, model.context(shards))


def test_a_caption_of_ten_thousand_words_is_one_line(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="--text: 10000 words, want 64 at most") as error:
        ask(model.context(), NAME, None, "word " * 10_000)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    with pytest.raises(ValueError, match="longer than the 512 positions"):
        ask(model.context(), NAME, None, "~" * 3000)


def test_answers_are_whole_runs_of_codes_and_a_row_s_own_whatever_is_asked_beside_it(
    model: LoadedModel, examples: list[Example]
) -> None:
    together = answer(model, examples, TASK)
    for ids in together:
        assert len(ids) == SIDE * SIDE and all(model.vocab.is_code(token) for token in ids)
    assert len({tuple(ids) for ids in together}) == ROWS
    assert answer(model, examples[2:4], TASK) == together[2:4]
    best_of_two = answer(model, examples, TASK, decoding=Decoding(codes=True, top_k=256, beams=2))
    assert any(a == b for a, b in zip(together, best_of_two, strict=True)) and best_of_two != together
    assert answer(model, examples[:1], TASK, decoding=Decoding(codes=True, beams=2)) != together[:1]


def test_a_model_that_knows_the_rows_paints_them_and_is_judged_so(
    model: LoadedModel, examples: list[Example], folder: Path
) -> None:
    learned = task_models.learn_by_heart(model, examples, steps=120)
    found = judge_tasks(learned, Shards(folder / NAME))[NAME]
    score = found["scores"][TASK.metric]
    for name in ("colour right", "shape right", "place right"):
        assert found["scores"][name]["own"] > 0.7 > found["scores"][name]["shuffled"]
    assert score["own"] > 0.95 > score["constant"] and found["token_accuracy"]["constant"] == pytest.approx(
        score["constant"], abs=0.02
    )
    records = TASK.hand_in(learned.context(), examples, answer(learned, examples, TASK))
    wanted = [[int(code) for code in example.references[0][0].split()] for example in examples]
    assert sum(record["codes"] == own for record, own in zip(records, wanted, strict=True)) >= ROWS - 1
    assert [record["uniq_id"] for record in records] == [example.row_id for example in examples]


LEFT_OF = "a red circle left of a blue square"


@pytest.mark.parametrize(
    "painted, caption, colour, shape, place",
    [
        ((("circle", "red", 0), ("square", "blue", 40)), LEFT_OF, 1, 1, 1),
        ((("circle", "red", 40), ("square", "blue", 0)), LEFT_OF, 1, 1, 0),
        ((("circle", "blue", 0), ("square", "red", 40)), LEFT_OF, 1, 0, 0),
        ((("square", "red", 0), ("square", "blue", 40)), LEFT_OF, 1, 0, 0),
        ((("circle", "green", 0), ("square", "blue", 40)), LEFT_OF, 0, 0, 0),
        ((("circle", "red", 0),), "a red circle", 1, 1, None),
        ((("square", "red", 0),), "a red circle", 1, 0, None),
    ],
)
def test_colours_shapes_and_places_are_judged_each_by_its_name(
    model: LoadedModel, painted: tuple, caption: str, colour: float, shape: float, place: float | None
) -> None:
    scene = tuple(scenes.Shape(kind, color, 24, x, 8 + x // 2) for kind, color, x in painted)
    ids = [model.vocab.code(code) for code in scenes.codes(scenes.paint(scene), scenes.WHOLE)]
    example = ask(model.context(), NAME, None, caption)
    scores = TASK.judge(model.context(), [example], [ids])
    assert [scores[f"{name} right"] for name in ("colour", "shape", "place")] == [colour, shape, place]


def test_a_caption_alone_has_no_other_row_s(examples: list[Example]) -> None:
    assert blinded(examples[:1], "shuffled") is None
    (first, second), (after, _) = examples[:2], blinded(examples[:2], "shuffled")
    assert after.source is second.source and after.row_id == first.row_id


def test_a_model_that_cannot_paint_says_so(model: LoadedModel, examples: list[Example]) -> None:
    data = dataclasses.replace(model.recipe.data, code_image_size=32)
    smaller = dataclasses.replace(model, recipe=dataclasses.replace(model.recipe, data=data))
    with pytest.raises(ValueError, match="data.code_image_size 32: the model has places for the codes of 64 x 64"):
        answer(smaller, examples, TASK)
    config = dataclasses.replace(model.model.config, use_ofasys=True)
    without = type(model.model)(config).eval()
    with pytest.raises(ValueError, match="has no image codes, so that it cannot paint"):
        answer(dataclasses.replace(model, model=without), examples, TASK)


def test_a_recipe_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="data.task.prompt=src: image codes come right after bos"):
        check_sense(load_recipe("finetune-image-gen-stage1-nano", ["data.task.prompt=src"]))
    with pytest.raises(ValueError, match="data.code_image_size 256 has 32 codes a side, the model's table has 16"):
        check_sense(
            load_recipe(
                "finetune-image-gen-stage1-nano",
                ["data.code_image_size=256", "data.infill_image_size=256", "data.max_image_size=256"],
            )
        )


def test_predict_writes_codes_that_can_be_painted(model: LoadedModel, folder: Path, tmp_path: Path) -> None:
    path = task_models.saved(model, tmp_path / "run/step_00000001")
    arguments = ["--task", NAME, "--shards", str(folder / NAME), "--vocab", str(folder / "vocab")]
    assert main(["predict", str(path), *arguments, "--out", str(tmp_path / "out.json")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    assert [len(record["codes"]) for record in records] == [SIDE * SIDE] * ROWS
    assert scenes.picture_of_codes(records[0]["codes"]).shape == (64, 64, 3)


def test_a_scene_s_codes_are_those_of_its_picture() -> None:
    shape = scenes.Shape("square", "red", 16, 8, 8)
    whole = scenes.codes(scenes.paint((shape,)), scenes.WHOLE)
    assert len(whole) == 64 and np.array_equal(scenes.picture_of_codes(whole), scenes.paint((shape,)))

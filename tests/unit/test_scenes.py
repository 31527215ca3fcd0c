"""The embedded data: right answers, no answer likelier than another before looking, parts that share no picture."""

import base64
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofa_ds.data import scenes

ROWS = 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    scenes.write_scenes(out / "train", ROWS, seed=5)
    scenes.write_scenes(out / "heldout", ROWS, seed=5, split="heldout")
    return out


def read(folder: Path, name: str, split: str = "train") -> list[list[str]]:
    text = (folder / split / f"{name}_examples.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


def pixels(text: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))))


def seen(picture: np.ndarray) -> list[tuple[str, str, tuple[int, int, int, int]]]:
    """Color, kind and box of each shape, found in the pixels alone; top to bottom by center."""
    found = []
    for color, value in scenes.COLORS.items():
        mask = (picture == value).all(-1)
        for part in components(mask):
            ys, xs = np.nonzero(part)
            box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
            fill = part.sum() / ((box[2] - box[0]) * (box[3] - box[1]))
            kind = "square" if fill == 1 else "circle" if fill > 0.65 else "triangle"
            found.append((color, kind, box))
    return sorted(found, key=lambda shape: shape[2][1] + shape[2][3])


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts of a mask, by flooding."""
    parts, left = [], mask.copy()
    while left.any():
        part = np.zeros_like(left)
        part[tuple(np.argwhere(left)[0])] = True
        while True:
            grown = part.copy()
            grown[1:] |= part[:-1]
            grown[:-1] |= part[1:]
            grown[:, 1:] |= part[:, :-1]
            grown[:, :-1] |= part[:, 1:]
            grown &= left
            if (grown == part).all():
                break
            part = grown
        parts.append(part)
        left &= ~part
    return parts


def right_answer(question: str, shapes: list[tuple[str, str, tuple[int, int, int, int]]]) -> str:
    """The answer worked out from what is seen in the pixels."""
    words = question.rstrip("?").split()
    start = " ".join(words[:2])
    if start == "what color":
        return next(color for color, kind, _ in shapes if kind == words[-1])
    if start == "what shape":
        return next(kind for color, kind, _ in shapes if color == words[-1])
    if start == "how many":
        named = words[2].removesuffix("s") if words[-1] == "there" else words[-1]
        return str(sum(named in shape[:2] for shape in shapes))
    if start == "is the":
        box = next(box for _, kind, box in shapes if kind == words[2])
        return "small" if box[2] - box[0] == scenes.SIZES["small"] else "large"
    if start == "is there":
        wanted = {word for word in words[3:] if word != "shape"}
        return "yes" if any(wanted <= set(shape[:2]) for shape in shapes) else "no"
    axis, last = {"left": (0, 0), "right": (0, -1), "top": (1, 0), "bottom": (1, -1)}[words[-1]]
    chosen = sorted(shapes, key=lambda shape: shape[2][axis] + shape[2][axis + 2])[last]
    return chosen[1] if words[1] == "shape" else chosen[0]


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        scenes.write_scenes(tmp_path / name, 40, seed=seed)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 7
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    name = "vision_language_examples.tsv"
    assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_more_rows_begin_with_the_rows_of_fewer(tmp_path: Path) -> None:
    scenes.write_scenes(tmp_path / "few", 8, seed=1)
    scenes.write_scenes(tmp_path / "more", 16, seed=1)
    name = "vision_language_examples.tsv"
    assert (tmp_path / "more" / name).read_bytes().startswith((tmp_path / "few" / name).read_bytes())


def test_every_question_is_answered_by_the_pixels(folder: Path) -> None:
    asked = [row for row in read(folder, "vision_language") if row[7] == "qa"]
    assert len(asked) == ROWS * 4 // 10
    for _, image, _, question, refs, *_ in asked[:400]:
        assert refs == f"1.0|!+{right_answer(question, seen(pixels(image)))}", question


def test_every_caption_says_what_the_pixels_show_from_top_to_bottom(folder: Path) -> None:
    for _, image, caption, _, _, objects, _, kind in read(folder, "vision_language")[:600]:
        if kind == "caption":
            phrases = [f"{color} {kind}" for color, kind, _ in seen(pixels(image))]
            assert caption == " above ".join(f"a {phrase}" for phrase in phrases)
            assert objects.split("&&") == phrases


def test_every_referring_expression_fits_one_shape_and_its_box(folder: Path) -> None:
    for _, image, caption, _, box, _, _, kind in read(folder, "vision_language")[:600]:
        if kind == "visual_grounding":
            _, size, color, shape = caption.split()
            fitting = [each for each in seen(pixels(image)) if each[:2] == (color, shape)]
            assert [",".join(map(str, each[2])) for each in fitting] == [box]
            assert fitting[0][2][2] - fitting[0][2][0] == scenes.SIZES[size]


def test_detection_lists_all_shapes_from_top_to_bottom(folder: Path) -> None:
    for _, image, label in read(folder, "detection"):
        listed = [(item.split(",")[5], tuple(map(int, item.split(",")[:4]))) for item in label.split("&&")]
        assert listed == [(f"{color} {kind}", box) for color, kind, box in seen(pixels(image))]


def test_no_answer_is_likely_before_looking(folder: Path) -> None:
    """The best constant answer per kind of question, and per very question, is right about as often as a guess."""
    by_type, by_question = defaultdict(Counter), defaultdict(Counter)
    for row in read(folder, "vision_language"):
        if row[7] == "qa":
            by_type[" ".join(row[3].split()[:2])][row[4]] += 1
            by_question[row[3]][row[4]] += 1
    assert set(by_type) == {
        "what color", "what shape", "how many", "is the", "is there", "which shape", "which color",
    }  # fmt: skip
    right = {name: max(count.values()) / count.total() for name, count in by_type.items()}
    guess = {"color": 1 / 6, "shape": 1 / 3, "many": 1 / 3, "the": 1 / 2, "there": 1 / 2}
    for name, share in right.items():
        assert share < guess[name.split()[1]] + 0.12, (name, share)
    total = sum(count.total() for count in by_type.values())
    assert sum(max(count.values()) for count in by_type.values()) / total < 0.40
    assert sum(max(c.values()) for c in by_question.values() if c.total() >= 20) < 0.46 * total


def test_train_and_heldout_share_no_picture_and_no_sentence(folder: Path) -> None:
    for name in ("vision_language", "image", "detection", "text"):
        train, heldout = ({row[1] for row in read(folder, name, split)} for split in scenes.SPLITS)
        assert train and heldout and not train & heldout, name


def test_codes_say_what_the_middle_of_the_picture_looks_like(folder: Path) -> None:
    y0, x0, y1, x1 = scenes.HOLE
    used = set()
    for _, image, text in read(folder, "image"):
        values = [int(code) for code in text.split()]
        picture = pixels(image)
        middle = picture[y0:y1, x0:x1]
        assert len(values) == 16 and max(values) < scenes.NUM_CODES
        assert (scenes.picture_of_codes(values) == middle).all(-1).mean() > 0.85
        ring = picture.copy()
        ring[y0:y1, x0:x1] = scenes.GROUND
        assert (ring != scenes.GROUND).any(), "the part outside the hole says nothing about the color"
        used.update(values)
    assert len(used) > 40


def test_a_code_outside_the_book_is_shown_black() -> None:
    assert not scenes.picture_of_codes([127, 0, 0, 0])[:8, :8].any()


def test_a_replaced_object_makes_another_caption(folder: Path) -> None:
    objects = (folder / "train" / "negative_sample" / "object.txt").read_text().split("\n")
    assert len(set(objects) - {""}) == len(scenes.KINDS) * len(scenes.COLORS)
    assert {row[5].split("&&")[0] for row in read(folder, "vision_language") if row[7] == "caption"} <= set(objects)


def test_each_answer_type_holds_every_answer_of_its_questions(folder: Path) -> None:
    kinds = json.loads((folder / "train" / "negative_sample" / "type2ans.json").read_text())
    known = {answer for name, answers in kinds.items() if name != "other" for answer in answers}
    assert {row[4].removeprefix("1.0|!+") for row in read(folder, "vision_language") if row[7] == "qa"} <= known


@pytest.mark.parametrize("questions", range(11))
def test_the_share_of_questions_is_exact_and_captions_and_regions_share_the_rest(questions: int) -> None:
    kinds = Counter(scenes._row_type(row, questions) for row in range(40))
    assert kinds["qa"] == 4 * questions
    assert kinds["caption"] == kinds["visual_grounding"] == 2 * (10 - questions)


def test_the_default_share_keeps_the_order_of_row_types() -> None:
    cycle = [*("caption", "qa", "visual_grounding") * 3, "qa"]
    assert [scenes._row_type(row, scenes.QUESTIONS) for row in range(20)] == 2 * cycle


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"questions": 11}, "0 to 10 questions"),
        ({"rows": 0}, "at least 1 row"),
        ({"split": "test"}, "train, heldout"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes.write_scenes(tmp_path / "out", **{"rows": 1, "seed": 0, **arguments})
    assert not (tmp_path / "out").exists()

"""Scenes: procedurally drawn pictures with all that the eight tasks need, as OFA TSVs, deterministic from a seed.

A scene is one or two plain shapes on a plain ground; no two share both kind and color, and their centers differ by at
least 8 pixels in x and in y, so that every caption, question and referring expression has exactly one right answer.
Scenes are drawn *given* the answer of their question, so that no answer is likelier than another before looking.
A scene belongs to the held-out part by its content alone (`_part`), whatever the seed: the two parts share no picture.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from ofa_ds.data.png import encode_png
from ofa_ds.storage.atomic import new_files

SIDE = 64
"""Width and height of every picture, in pixels."""
HOLE = (16, 16, 48, 48)
"""y0, x0, y1, x1 of the central part that image codes describe."""
WHOLE = (0, 0, SIDE, SIDE)
CELL = 8
"""Side of the square that one image code describes, in pixels."""
NUM_CODES = 128
"""Size of the code book; 1 + 15 patterns x 6 colors = 91 entries are in use."""

KINDS = ("circle", "square", "triangle")
COLORS = {
    "red": (230, 25, 25),
    "green": (25, 190, 25),
    "blue": (25, 25, 230),
    "yellow": (240, 240, 25),
    "purple": (200, 25, 200),
    "white": (250, 250, 250),
}
GROUND = (136, 136, 136)
"""Near the zero of the normalised image, so that the ground says little."""
SIZES = {"small": 16, "large": 24}
"""Side of the bounding box, in pixels."""
SPLITS = ("train", "heldout")

_GRID = 8
"""Pixels that corners of shapes are multiples of. With 4 a nano model needs twice the steps to tell kinds apart."""
BIG_GRID = 4
_MIN_CENTER_DISTANCE = 8
BIG_SIZES = (40, 44, 48)
_HELDOUT_SHARE = 8
_NUM_NEGATIVE_CAPTIONS = 2000
_FAMILY_SHARES = {"text_examples": 4, "image_examples": 8, "detection_examples": 8}
_QUESTION_PLACES = (1, 4, 7, 9, 0, 3, 6, 2, 5, 8)
"""Of ten rows, those that are questions: the first `questions` of these. The rest are captions and regions in turn."""
QUESTIONS = 4

T = TypeVar("T")

Look = tuple[str, str]
"""Kind and color."""


@dataclass(frozen=True, slots=True)
class Shape:
    kind: str
    color: str
    size: int
    """Side of the bounding box, in pixels."""
    x: int
    y: int
    """Top left corner of the bounding box, in pixels."""

    @property
    def phrase(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def sized_phrase(self) -> str:
        return f"{size_name(self.size)} {self.phrase}"

    @property
    def box(self) -> str:
        return f"{self.x},{self.y},{self.x + self.size},{self.y + self.size}"

    @property
    def center2(self) -> tuple[int, int]:
        """Twice the center (x, y), so that it is a whole number."""
        return 2 * self.x + self.size, 2 * self.y + self.size


Scene = tuple[Shape, ...]
"""Top to bottom."""


def write_scenes(out: Path, rows: int, seed: int, split: str = "train", questions: int = QUESTIONS) -> dict[str, int]:
    """Write `rows` vision-language rows, a quarter as many text rows, an eighth as many image and detection rows each.

    Of ten vision-language rows, `questions` are questions, the others captions and regions by halves.
    Files: {vision_language,text,image,detection}_examples.tsv and negative_sample/; none is overwritten (`new_files`).
    Returns the number of rows of each TSV. Raises ValueError for an unknown split, fewer than one row or a wrong share,
    and where another file is there.
    """
    check_arguments(rows, seed, split)
    if not 0 <= questions <= len(_QUESTION_PLACES):
        raise ValueError(f"scenes: want 0 to {len(_QUESTION_PLACES)} questions in ten rows, got {questions}")
    numbers = {"vision_language_examples": rows} | {name: max(rows // n, 1) for name, n in _FAMILY_SHARES.items()}
    makers = (partial(_vision_language_row, questions=questions), _text_row, _image_row, _detection_row)
    with new_files(Path(out), "scenes") as folder:
        for number, (name, maker) in enumerate(zip(numbers, makers, strict=True)):
            with open(folder / f"{name}.tsv", "w", encoding="utf-8", newline="\n") as file:
                for i in range(numbers[name]):
                    columns = maker(Draw(seed, split, number, i), i)
                    file.write("\t".join((f"{split}-{seed}-{i}", *columns)) + "\n")
        (folder / "negative_sample").mkdir()
        _write_negatives(folder / "negative_sample", Draw(seed, split, len(makers), 0))
    return numbers


def check_arguments(rows: int, seed: int, split: str) -> None:
    """Raises ValueError for an unknown split, fewer than one row, or a seed below 0."""
    if split not in SPLITS:
        raise ValueError(f"scenes: unknown split {split!r}; want one of {', '.join(SPLITS)}")
    if rows < 1:
        raise ValueError(f"scenes: want at least 1 row, got {rows}")
    if seed < 0:
        raise ValueError(f"scenes: want a seed of at least 0, got {seed}")


class Draw:
    """The random choices of one row; a function of (seed, split, family or task, row)."""

    def __init__(self, seed: int, split: str, family: int | str, row: int) -> None:
        self.split = split
        self._random = random.Random(f"scenes/{seed}/{split}/{family}/{row}")

    def pick(self, values: Sequence[T]) -> T:
        return values[self._random.randrange(len(values))]

    def number(self, low: int, high: int) -> int:
        """low ... high, both included."""
        return self._random.randint(low, high)

    def coin(self) -> bool:
        return bool(self._random.randrange(2))

    def until_own(self, make: Callable[[Draw], T]) -> T:
        """What `make` gives, drawn again until it belongs to this split; a tuple is judged by its first element."""
        while True:
            made = make(self)
            if _part(made[0] if isinstance(made, tuple) and isinstance(made[0], tuple) else made) == self.split:
                return made


def _part(content: object) -> str:
    """The split that a scene or text belongs to: every eighth, by a checksum of its content."""
    return SPLITS[zlib.crc32(repr(content).encode()) % _HELDOUT_SHARE == 0]


def size_name(size: int) -> str:
    return next((name for name, side in SIZES.items() if side >= size), "huge")


def any_look(draw: Draw) -> Look:
    return draw.pick(KINDS), draw.pick(tuple(COLORS))


def place(draw: Draw, looks: Sequence[Look]) -> Scene:
    """Shapes of these looks with random sizes, at random places that do not touch and whose centers are apart."""
    sizes = [draw.pick(tuple(SIZES.values())) for _ in looks]
    while True:
        shapes = [
            Shape(kind, color, size, *(draw.number(0, (SIDE - size) // _GRID) * _GRID for _axis in "xy"))
            for (kind, color), size in zip(looks, sizes, strict=True)
        ]
        if len(shapes) == 1 or _apart(*shapes):
            return tuple(sorted(shapes, key=lambda shape: shape.center2[1]))


def _apart(a: Shape, b: Shape) -> bool:
    gaps = [abs(p - q) for p, q in zip(a.center2, b.center2, strict=True)]
    return min(gaps) >= 2 * _MIN_CENTER_DISTANCE and max(gaps) > a.size + b.size


def any_looks(draw: Draw) -> list[Look]:
    """One or two, all different."""
    looks = [any_look(draw) for _ in range(draw.number(1, 2))]
    return looks if len(set(looks)) == len(looks) else any_looks(draw)


def looks_where(draw: Draw, right: Callable[[list[Look]], bool]) -> list[Look]:
    while not right(looks := any_looks(draw)):
        pass
    return looks


def any_scene(draw: Draw) -> Scene:
    return place(draw, any_looks(draw))


def caption(scene: Scene) -> str:
    """`a red circle`, `a red circle above a blue square`."""
    return " above ".join(f"a {shape.phrase}" for shape in scene)


# Questions. Each maker draws the answer first, uniformly, and then a scene in which it is right.
Question = tuple[Scene, str, str]


def _ask_color(draw: Draw) -> Question:
    kind, color = asked = any_look(draw)
    looks = looks_where(draw, lambda looks: asked in looks and [each for each, _ in looks].count(kind) == 1)
    return place(draw, looks), f"what color is the {kind}?", color


def _ask_kind(draw: Draw) -> Question:
    kind, color = asked = any_look(draw)
    looks = looks_where(draw, lambda looks: asked in looks and [each for _, each in looks].count(color) == 1)
    return place(draw, looks), f"what shape is {color}?", kind


def _ask_count(draw: Draw) -> Question:
    """0, 1 or 2 shapes of a kind or of a color, among one or two."""
    number, by = draw.number(0, 2), draw.pick((0, 1))
    asked = any_look(draw)[by]
    looks = looks_where(draw, lambda looks: [look[by] for look in looks].count(asked) == number)
    return (
        place(draw, looks),
        f"how many {asked}s are there?" if by == 0 else f"how many shapes are {asked}?",
        str(number),
    )


def _ask_size(draw: Draw) -> Question:
    size, kind = draw.pick(tuple(SIZES)), draw.pick(KINDS)
    while True:
        scene = any_scene(draw)
        if [size_name(shape.size) for shape in scene if shape.kind == kind] == [size]:
            return scene, f"is the {kind} small or large?", size


def _ask_exist(draw: Draw) -> Question:
    """Where kind and color are both named and denied, a shape that is there has one of them."""
    kind, color = asked = any_look(draw)
    present, by = draw.coin(), draw.pick((0, 1, 2))
    if by == 2:
        looks = looks_where(
            draw, lambda looks: (asked in looks) == present and any(k == kind or c == color for k, c in looks)
        )
    else:
        looks = looks_where(draw, lambda looks: (asked[by] in [look[by] for look in looks]) == present)
    what = (f"a {kind}", f"a {color} shape", f"a {color} {kind}")[by]
    return place(draw, looks), f"is there {what}?", "yes" if present else "no"


def _ask_side(draw: Draw) -> Question:
    """Which of two shapes lies further to one side."""
    looks = looks_where(draw, lambda looks: len(looks) == 2 and all(a != b for a, b in zip(*looks, strict=True)))
    scene = place(draw, looks)
    axis, last = draw.pick((0, 1)), draw.coin()
    shape = sorted(scene, key=lambda each: each.center2[axis])[-1 if last else 0]
    where = ("on the left", "on the right", "at the top", "at the bottom")[2 * axis + last]
    if draw.coin():
        return scene, f"which shape is {where}?", shape.kind
    return scene, f"which color is {where}?", shape.color


QUESTION_MAKERS: tuple[Callable[[Draw], Question], ...] = (
    _ask_color, _ask_color, _ask_kind, _ask_kind, _ask_count, _ask_count, _ask_size, _ask_exist, _ask_side, _ask_side,
)  # fmt: skip


def _row_type(row: int, questions: int) -> str:
    cycle, place = divmod(row, len(_QUESTION_PLACES))
    if place in _QUESTION_PLACES[:questions]:
        return "qa"
    others = sorted(_QUESTION_PLACES[questions:])
    return ("caption", "visual_grounding")[(cycle * len(others) + others.index(place)) % 2]


def _vision_language_row(draw: Draw, row: int, questions: int) -> tuple[str, ...]:
    kind = _row_type(row, questions)
    if kind == "qa":
        scene, question, answer = draw.until_own(draw.pick(QUESTION_MAKERS))
        return encode_png(paint(scene)), "", question, f"1.0|!+{answer}", "", "scenes", kind
    scene = draw.until_own(any_scene)
    if kind == "caption":
        objects = "&&".join(shape.phrase for shape in scene)
        return encode_png(paint(scene)), caption(scene), "", "", objects, "scenes", kind
    shape = draw.pick(scene)
    return encode_png(paint(scene)), f"the {shape.sized_phrase}", "", shape.box, "", "scenes", kind


def _text_row(draw: Draw, row: int) -> tuple[str, ...]:
    """A sentence that says the same thing twice, so that most of a gap can be told from the rest."""
    return (draw.until_own(_sentence),)


def _sentence(draw: Draw) -> str:
    looks = looks_where(draw, lambda looks: len(looks) == 2)
    a, b = (f"the {color} {kind}" for kind, color in looks)
    word, back = draw.pick((("above", "below"), ("below", "above"), ("left of", "right of"), ("right of", "left of")))
    return f"{a} is {word} {b} and {b} is {back} {a}"


def _image_row(draw: Draw, row: int) -> tuple[str, ...]:
    """One big shape near the middle; the part outside the hole tells its color and mostly its kind."""

    def make(draw: Draw) -> Scene:
        kind, color = any_look(draw)
        size = draw.pick(BIG_SIZES)
        free = (SIDE - size) // BIG_GRID
        x, y = (draw.number(max(free // 2 - 2, 0), min(free // 2 + 2, free)) * BIG_GRID for _axis in "xy")
        return (Shape(kind, color, size, x, y),)

    pixels = paint(draw.until_own(make))
    return encode_png(pixels), " ".join(str(code) for code in codes(pixels))


def _detection_row(draw: Draw, row: int) -> tuple[str, ...]:
    scene = draw.until_own(any_scene)
    names = [f"{color} {kind}" for kind in KINDS for color in COLORS]
    labels = "&&".join(f"{shape.box},{names.index(shape.phrase)},{shape.phrase}" for shape in scene)
    return encode_png(paint(scene)), labels


def _write_negatives(folder: Path, draw: Draw) -> None:
    """Words for statements that are false of a picture, with the frequencies of the true ones."""
    captions = [caption(any_scene(draw)) for _ in range(_NUM_NEGATIVE_CAPTIONS)]
    (folder / "all_captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    objects = [f"{color} {kind}" for kind in KINDS for color in COLORS]
    (folder / "object.txt").write_text("\n".join(objects) + "\n", encoding="utf-8")
    answers = {
        "color": list(COLORS), "shape": list(KINDS), "how many": ["0", "1", "2"], "size": list(SIZES),
        "yes or no": ["yes", "no"], "other": [*COLORS, *KINDS],
    }  # fmt: skip
    (folder / "type2ans.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


@cache
def mask(kind: str, size: int) -> np.ndarray:
    """Pixels of a shape within its bounding box: bool [size, size]."""
    y, x = np.mgrid[:size, :size] * 2 + 1 - size
    if kind == "square":
        return np.ones((size, size), bool)
    if kind == "circle":
        return x * x + y * y <= size * size
    return 2 * abs(x) <= y + size + 1


def paint(scene: Scene) -> np.ndarray:
    """The picture: uint8 [SIDE, SIDE, 3]."""
    pixels = np.full((SIDE, SIDE, 3), GROUND, np.uint8)
    for shape in scene:
        box = pixels[shape.y : shape.y + shape.size, shape.x : shape.x + shape.size]
        box[mask(shape.kind, shape.size)] = COLORS[shape.color]
    return pixels


def codes(pixels: np.ndarray, part: tuple[int, int, int, int] = HOLE) -> list[int]:
    """Image codes of a part of a picture, row by row; one per 8 x 8 pixels.

    Each quarter of a cell is ground or shape by its majority. Code 0 is all ground, else 15 color + pattern.
    """
    y0, x0, y1, x1 = part
    palette = np.array([GROUND, *COLORS.values()], np.uint8)
    label = (pixels[y0:y1, x0:x1, None] == palette).all(-1).argmax(-1)
    half, num = CELL // 2, (y1 - y0) // CELL
    cells = label.reshape(num, 2, half, num, 2, half).transpose(0, 3, 1, 4, 2, 5).reshape(num * num, 4, half * half)
    filled = (cells > 0).mean(-1) >= 0.5
    pattern = filled @ np.array([1, 2, 4, 8])
    color = cells.reshape(num * num, -1).max(-1)
    return np.where(pattern > 0, (color - 1) * 15 + pattern, 0).tolist()


def picture_of_codes(values: Sequence[int]) -> np.ndarray:
    """The square that codes stand for: uint8 [h, w, 3]; a code outside the code book is shown black."""
    num = round(len(values) ** 0.5)
    half = CELL // 2
    pixels = np.zeros((num * CELL, num * CELL, 3), np.uint8)
    for i, code in enumerate(values[: num * num]):
        y, x = i // num * CELL, i % num * CELL
        if not 0 <= code <= 15 * len(COLORS):
            continue
        color, pattern = divmod(code - 1, 15) if code else (0, -1)
        for quarter in range(4):
            filled = code and (pattern + 1) >> quarter & 1
            top, left = y + quarter // 2 * half, x + quarter % 2 * half
            pixels[top : top + half, left : left + half] = list(COLORS.values())[color] if filled else GROUND
    return pixels

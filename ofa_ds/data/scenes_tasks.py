"""Scenes in the form of each downstream task, as the original's TSV files, deterministic from a seed.

What is right is known, so that learning is measured; and no answer is likely before looking: labels are drawn first,
then a scene or sentence in which they are right. Training and held-out rows share no scene, and no fact that is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ofa_ds.data import scenes
from ofa_ds.data.png import encode_png
from ofa_ds.data.scenes import BIG_SIZES, COLORS, KINDS, SIDE, SIZES, Draw, Look, Scene, Shape
from ofa_ds.storage.atomic import new_files

Columns = tuple[str, ...]
Maker = Callable[[Draw, int], Columns]
"""(choices, number of the row) -> the columns of its line."""

BACK = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
"""What holds between two shapes -> what holds the other way round."""

NUMBERS = {"0": "zero", "1": "one", "2": "two"}
SECOND_BEST = 0.3
"""Confidence of a number in the other spelling."""

UNSEEN = ("heavy", "old", "cheap")
"""What no picture shows: of a shape that is there, it may be."""

GOOD, BAD = ("lovely", "great", "nice", "fine"), ("ugly", "poor", "dull", "bad")
PLAIN, TURNING = ("", "very ", "quite "), ("not ", "never ")
"""Before such a word: as good or bad as it was, or the opposite."""

GROUPS = ("circle", "square")
"""Kinds that are a class of their own where three of them are together."""


def write_task_scenes(out: Path, task: str, rows: int, seed: int, split: str = "train") -> Path:
    """`rows` lines of a downstream task in `out`/TASK.tsv, and where it has a list of answers `out`/answers.txt.

    No file is overwritten (`new_files`). Returns the file of rows. Raises ValueError for a wrong split, seed, number or
    task, and where another file is there.
    """
    scenes.check_arguments(rows, seed, split)
    if task not in MAKERS:
        raise ValueError(f"scenes: no scenes for task {task!r}; want one of {', '.join(MAKERS)}")
    with new_files(out, task) as folder:
        with (folder / f"{task}.tsv").open("w", encoding="utf-8", newline="\n") as file:
            for i in range(rows):
                file.write("\t".join(MAKERS[task](Draw(seed, split, task, i), i + 1)) + "\n")
        if task in ANSWERS:
            (folder / "answers.txt").write_text("\n".join(ANSWERS[task]) + "\n", encoding="utf-8")
    return out / f"{task}.tsv"


def _picture(scene: Scene) -> str:
    return encode_png(scenes.paint(scene))


def _caption(draw: Draw, number: int) -> Columns:
    scene = draw.until_own(scenes.any_scene)
    objects = "&&".join(shape.phrase for shape in scene)
    return str(number), str(number), scenes.caption(scene), objects, _picture(scene)


def _vqa(draw: Draw, number: int) -> Columns:
    """The objects column is empty: their names would be the answers."""
    scene, question, answer = draw.until_own(draw.pick(scenes.QUESTION_MAKERS))
    answers = f"1.0|!+{answer}" + (f"&&{SECOND_BEST}|!+{NUMBERS[answer]}" if answer in NUMBERS else "")
    return str(number), str(number), question, answers, "", _picture(scene)


def _refcoco(draw: Draw, number: int, phrase: Callable[[Shape, Scene], str]) -> Columns:
    scene = draw.until_own(scenes.any_scene)
    shape = draw.pick(scene)
    return str(number), str(number), phrase(shape, scene), shape.box, _picture(scene)


def _related(shape: Shape, scene: Scene) -> str:
    """`the red circle that is above the blue square`."""
    others = [other for other in scene if other is not shape]
    if not others:
        return f"the {shape.phrase} that is alone"
    where = "above" if shape is scene[0] else "below"
    return f"the {shape.phrase} that is {where} the {others[0].phrase}"


def _snli_ve(draw: Draw, number: int) -> Columns:
    """Half of the answers are no, whatever the sentence says: `there is a ...`, else yes; `... is heavy`, else maybe.

    The premise says how many shapes there are, which is true and does not help.
    """
    label = draw.pick(("entailment", "neutral", "contradiction", "contradiction"))
    unseen = label == "neutral" or (label == "contradiction" and draw.coin())

    def make(draw: Draw) -> tuple[Scene, Look]:
        asked = kind, color = scenes.any_look(draw)
        there = label != "contradiction"
        looks = scenes.looks_where(
            draw, lambda looks: (asked in looks) == there and any(k == kind or c == color for k, c in looks)
        )
        return scenes.place(draw, looks), asked

    scene, asked = draw.until_own(make)
    hypothesis = f"the {_phrase(asked)} is {draw.pick(UNSEEN)}" if unseen else f"there is a {_phrase(asked)}"
    premise = "there is one shape" if len(scene) == 1 else "there are two shapes"
    return str(number), str(number), _picture(scene), hypothesis, premise, label


def _imagenet(draw: Draw, number: int) -> Columns:
    """One big shape, or three together; classes are equally frequent."""
    label = draw.number(1, len(CLASSES))

    def one(draw: Draw) -> Scene:
        kind, color = LOOKS[label - 1]
        size = draw.pick(BIG_SIZES)
        x, y = (draw.number(0, (SIDE - size) // scenes.BIG_GRID) * scenes.BIG_GRID for _axis in "xy")
        return (Shape(kind, color, size, x, y),)

    def three(draw: Draw) -> Scene:
        corners = [(x, y) for x in (0, SIDE // 2) for y in (0, SIDE // 2)]
        corners.remove(draw.pick(corners))
        return tuple(
            Shape(GROUPS[label - len(LOOKS) - 1], draw.pick(tuple(COLORS)), draw.pick(tuple(SIZES.values())), *corner)
            for corner in corners
        )

    return _picture(draw.until_own(one if label <= len(LOOKS) else three)), str(label), CLASSES[label - 1]


LOOKS = tuple((kind, color) for kind in KINDS for color in COLORS)
CLASSES = (
    *(f"{color} {kind}, {color} shape" for kind, color in LOOKS),
    *(f"{kind}s, group of {kind}s" for kind in GROUPS),
)
"""Of the ImageNet form, as synsets are worded."""

# Text alone. A fact is (a, what holds between them, b); its sentence belongs to training or to the held-out part.
Fact = tuple[Look, str, Look]


def _phrase(look: Look) -> str:
    kind, color = look
    return f"{color} {kind}"


def _any_fact(draw: Draw) -> Fact:
    a, b = scenes.looks_where(draw, lambda looks: len(looks) == 2)
    return a, draw.pick(tuple(BACK)), b


def _own_fact(draw: Draw) -> Fact:
    """Facts that say the same belong to the same part."""

    def make(draw: Draw) -> tuple[tuple, Fact]:
        fact = _any_fact(draw)
        return min(fact, _turned(fact)), fact

    return draw.until_own(make)[1]


def _turned(fact: Fact) -> Fact:
    """The same, said from the other side."""
    a, where, b = fact
    return b, BACK[where], a


def _denied(fact: Fact) -> Fact:
    a, where, b = fact
    return a, BACK[where], b


def _other_axis(draw: Draw, fact: Fact) -> Fact:
    a, where, b = fact
    return a, draw.pick(tuple(other for other in BACK if other not in (where, BACK[where]))), b


def _other_color(draw: Draw, fact: Fact) -> Fact:
    (kind, color), where, b = fact
    return (kind, draw.pick(tuple(each for each in COLORS if each not in (color, b[1])))), where, b


def _says(fact: Fact) -> str:
    a, where, b = fact
    return f"the {_phrase(a)} is {where} the {_phrase(b)}"


def _cola(draw: Draw, number: int) -> Columns:
    """What is wrong is the order of two words, a word said twice, or the verb's number."""
    right = draw.coin()
    fact = _own_fact(draw)
    (kind, color), where, b = fact
    a = f"{color} {kind}"
    wrong = draw.pick((
        f"the {kind} {color} is {where} the {_phrase(b)}", f"the {a} are {where} the {_phrase(b)}",
        f"the {a} {where} is the {_phrase(b)}", f"the the {a} is {where} {_phrase(b)}",
    ))  # fmt: skip
    return str(number), _says(fact) if right else wrong, str(int(right))


def _entailment(draw: Draw) -> tuple[str, str, str]:
    """(premise, hypothesis, yes | no | maybe)."""
    fact, label = _own_fact(draw), draw.pick(("yes", "no", "maybe"))
    other = {"yes": fact, "no": _denied(fact), "maybe": _other_axis(draw, fact)}[label]
    return _says(fact), _says(_turned(other) if label == "yes" or draw.coin() else other), label


def _mnli(draw: Draw, number: int) -> Columns:
    premise, hypothesis, label = _entailment(draw)
    return premise, hypothesis, {"maybe": "0", "yes": "1", "no": "2"}[label]


def _rte(draw: Draw, number: int) -> Columns:
    fact, entailed = _own_fact(draw), draw.coin()
    other = fact if entailed else draw.pick((_denied(fact), _other_axis(draw, fact)))
    return str(number), _says(fact), _says(_turned(other)), "entailment" if entailed else "not_entailment"


def _mrpc(draw: Draw, number: int) -> Columns:
    fact, same = _own_fact(draw), draw.coin()
    other = fact if same else draw.pick((_denied(fact), _other_color(draw, fact)))
    return _says(fact), _says(_turned(other)), str(int(same))


def _qnli(draw: Draw, number: int) -> Columns:
    """Is the shape that is asked for one of the two that the sentence tells of?"""
    fact, told = _own_fact(draw), draw.coin()
    asked = draw.pick((fact[0], fact[2]))
    if not told:
        asked = scenes.looks_where(draw, lambda looks: looks[0] not in fact)[0]
    label = "entailment" if told else "not_entailment"
    return str(number), f"where is the {_phrase(asked)}?", _says(fact), label


def _qqp(draw: Draw, number: int) -> Columns:
    """Two questions that ask the same; else the second asks for the opposite, or for a shape of another color."""
    fact, same = _own_fact(draw), draw.coin()
    other = fact if same else draw.pick((_denied(fact), _other_color(draw, fact)))
    (a, where, b), (c, back, d) = fact, _turned(other)
    first = f"is the {_phrase(a)} {where} the {_phrase(b)}?"
    second = f"can you see the {_phrase(c)} {back} the {_phrase(d)}?"
    return str(number), str(2 * number - 1), str(2 * number), first, second, str(int(same))


def _sst2(draw: Draw, number: int) -> Columns:
    """A good or a bad word, which `not` and `never` turn round."""
    positive, turning, (a, where, b) = draw.coin(), draw.coin(), _own_fact(draw)
    word = draw.pick(GOOD if positive != turning else BAD)
    how = draw.pick(TURNING if turning else PLAIN)
    return f"the {_phrase(a)} {where} the {_phrase(b)} is {how}{word}", str(int(positive))


def _gigaword(draw: Draw, number: int) -> Columns:
    """What the article begins with is its headline; one or two other facts follow."""
    fact = _own_fact(draw)
    others = [_any_fact(draw) for _ in range(draw.number(1, 2))]
    a, where, b = fact
    article = " . ".join((f"{_says(fact)} and {_says(_turned(fact))}", *map(_says, others)))
    return f"{article} .", f"{_phrase(a)} {where} {_phrase(b)}"


def _text_to_image(draw: Draw, number: int) -> Columns:
    """`a red circle`, or `a red circle left of a blue square`, then a picture of it; places and sizes are free."""
    if draw.number(0, 3) == 0:
        alone = draw.until_own(scenes.any_look)
        caption, scene = f"a {_phrase(alone)}", scenes.place(draw, [alone])
    else:
        a, where, b = fact = _own_fact(draw)
        caption, scene = f"a {_phrase(a)} {where} a {_phrase(b)}", scenes.place(draw, (a, b))
        while not _shows(scene, fact):
            scene = scenes.place(draw, (a, b))
    codes = scenes.codes(scenes.paint(scene), scenes.WHOLE)
    return str(number), " ".join(map(str, codes)), caption


def _shows(scene: Scene, fact: Fact) -> bool:
    """What the fact says of two shapes holds, and more so than what could be said along the other axis."""
    look, where, _ = fact
    a, b = scene if (scene[0].kind, scene[0].color) == look else scene[::-1]
    axis = int(where in ("above", "below"))
    gaps = [there - here for here, there in zip(a.center2, b.center2, strict=True)]
    return abs(gaps[axis]) > abs(gaps[1 - axis]) and (gaps[axis] > 0) == (where in ("left of", "above"))


MAKERS: dict[str, Maker] = {
    "caption": _caption, "vqa": _vqa, "caption_scst": _caption,
    "refcoco": partial(_refcoco, phrase=lambda shape, scene: f"the {shape.sized_phrase}"),
    "refcocoplus": partial(_refcoco, phrase=lambda shape, scene: f"the {shape.phrase}"),
    "refcocog": partial(_refcoco, phrase=_related), "snli_ve": _snli_ve, "cola": _cola, "mnli": _mnli, "mrpc": _mrpc,
    "qnli": _qnli, "qqp": _qqp, "rte": _rte, "sst2": _sst2, "imagenet": _imagenet, "gigaword": _gigaword,
    "text_to_image": _text_to_image,
}  # fmt: skip
"""Of each downstream task; columns as `Task.columns` has them."""

ANSWERS: dict[str, tuple[str, ...]] = {
    "vqa": (*COLORS, *KINDS, *NUMBERS, *NUMBERS.values(), *SIZES, "yes", "no"),
    "imagenet": CLASSES,
}
"""The lists of answers, of the tasks that have one."""

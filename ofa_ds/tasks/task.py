"""What a task is, and the table of all of them: every part of the program that deals with tasks reads it.

A new task is a name with its loss group in `ofa_ds.terms`, a file of functions here, and an entry in `TABLE`.

From a row to examples is a pure function of (row, generator, context): augmentation, negatives, masking and patch
sampling all draw from one generator seeded per row, in the order of the table. The original's faults that docs/ofa.md,
Tasks names are mended, each in a test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from ofa_ds.config import DataConfig
from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed
from ofa_ds.tasks import caption, detection, grounding, image_infilling, judges, matching, text_infilling, vqa
from ofa_ds.tasks.context import Context, Row, row_generator, view
from ofa_ds.terms import GROUP_OF

Build = Callable[[Row, Framed | None, np.random.Generator, Context], Example]
BuildHeldOut = Callable[[Row, Framed | None, np.random.Generator, Context], list[Example]]
Ask = Callable[[Context, np.ndarray | None, str], Example]
Judge = Callable[[Context, Sequence[Example], judges.Answers], judges.Scores]

SHORT_ANSWER_TOKENS = 64
HELD_OUT_SEED = 0
"""Of what is drawn for held-out rows, such as false statements and masks: every model is asked the same."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """From a row to an example, from an example to a question, from an answer to a score and a picture."""

    name: str
    """One of terms.TASKS."""
    family: str
    """Of the rows that give it: one of terms.FAMILIES."""
    row_types: tuple[str, ...] = ()
    """Of these types; all rows of the family where empty."""
    build: Build
    """(row, its picture where the family has one view for all tasks, generator, context) -> the training example."""
    held_out: BuildHeldOut | None = None
    """The examples of a held-out row, where not the one that `build` makes; a generator of its own draws for it."""
    texts: Callable[[Row], list[str]]
    """Every text of a row as the task presents it: what a vocabulary is trained on."""

    ask: Ask
    """(context, picture uint8 [h, w, 3] of any size, --text) -> the example without its answer, worded as in training.

    Raises ValueError for a text that cannot be asked.
    """
    needs_picture: bool = True
    text_is: str = ""
    """What --text holds, where the task needs it."""
    answer_tokens: Callable[[Context], int] = lambda ctx: SHORT_ANSWER_TOKENS
    """Where an answer to a user is cut off."""

    judge: Judge | None = None
    """Scores of generated answers; without it the task has its token accuracy."""
    constant: Callable[[Sequence[Example]], judges.Scores] = lambda asked: {}
    """Scores of the constant answer that is best in hindsight, under the names that `judge` gives."""
    kind: Callable[[Example], str] | None = None
    """The kind of question, where the exact match of each is told apart."""
    shows: Literal["text", "boxes", "region"] = "text"
    """Whether boxes that a picture shows are the answer, or the region that is the question."""

    @property
    def group(self) -> str:
        """Whose token count divides the loss: one of terms.GROUPS."""
        return GROUP_OF[self.name]

    def is_made_of(self, family: str, row_type: str) -> bool:
        return self.family == family and (not self.row_types or row_type in self.row_types)


TABLE: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="caption", family="vision_language", row_types=("caption",), build=caption.build, texts=caption.texts,
            ask=caption.ask, judge=judges.judge_text, constant=judges.constant_text,
        ),
        Task(
            name="vqa", family="vision_language", row_types=("qa",), build=vqa.build, texts=vqa.texts,
            ask=vqa.ask, text_is="the question",
            judge=vqa.judge, constant=vqa.constant, kind=vqa.question_type,
        ),
        Task(
            name="itm", family="vision_language", row_types=("caption", "qa"), build=matching.build,
            held_out=matching.held_out, texts=matching.texts, ask=matching.ask, text_is="the caption to check",
            judge=matching.judge, constant=matching.constant,
        ),
        Task(
            name="visual_grounding", family="vision_language", row_types=("visual_grounding",),
            build=grounding.build_box, texts=grounding.texts_box, ask=grounding.ask_box, text_is="the phrase to find",
            judge=grounding.judge_box, constant=grounding.constant_box, shows="boxes",
        ),
        Task(
            name="grounded_caption", family="vision_language", row_types=("visual_grounding",),
            build=grounding.build_phrase, texts=grounding.texts_phrase, ask=grounding.ask_phrase,
            text_is="the region as x0,y0,x1,y1 in pixels",
            judge=judges.judge_text, constant=judges.constant_text, shows="region",
        ),
        Task(
            name="detection", family="detection", build=detection.build, texts=detection.texts, ask=detection.ask,
            answer_tokens=lambda ctx: 256, judge=detection.judge, shows="boxes",
        ),
        Task(
            name="image_infilling", family="image", build=image_infilling.build, texts=image_infilling.texts,
            ask=image_infilling.ask, answer_tokens=lambda ctx: ctx.num_codes,
            constant=image_infilling.constant,
        ),
        Task(
            name="text_infilling", family="text", build=text_infilling.build, texts=text_infilling.texts,
            ask=text_infilling.ask, needs_picture=False, text_is="the text, <mask> for what is missing",
            answer_tokens=lambda ctx: ctx.config.max_text_tokens,
        ),
    )
}  # fmt: skip
"""In the order of terms.TASKS, which is that of the draws and of what a row gives."""

SHARED_VIEW = {"vision_language": view}
"""Families whose tasks all see the same picture, drawn once for a row."""


def examples(family: str, row: Row, rng: np.random.Generator, ctx: Context) -> list[Example]:
    """The training examples of one row, one per task; of a held-out row those that are asked as in training.

    Raises ValueError: undecodable image, or one whose size or codes do not fit the configuration.
    """
    tasks = _tasks_of(family, row.get("type", ""))
    seen = _view(family, row, rng, ctx)
    return [_named(task, task.build(row, seen, rng, ctx)) for task in tasks if ctx.train or task.held_out is None]


def held_out_examples(names: Collection[str], row: Row, index: int, ctx: Context) -> list[Example]:
    """The examples of these tasks that held-out row number `index` of their family gives, drawn alike every time."""
    found: list[Example] = []
    seen: Framed | None = None
    for task in (TABLE[name] for name in names):
        if not task.is_made_of(task.family, row.get("type", "")):
            continue
        rng = row_generator(HELD_OUT_SEED, task.family, int(task.held_out is not None), index)
        seen = seen or _view(task.family, row, rng, ctx)
        built = task.held_out(row, seen, rng, ctx) if task.held_out else [task.build(row, seen, rng, ctx)]
        found += [_named(task, example) for example in built]
    return found


@cache
def _tasks_of(family: str, row_type: str) -> tuple[Task, ...]:
    tasks = tuple(task for task in TABLE.values() if task.is_made_of(family, row_type))
    if not tasks:
        raise ValueError(f"no task is made of {family} rows of type {row_type!r}")
    return tasks


def _view(family: str, row: Row, rng: np.random.Generator, ctx: Context) -> Framed | None:
    return SHARED_VIEW[family](row, rng, ctx) if family in SHARED_VIEW else None


def _named(task: Task, example: Example) -> Example:
    return dataclasses.replace(example, task=task.name)


def row_texts(family: str, row: Row) -> list[str]:
    """Every text of a row as its tasks present it: cleaned, with its leading space, inside its instruction."""
    return [text for task in _tasks_of(family, row.get("type", "")) for text in task.texts(row)]


def asked_for(config: DataConfig) -> tuple[str, ...]:
    """The tasks that a recipe trains: those of the families that its mix draws from."""
    weights = config.mix.weights()
    return tuple(name for name, task in TABLE.items() if weights[task.family] > 0)


def ask(ctx: Context, name: str, picture: np.ndarray | None, text: str) -> Example:
    """The example of a task without its answer, worded as in training. picture: uint8 [h, w, 3] of any size.

    Raises ValueError where the text is missing, is too long for the model or, for a region, is not a box inside the
    picture.
    """
    task = TABLE[name]
    if task.text_is and not text.strip():
        raise ValueError(f"{name} needs --text: {task.text_is}")
    example = task.ask(ctx, picture, text)
    if example.cut:
        raise ValueError(
            f"--text: with the instruction of {name} it is longer than the {ctx.max_positions} positions of the model "
            f"(it begins {text.strip()[:40]!r}); shorten it"
        )
    return _named(task, example)

"""What a task is, and the table of all of them: every part of the program that deals with tasks reads it.

A new task is a name with its loss group in `ofa_ds.terms`, a file of functions here, and an entry in `TABLE`; a
downstream task is a name there, a file in `downstream` that holds its value too, and an entry in `DOWNSTREAM`.

From a row to examples is a pure function of (row, generator, context): augmentation, negatives, masking and patch
sampling all draw from one generator seeded per row, in the order of the table. The original's faults that docs/ofa.md,
Tasks names are mended, each in a test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ofa_ds.config import DataConfig, TaskOptions
from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.data.negative_files import Negatives
from ofa_ds.tasks import caption, detection, grounding, image_infilling, judges, matching, text_infilling, vqa
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.tasks.context import Context, PaintCodes, Row, row_generator, view
from ofa_ds.tasks.downstream import caption as captioning
from ofa_ds.tasks.downstream import gigaword, glue, imagenet, refcoco, snli_ve, text_to_image
from ofa_ds.tasks.downstream import vqa as answering
from ofa_ds.tasks.kind import Task

if TYPE_CHECKING:
    from ofa_ds.data.shards import Shards
    from ofa_ds.data.vocab import Vocab

NO_NEGATIVES = Negatives([], [], {"other": []})
DOWNSTREAM_FAMILY = "downstream"
HELD_OUT_SEED = 0
"""Of what is drawn for held-out rows, such as false statements and masks: every model is asked the same."""

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
"""Pretraining, in the order of terms.PRETRAINING_TASKS, which is that of the draws and of what a row gives."""

DOWNSTREAM: dict[str, Task] = {
    task.name: task
    for task in (
        captioning.CAPTION, answering.VQA, captioning.CAPTION_SCST, refcoco.REFCOCO, refcoco.REFCOCOPLUS,
        refcoco.REFCOCOG, snli_ve.SNLI_VE, *glue.TASKS, imagenet.IMAGENET, gigaword.GIGAWORD,
        text_to_image.TEXT_TO_IMAGE,
    )
}  # fmt: skip
"""In the order of terms.DOWNSTREAM_TASKS; each value stands in the file of its functions."""

SHARED_VIEW = {"vision_language": view}
"""Families whose tasks all see the same picture, drawn once for a row."""


def examples(family: str, row: Row, rng: np.random.Generator, ctx: Context) -> list[Example]:
    """The training examples of one row, one per task; of a held-out row those that are asked as in training.

    Raises ValueError: undecodable image, or one whose size or codes do not fit the configuration.
    """
    if family == DOWNSTREAM_FAMILY:
        task = DOWNSTREAM[ctx.config.task.name]
        return [_named(task, task.build(row, None, rng, ctx))]
    tasks = _tasks_of(family, row.get("type", ""))
    seen = _view(family, row, rng, ctx)
    return [_named(task, task.build(row, seen, rng, ctx)) for task in tasks if ctx.train or task.held_out is None]


def held_out_examples(names: Collection[str], family: str, row: Row, index: int, ctx: Context) -> list[Example]:
    """The examples of these tasks that held-out row number `index` of a family gives, drawn alike every time."""
    found: list[Example] = []
    seen: Framed | None = None
    table = table_of((family,))
    for task in (table[name] for name in names):
        if not task.is_made_of(family, row.get("type", "")):
            continue
        rng = row_generator(HELD_OUT_SEED, task.family, int(task.held_out is not None), index)
        seen = seen or _view(task.family, row, rng, ctx)
        built = task.held_out(row, seen, rng, ctx) if task.held_out else [task.build(row, seen, rng, ctx)]
        found += [_named(task, example) for example in built]
    return found


def table_of(families: Collection[str]) -> Mapping[str, Task]:
    """The tasks that shards with these families have rows for: downstream ones, or those of pretraining."""
    return DOWNSTREAM if DOWNSTREAM_FAMILY in families else TABLE


def task_of(config: DataConfig, name: str) -> Task:
    """What a user of a model means by a task: what it was fine-tuned on, else what it was pretrained on, else asked
    without having been trained on it."""
    table = DOWNSTREAM if config.task.name == name or name not in TABLE else TABLE
    return table[name]


def data_config_of(name: str, **options: Any) -> DataConfig:
    """The [data] of a downstream task where no recipe says otherwise: `Task.settings` over the defaults.

    options: fields of DataConfig and, in `task`, of TaskOptions that differ from these.
    """
    of_task: dict[str, Any] = {"name": name}
    of_data: dict[str, Any] = {}
    for key, value in DOWNSTREAM[name].settings.items():
        section, _, field = key.rpartition(".")
        (of_task if section == "task" else of_data)[field] = value
    of_task.update(options.pop("task", {}))
    return DataConfig(**of_data | options, task=TaskOptions(**of_task))


def sides_of(config: DataConfig) -> tuple[int, ...]:
    """In pixels, of the pictures that a training batch has; none where the task is fine-tuned on texts alone."""
    if not config.task.name:
        return (config.image_size, config.infill_image_size)
    return (config.image_size,) if DOWNSTREAM[config.task.name].needs_picture else ()


def context_of(
    shards: Shards | None, vocab: Vocab, config: DataConfig, *, patch_size: int, max_positions: int,
    split: Literal["train", "heldout"] = "train", readable: bool = True, paint: PaintCodes | None = None,
) -> Context:  # fmt: skip
    """What every row of these shards needs besides itself; without shards, what a question of a user needs."""
    return Context(
        vocab=vocab, negatives=NO_NEGATIVES if shards is None else shards.negatives, config=config,
        patch_size=patch_size, max_positions=max_positions, split=split, readable=readable,
        paint=paint, candidates=candidates_of(config.task.name, () if shards is None else shards.answers, vocab),
    )  # fmt: skip


def candidates_of(name: str, answer_list: Sequence[str], vocab: Vocab) -> Candidates | None:
    """The possible answers of a downstream task; None where they are no list. answer_list: `Shards.answers`."""
    task = DOWNSTREAM.get(name)
    if task is None or task.candidates == "none":
        return None
    answers = tuple(dict.fromkeys(task.labels.values())) if task.candidates == "labels" else tuple(answer_list)
    if not answers:
        return None
    ids = tuple(tuple(vocab.encode(f" {answer}")) for answer in answers)
    return Candidates(answers=answers, ids=ids, ends=task.ends)


def examples_of(shards: Shards, names: Collection[str], family: str, index: int, ctx: Context) -> list[Example]:
    """`held_out_examples` of row number `index` of these shards.

    Raises ValueError or RuntimeError that names the row, where it does not fit the settings or is damaged.
    """
    row = None
    try:
        row = shards.row(family, index)
        return held_out_examples(names, family, row, index, ctx)
    except Exception as error:
        raise shards.at_row(family, index, row, error) from error


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
    if family == DOWNSTREAM_FAMILY:
        return next(task.texts(row) for task in DOWNSTREAM.values() if row["type"] in task.row_types)
    return [text for task in _tasks_of(family, row.get("type", "")) for text in task.texts(row)]


def asked_for(config: DataConfig) -> tuple[str, ...]:
    """The tasks that a recipe trains: those of the families that its mix draws from."""
    if config.task.name:
        return (config.task.name,)
    families = config.ever_drawn()
    return tuple(name for name, task in TABLE.items() if task.family in families)


def ask(ctx: Context, name: str, picture: Picture | None, text: str) -> Example:
    """The example of a task without its answer, worded as in training. picture: uint8 [h, w, 3] of any size.

    Raises ValueError where the text is missing, is too long for the model or, for a region, is not a box inside the
    picture.
    """
    task = task_of(ctx.config, name)
    if task.text_is and not text.strip():
        raise ValueError(f"{name} needs --text: {task.text_is}")
    example = task.ask(ctx, picture, text)
    if example.cut:
        raise ValueError(
            f"--text: with the instruction of {name} it is longer than the {ctx.max_positions} positions of the model "
            f"(it begins {text.strip()[:40]!r}); shorten it"
        )
    return _named(task, example)

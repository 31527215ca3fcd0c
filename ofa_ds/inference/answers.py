"""What a model answers, as text and as pictures: boxes in pixels, codes as colours, one card per task."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ofa_ds.data.answer_list import read_answers_file
from ofa_ds.data.example import Example
from ofa_ds.data.image import Picture, load
from ofa_ds.data.shards import Shards
from ofa_ds.inference.asking import AS_THE_TASK_SAYS, How, answers_to, asked_as, check_list, with_settings
from ofa_ds.inference.loaded_model import LoadedModel, generated, load_model
from ofa_ds.inference.painting import that_paints
from ofa_ds.storage.atomic import new_content
from ofa_ds.tasks import instruction, preview
from ofa_ds.tasks.boxes import expected_objects, objects_of
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.kind import SHORT_ANSWER_TOKENS, Task
from ofa_ds.tasks.task import DOWNSTREAM, DOWNSTREAM_FAMILY, ask, asked_for, candidates_of, table_of, task_of
from ofa_ds.terms import TASKS

EXPECTED, GENERATED = (60, 180, 75), (230, 25, 75)
"""Colours of the boxes: green and red."""

PRETRAINED_BEAMS = 5
"""Of an answer to a user, where neither a downstream task nor the user says how many."""

_CODES_GAP = 8
"""Pixels between expected and generated codes."""
_NO_BOXES = np.empty((0, 4), np.float32)


def sample_sheet(
    model: LoadedModel, shards: Shards, *, tasks: Sequence[str] | None = None, row: int = 0, rows: int = 1,
    how: How = AS_THE_TASK_SAYS,
) -> Image.Image:  # fmt: skip
    """The cards of `sample_cards` on one sheet, of `rows` rows from `row` on. Raises ValueError where there is none."""
    every = [sample_cards(model, shards, tasks=tasks, row=each, how=how) for each in range(row, row + rows)]
    cards = [card for cards in every for card in cards.values()]
    if not cards:
        raise ValueError(f"{shards.path}: has no row for {', '.join(tasks or asked_for(model.recipe.data))}")
    return preview.draw_sheet(cards)


def sample_cards(
    model: LoadedModel, shards: Shards, *, tasks: Sequence[str] | None = None, row: int = 0,
    how: How = AS_THE_TASK_SAYS, max_rows: int | None = None,
) -> dict[str, Image.Image]:  # fmt: skip
    """A card per task that the shards have: picture, boxes, source, expected and generated text.

    tasks: those that the recipe trains, where not given. max_rows: look for a row among that many of a family only.
    """
    cards, table = {}, table_of(shards.families)
    for name in tasks or asked_for(model.recipe.data):
        asked = asked_as(model, name, how) if table is DOWNSTREAM else with_settings(model, how.settings)
        ctx = asked.context(shards)
        try:
            example = preview.find_example(shards, name, row, ctx, max_rows=max_rows)
        except LookupError:
            continue
        cards[name] = draw_answer(ctx, example, answers_to(asked, ctx, table[name], [example], how)[0])
    return cards


def draw_answer(ctx: Context, example: Example, ids: Sequence[int], *, expected: bool = True) -> Image.Image:
    """One card: expected boxes green, generated ones red; image codes of both, the expected above.

    Where something paints them (`Context.paint`) they are pictures, as `preview.views_of` has them.
    """
    given = objects_of(ctx, ids)
    known = expected or _shows(ctx, example.task) == "region"  # which is part of the question
    boxes = [(box, EXPECTED, name) for box, name in expected_objects(example)] if known else []
    boxes += [(box, GENERATED, name) for box, name in given]
    texts = [("source", example.source_text)]
    if expected:
        texts.append(("expected (green)" if len(example.boxes) else "expected", example.target_text))
    texts.append(("generated (red)" if given else "generated", readable(ctx, ids)))
    target = example.target if expected else np.array([*ids, ctx.vocab.eos])
    views: list[np.ndarray] = []
    shown = dataclasses.replace(example, boxes=_NO_BOXES, labels=(), target=target)
    try:
        views = preview.views_of(ctx, shown, ids if expected else ())
    except ValueError as error:  # an answer need not be a run of codes
        texts.append(("not painted", str(error)))
    card = preview.draw_card(shown, texts, ctx, views)
    if example.image is not None:
        scale = preview.PICTURE_PIXELS / example.image.shape[1]
        _draw_boxes(card, [(np.array(box) * scale + preview.MARGIN_PIXELS, *rest) for box, *rest in boxes])
    if example.code and expected and ids and not views:
        codes = preview.draw_codes(ids)
        left = 2 * preview.MARGIN_PIXELS + preview.PICTURE_PIXELS
        top = preview.MARGIN_PIXELS + preview.PICTURE_PIXELS - codes.height + _CODES_GAP
        card.paste(codes.crop((0, 0, codes.width, codes.height - _CODES_GAP)), (left, top))
    return card


def _shows(ctx: Context, name: str) -> str:
    """What the boxes of a task's pictures are; an instruction has them in the question."""
    return "region" if name == instruction.NAME else task_of(ctx.config, name).shows


def _draw_boxes(card: Image.Image, boxes: Sequence[tuple[np.ndarray, tuple[int, int, int], str]]) -> None:
    """Later ones are drawn a little further in, so that equal boxes are both seen."""
    pen, font = ImageDraw.Draw(card), ImageFont.load_default(preview.FONT_PIXELS - 3)
    for box, colour, name in boxes:
        inset = 0 if colour == EXPECTED else 4
        x0, y0, x1, y1 = (float(value) for value in box + np.array([inset, inset, -inset, -inset]))
        pen.rectangle([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], outline=colour, width=3)
        if name:
            place = (x0 + 4, y0 + 2 if colour == EXPECTED else y1 - preview.FONT_PIXELS - 4)
            pen.rectangle(pen.textbbox(place, name, font=font), fill="white")
            pen.text(place, name, fill=colour, font=font)


def readable(ctx: Context, ids: Sequence[int]) -> str:
    """Text, with codes and bins as their symbols."""
    return ctx.vocab.decode(ids).strip()


def generate_one(
    checkpoint: str | Path, task: str, *, image: str | Path | None = None, text: str = "",
    how: How = AS_THE_TASK_SAYS, answers: Path | None = None, png: str | Path | None = None, average: bool = False,
    vocab: Path | None = None, codes_model: Path | None = None,
) -> str:  # fmt: skip
    """The model's answer to one task. Boxes, one a line, are told in pixels of the picture that was given.

    task: one of terms.TASKS, or `instruction` for a text as it stands. text: what `Task.text_is` says, such as the
    question. how: without a number of beams a pretraining task and an instruction have PRETRAINED_BEAMS. answers: a
    file of the answers that may be given. average: ask the moving average of the weights. codes_model: the VQGAN that
    paints image codes in `png`.
    Raises ValueError: a picture or text that the task needs is missing, malformed, or too long for the model.
    """
    model = that_paints(load_model(checkpoint, average=average, vocab=vocab, precision=how.precision), codes_model)
    print(model.describe(), file=sys.stderr)
    if task == instruction.NAME:
        if answers is not None:
            raise ValueError(f"--answers: {instruction.NAME} takes no list of answers")
        return _instructed(with_settings(model, how.settings), image, text, how, png)
    what = task_of(model.recipe.data, task)
    is_downstream = what.family == DOWNSTREAM_FAMILY
    trained, model = model, asked_as(model, task, how) if is_downstream else with_settings(model, how.settings)
    ctx = model.context()
    if answers is not None:
        ctx = dataclasses.replace(ctx, candidates=_listed(ctx, what, answers))
    check_list(trained, ctx, what, how, "give one with --answers FILE")
    with _naming(image):
        picture = _read_picture(ctx, task, image) if what.needs_picture else None
        example = ask(ctx, task, picture, text)
    if how.beams is None and not is_downstream:
        how = dataclasses.replace(how, beams=PRETRAINED_BEAMS)
    ids = answers_to(model, ctx, what, [example], how, max_tokens=what.answer_tokens(ctx))[0]
    if png is not None:
        with new_content(png) as partial:
            draw_answer(ctx, example, ids, expected=False).save(partial)
    return _told(ctx, example, ids, picture if what.shows == "boxes" else None)


def _instructed(
    model: LoadedModel, image: str | Path | None, text: str, how: How, png: str | Path | None
) -> str:  # fmt: skip
    if how.search in ("all", "beam"):
        raise ValueError(f"--decoding {how.search}: an instruction has no list of answers")
    ctx = model.context()
    with _naming(image):
        picture = None if image is None else _read_picture(ctx, instruction.NAME, image)
        example = instruction.ask(ctx, picture, text)
    packed = dataclasses.replace(example, task=TASKS[0])  # a batch counts its examples by task
    ids = generated(model, [packed], beam=how.beams or PRETRAINED_BEAMS, max_tokens=SHORT_ANSWER_TOKENS)[0]
    if png is not None:
        with new_content(png) as partial:
            draw_answer(ctx, dataclasses.replace(example, task=instruction.NAME), ids, expected=False).save(partial)
    return _told(ctx, example, ids, picture)


def _told(ctx: Context, example: Example, ids: Sequence[int], picture: Picture | None) -> str:
    """The answer as text; its boxes, where there are some, in pixels of the picture."""
    found = [] if picture is None else objects_of(ctx, ids)
    if not found:
        return readable(ctx, ids)
    scale = np.array(picture.shape[1::-1] * 2) / np.array(example.image.shape[1::-1] * 2)
    return "\n".join(f"{','.join(f'{v:.0f}' for v in np.array(box) * scale)} {name}".strip() for box, name in found)


def _listed(ctx: Context, task: Task, answers: Path) -> Candidates | None:
    if task.candidates != "file":
        raise ValueError(f"--answers: {task.name} takes no list of answers")
    return candidates_of(task.name, read_answers_file(answers), ctx.vocab)


def _read_picture(ctx: Context, task: str, image: str | Path | None) -> Picture:
    if image is None:
        raise ValueError(f"{task} is about a picture: give --image FILE")
    try:
        return load(Path(image).read_bytes(), ctx.config.decode)
    except OSError as error:
        raise ValueError(f"--image {image}: {error}") from error


@contextmanager
def _naming(image: str | Path | None) -> Iterator[None]:
    """What is wrong with a picture is told with its name, also where it is decoded when a task resizes it."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("image: "):
            raise
        raise ValueError(f"--image {image}: {error}") from error

"""What a model answers, as text and as pictures: boxes in pixels, codes as colours, one card per task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ofa_ds.data.example import Example
from ofa_ds.data.image import decode
from ofa_ds.data.shards import Negatives, Shards
from ofa_ds.inference.loaded_model import LoadedModel, generated, load_model
from ofa_ds.tasks import preview
from ofa_ds.tasks.boxes import expected_objects, objects_of
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.task import TABLE, ask, asked_for

EXPECTED, GENERATED = (60, 180, 75), (230, 25, 75)
"""Colours of the boxes: green and red."""

_CODES_GAP = 8
"""Pixels between expected and generated codes."""
_NO_BOXES = np.empty((0, 4), np.float32)


def sample_sheet(
    model: LoadedModel, shards: Shards, *, tasks: Sequence[str] | None = None, row: int = 0, beam: int = 1
) -> Image.Image:
    """The cards of `sample_cards` on one sheet. Raises ValueError where there is none."""
    cards = sample_cards(model, shards, tasks=tasks, row=row, beam=beam)
    if not cards:
        raise ValueError(f"{shards.path}: has no row for {', '.join(tasks or asked_for(model.recipe.data))}")
    return preview.draw_sheet(list(cards.values()))


def sample_cards(
    model: LoadedModel, shards: Shards, *, tasks: Sequence[str] | None = None, row: int = 0, beam: int = 1,
    max_rows: int | None = None,
) -> dict[str, Image.Image]:  # fmt: skip
    """A card per task that the shards have: picture, boxes, source, expected and generated text.

    tasks: those that the recipe trains, where not given. max_rows: look for a row among that many of a family only.
    """
    ctx = model.context(shards.negatives)
    cards = {}
    for task in tasks or asked_for(ctx.config):
        try:
            example = preview.find_example(shards, task, row, ctx, max_rows=max_rows)
        except LookupError:
            continue
        cards[task] = draw_answer(ctx, example, generated(model, [example], beam=beam)[0])
    return cards


def draw_answer(ctx: Context, example: Example, ids: Sequence[int], *, expected: bool = True) -> Image.Image:
    """One card: expected boxes green, generated ones red; image codes of both, the expected above."""
    given = objects_of(ctx, ids)
    known = expected or TABLE[example.task].shows == "region"  # which is part of the question
    boxes = [(box, EXPECTED, name) for box, name in expected_objects(example)] if known else []
    boxes += [(box, GENERATED, name) for box, name in given]
    texts = [("source", example.source_text)]
    if expected:
        texts.append(("expected (green)" if len(example.boxes) else "expected", example.target_text))
    texts.append(("generated (red)" if given else "generated", readable(ctx, ids)))
    target = example.target if expected else np.array([*ids, ctx.vocab.eos])
    card = preview.draw_card(dataclasses.replace(example, boxes=_NO_BOXES, labels=(), target=target), texts, ctx)
    if example.image is not None:
        scale = preview.PICTURE_PIXELS / example.image.shape[1]
        _draw_boxes(card, [(np.array(box) * scale + preview.MARGIN_PIXELS, *rest) for box, *rest in boxes])
    if example.code and expected and ids:
        codes = preview.draw_codes(ids)
        left = 2 * preview.MARGIN_PIXELS + preview.PICTURE_PIXELS
        top = preview.MARGIN_PIXELS + preview.PICTURE_PIXELS - codes.height + _CODES_GAP
        card.paste(codes.crop((0, 0, codes.width, codes.height - _CODES_GAP)), (left, top))
    return card


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
    checkpoint: str | Path, task: str, *, image: str | Path | None = None, text: str = "", beam: int = 5,
    png: str | Path | None = None, average: bool = False, vocab: Path | None = None,
) -> str:  # fmt: skip
    """The model's answer to one task. Boxes, one a line, are told in pixels of the picture that was given.

    text: what `Task.text_is` says, such as the question. average: ask the moving average of the weights.
    Raises ValueError: a picture or text that the task needs is missing, malformed, or too long for the model.
    """
    model = load_model(checkpoint, average=average, vocab=vocab)
    ctx = model.context(Negatives([], [], {"other": []}))
    what = TABLE[task]
    picture = _read_picture(task, image) if what.needs_picture else None
    example = ask(ctx, task, picture, text)
    ids = generated(model, [example], beam=beam, max_tokens=what.answer_tokens(ctx))[0]
    if png is not None:
        draw_answer(ctx, example, ids, expected=False).save(png)
    found = objects_of(ctx, ids) if what.shows == "boxes" else []
    if not found or picture is None:
        return readable(ctx, ids)
    scale = np.array(picture.shape[1::-1] * 2) / np.array(example.image.shape[1::-1] * 2)
    return "\n".join(f"{','.join(f'{v:.0f}' for v in np.array(box) * scale)} {name}".strip() for box, name in found)


def _read_picture(task: str, image: str | Path | None) -> np.ndarray:
    if image is None:
        raise ValueError(f"{task} is about a picture: give --image FILE")
    try:
        return decode(Path(image).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"--image {image}: {error}") from error

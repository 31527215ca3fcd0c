"""What the model sees: the picture after augmentation with its boxes, source and target, as text or as a PNG."""

from __future__ import annotations

import colorsys
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ofa_ds.config import DataConfig
from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab
from ofa_ds.tasks.pretraining import Context, examples, row_generator
from ofa_ds.terms import TASKS

ROW_TYPES = {
    "caption": ("caption",), "vqa": ("qa",), "itm": ("caption", "qa"),
    "visual_grounding": ("visual_grounding",), "grounded_caption": ("visual_grounding",),
}  # fmt: skip
"""Types of the vision-language rows that give each task."""

OTHER_FAMILIES = {"detection": "detection", "image_infilling": "image", "text_infilling": "text"}

SEED = 1
"""The draw that is shown: that of epoch 0 under the default seed."""

PATCH_SIZE = 16
PICTURE_PIXELS = 384
TEXT_PIXELS = 460
FONT_PIXELS = 19
MARGIN_PIXELS = 14
DIMMED = 0.5
"""Brightness of patches that were not sampled."""

COLOURS = ((230, 25, 75), (0, 130, 200), (245, 130, 48), (60, 180, 75), (145, 30, 180), (0, 160, 160))


def show_shards(directory: Path, config: DataConfig, *, task: str | None, row: int, png: Path | None) -> None:
    """Print one example per task (or of one task), and draw them where `png` names a file.

    row: number among the rows that give the task. Raises ValueError: no such row, or no vocabulary.
    """
    if not config.vocab:
        raise ValueError("no vocabulary: give --vocab DIR, or a recipe whose data.vocab names one")
    shards = Shards(directory)
    ctx = Context(vocab=load_vocab(config.vocab), negatives=shards.negatives, config=config, patch_size=PATCH_SIZE)
    shown = []
    for name in [task] if task else TASKS:
        try:
            shown.append(find_example(shards, name, row, ctx))
        except LookupError as error:
            if task:
                raise ValueError(f"{directory}: {error}") from error
            print(f"{name}: {error}")
    for example in shown:
        print(describe(example))
    if png is not None and shown:
        draw_sheet([draw_card(example, facts(example)) for example in shown]).save(png)
        print(f"{png}: {len(shown)} example{'s' * (len(shown) != 1)}")


def find_example(shards: Shards, task: str, row: int, ctx: Context) -> Example:
    """The task's example of the row-th of its source rows. Raises LookupError where there are fewer."""
    count = 0
    for family, index in _source_rows(shards, task):
        if count == row:
            found = examples(family, shards.row(family, index), row_generator(SEED, family, 0, index), ctx)
            return next(example for example in found if example.task == task)
        count += 1
    raise LookupError(f"no row {row}: the shards have {count} rows for it")


def _source_rows(shards: Shards, task: str) -> Iterator[tuple[str, int]]:
    if task in OTHER_FAMILIES:
        family = OTHER_FAMILIES[task]
        yield from ((family, index) for index in range(shards.families.get(family, 0)))
        return
    for index in range(shards.families.get("vision_language", 0)):
        if shards.row("vision_language", index)["type"] in ROW_TYPES[task]:
            yield "vision_language", index


def facts(example: Example) -> list[tuple[str, str]]:
    """(heading, text) of what is written beside the picture."""
    unpenalised = f", {(example.target == 1).sum()} without loss" if (example.target == 1).any() else ""
    picture = "no picture" if example.image is None else f"{example.image.shape[1]} x {example.image.shape[0]} pixels"
    patches = "" if example.patches is None else f", {len(example.patches)} patches sampled"
    origin = f"{example.row_id}  {example.dataset}".strip()
    size = f"{len(example.source)} source and {len(example.target)} target tokens{unpenalised}"
    target = textwrap.shorten(example.target_text, 160, placeholder=" ...") if example.code else example.target_text
    return [
        ("source", example.source_text),
        ("target", target),
        ("row", f"{origin}; weight {example.conf:g}; {size}; {picture}{patches}"),
    ]


def describe(example: Example) -> str:
    """Lines for a terminal."""
    lines = [example.task]
    for heading, text in facts(example):
        first, rest = f"  {heading:7}|", " " * 9 + "|"
        lines += textwrap.wrap(
            text,
            110,
            initial_indent=first,
            subsequent_indent=rest,
            drop_whitespace=False,
            max_lines=12,
            placeholder=" ...",
        ) or [first]
    return "\n".join(lines)


def draw_card(example: Example, texts: Sequence[tuple[str, str]]) -> Image.Image:
    """The picture with boxes on the left, headed texts on the right."""
    font, bold = ImageFont.load_default(FONT_PIXELS), ImageFont.load_default(FONT_PIXELS + 4)
    columns = [_draw_picture(example)] if example.image is not None else []
    if example.code:
        columns.append(draw_codes(example.target[:-1].tolist()))
    left = sum(column.width + MARGIN_PIXELS for column in columns) + MARGIN_PIXELS
    lines: list[tuple[str, ImageFont.FreeTypeFont, tuple[int, int, int]]] = [(example.task, bold, (0, 0, 0))]
    for heading, text in texts:
        lines.append((heading, font, (120, 120, 120)))
        lines += [(line, font, (0, 0, 0)) for line in _wrap(text, font)]
    height = max([column.height for column in columns] + [len(lines) * (FONT_PIXELS + 7)]) + 2 * MARGIN_PIXELS
    card = Image.new("RGB", (left + TEXT_PIXELS + MARGIN_PIXELS, height), "white")
    x = MARGIN_PIXELS
    for column in columns:
        card.paste(column, (x, MARGIN_PIXELS))
        x += column.width + MARGIN_PIXELS
    pen = ImageDraw.Draw(card)
    for number, (line, line_font, colour) in enumerate(lines):
        pen.text((left, MARGIN_PIXELS + number * (FONT_PIXELS + 7)), line, fill=colour, font=line_font)
    return card


def draw_sheet(cards: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """All cards in rows of `columns`."""
    columns = min(columns, len(cards))
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    width = max(card.width for card in cards)
    heights = [max(card.height for card in row) for row in rows]
    sheet = Image.new("RGB", (width * columns, sum(heights)), "white")
    for number, row in enumerate(rows):
        top = sum(heights[:number])
        for column, card in enumerate(row):
            sheet.paste(card, (column * width, top))
        ImageDraw.Draw(sheet).line([(0, top), (sheet.width, top)], fill=(200, 200, 200))
    return sheet


def _draw_picture(example: Example) -> Image.Image:
    pixels = example.image.astype(np.float32)
    height, width = pixels.shape[:2]
    if example.patches is not None:
        dim = np.full((height // PATCH_SIZE, width // PATCH_SIZE), DIMMED, np.float32)
        dim.ravel()[example.patches] = 1
        dim = dim.repeat(PATCH_SIZE, 0).repeat(PATCH_SIZE, 1)
        pixels = pixels[: dim.shape[0], : dim.shape[1]] * dim[..., None]
    if example.hole is not None:
        y0, x0, y1, x1 = example.hole
        pixels[y0:y1, x0:x1] = 127.5
    scale = PICTURE_PIXELS / width
    picture = Image.fromarray(pixels.astype(np.uint8)).resize(
        (PICTURE_PIXELS, round(height * scale)), Image.Resampling.NEAREST
    )
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_PIXELS - 2)
    names = example.labels or ("",) * len(example.boxes)
    for number, (box, name) in enumerate(zip(example.boxes * scale, names, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        pen.rectangle([float(value) for value in box], outline=colour, width=3)
        if name:
            place = (float(box[0]) + 4, float(box[1]) + 2)
            pen.rectangle(pen.textbbox(place, name, font=font), fill="white")
            pen.text(place, name, fill=colour, font=font)
    return picture


def draw_codes(codes: Sequence[int]) -> Image.Image:
    """One colour per code, the first square of them: equal codes look equal, nothing else is meant."""
    side = math.isqrt(len(codes))
    colours = [
        colorsys.hsv_to_rgb(code * 0.618034 % 1, 0.35 + code * 0.381966 % 0.6, 0.55 + code * 0.271 % 0.4)
        for code in codes[: side * side]
    ]
    pixels = (np.array(colours).reshape(side, side, 3) * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((PICTURE_PIXELS // 2, PICTURE_PIXELS // 2), Image.Resampling.NEAREST)


def _wrap(text: str, font: ImageFont.FreeTypeFont, max_lines: int = 12) -> list[str]:
    """Lines that fit TEXT_PIXELS."""
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > TEXT_PIXELS:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], lines[max_lines - 1] + " ..."]

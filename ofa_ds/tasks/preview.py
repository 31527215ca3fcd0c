"""What the model sees: the picture after augmentation with its boxes, source and target, as text or as a PNG."""

from __future__ import annotations

import colorsys
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.storage.atomic import new_content
from ofa_ds.tasks.context import Context, row_generator
from ofa_ds.tasks.kind import Task
from ofa_ds.tasks.task import DOWNSTREAM, asked_for, examples, held_out_examples, table_of
from ofa_ds.terms import PAD_ID

SEED = 1
"""The draw that is shown: that of epoch 0 under the default seed."""

PICTURE_PIXELS = 384
VIEW_PIXELS = 256
"""Width of each of several pictures of a card."""
TEXT_PIXELS = 460
FONT_PIXELS = 19
MARGIN_PIXELS = 14
HOLE_GREY = 127
DIMMED = 0.5
"""Brightness of patches that were not sampled."""

MAX_CHARACTERS = 4000
"""Of a text that is shown; more than fits its lines."""

COLOURS = ((230, 25, 75), (0, 130, 200), (245, 130, 48), (60, 180, 75), (145, 30, 180), (0, 160, 160))


def show_shards(shards: Shards, ctx: Context, *, task: str | None, row: int, png: Path | None) -> None:
    """Print one example per task that the recipe trains (or of one task), and draw them where `png` names a file.

    row: number among the rows that give the task. Raises ValueError: no such row.
    """
    shown = []
    trained, table = asked_for(ctx.config), table_of(shards.families)
    for name in [task] if task else table:
        if not task and name not in trained:
            if table is DOWNSTREAM:
                continue
            print(f"{name}: not trained, as data.mix.{table[name].family} is 0; --task {name} shows it all the same")
            continue
        try:
            shown.append(find_example(shards, name, row, ctx))
        except LookupError as error:
            if task:
                raise ValueError(f"{shards.path}: {error}") from error
            print(f"{name}: {error}")
    for example in shown:
        print(describe(example, ctx))
    if png is not None and shown:
        cards = [draw_card(example, facts(example, ctx), ctx, views_of(ctx, example)) for example in shown]
        with new_content(png) as partial:
            draw_sheet(cards).save(partial)
        print(f"{png}: {len(shown)} example{'s' * (len(shown) != 1)}")


def views_of(ctx: Context, example: Example, generated: Sequence[int] = ()) -> list[np.ndarray]:
    """uint8 [H, W, 3] each of an example with image codes, where something is at hand to paint them; else none.

    Of infilling: the original, it with the hole, the hole filled with what its target stands for, and with what
    `generated` ids do; of a whole picture the last two. Raises ValueError for ids that cannot be painted, or that
    fill no hole.
    """
    if ctx.paint is None or not example.code:
        return []
    answers = [ids for ids in (example.target[:-1].tolist(), list(generated)) if ids]
    painted = ctx.paint(answers)
    if example.hole is None or example.image is None:
        return painted
    return [example.image, *(filled(example, middle) for middle in (None, *painted))]


def filled(example: Example, middle: np.ndarray | None) -> np.ndarray:
    """The picture with another middle, grey where there is none. Raises ValueError for one that fills no hole."""
    y0, x0, y1, x1 = example.hole
    if middle is None:
        middle = np.full((y1 - y0, x1 - x0, 3), HOLE_GREY, np.uint8)
    if middle.shape[:2] != (y1 - y0, x1 - x0):
        raise ValueError(
            f"{middle.shape[1]} x {middle.shape[0]} pixels are painted, the hole has {x1 - x0} x {y1 - y0}"
        )
    pixels = example.image.copy()
    pixels[y0:y1, x0:x1] = middle
    return pixels


def find_example(shards: Shards, name: str, row: int, ctx: Context, *, max_rows: int | None = None) -> Example:
    """The task's example of the row-th of its source rows. Raises LookupError where there are fewer.

    Raises ValueError or RuntimeError that names the row, where it does not fit the settings or is damaged.

    max_rows: look for it among that many rows of the family only.
    """
    task = table_of(shards.families)[name]
    count = count_rows(shards, task)
    if not 0 <= row < count:
        raise LookupError(f"no row {row}: the shards have {count} rows for it")
    rows = shards.rows_of_types(task.family, task.row_types, max_rows=max_rows)
    index = next(itertools.islice(rows, row, None), None)
    if index is None:
        raise LookupError(f"row {row} is not among the first {max_rows} of {task.family}")
    values = None
    try:
        values = shards.row(task.family, index)
        if not ctx.train:
            found = held_out_examples([name], task.family, values, index, ctx)
            return found[index % len(found)]  # of the statements of matching, true and false ones in turn
        found = examples(task.family, values, row_generator(SEED, task.family, 0, index), ctx)
    except Exception as error:
        raise shards.at_row(task.family, index, values, error) from error
    return next(example for example in found if example.task == name)


def count_rows(shards: Shards, task: Task) -> int:
    """Rows that give the task, as the manifest counts them."""
    if not task.row_types:
        return shards.families.get(task.family, 0)
    return sum(shards.types.get(kind, 0) for kind in task.row_types)


def facts(example: Example, ctx: Context) -> list[tuple[str, str]]:
    """(heading, text) of what is written beside the picture."""
    unpenalised = (example.target == PAD_ID).sum()
    unpenalised = f", {unpenalised} without loss" if unpenalised else ""
    cut = f", cut to the model's {ctx.max_positions} positions" if example.cut else ""
    picture = "no picture" if example.image is None else f"{example.image.shape[1]} x {example.image.shape[0]} pixels"
    patches = "" if example.patches is None else f", {len(example.patches)} patches sampled"
    origin = f"{example.row_id}  {example.dataset}".strip()
    size = f"{len(example.source)} source and {len(example.target)} target tokens{unpenalised}{cut}"
    target = textwrap.shorten(example.target_text, 160, placeholder=" ...") if example.code else example.target_text
    return [
        ("source", example.source_text),
        ("target", target),
        ("row", f"{origin}; weight {example.conf:g}; {size}; {picture}{patches}"),
    ]


def describe(example: Example, ctx: Context) -> str:
    """Lines for a terminal."""
    lines = [example.task]
    for heading, text in facts(example, ctx):
        first, rest = f"  {heading:7}|", " " * 9 + "|"
        lines += textwrap.wrap(
            text[:MAX_CHARACTERS],
            110,
            initial_indent=first,
            subsequent_indent=rest,
            drop_whitespace=False,
            max_lines=12,
            placeholder=" ...",
        ) or [first]
    return "\n".join(lines)


def draw_card(
    example: Example, texts: Sequence[tuple[str, str]], ctx: Context, views: Sequence[np.ndarray] = ()
) -> Image.Image:
    """The picture with boxes on the left, headed texts on the right.

    views: pictures in place of it and of its codes.
    """
    font, bold = ImageFont.load_default(FONT_PIXELS), ImageFont.load_default(FONT_PIXELS + 4)
    columns = [_scaled(Image.fromarray(view), VIEW_PIXELS) for view in views]
    if example.image is not None and not views:
        columns.append(_draw_picture(example, ctx.patch_size))
    if example.code and not views:
        columns.append(draw_codes(example.target[:-1].tolist()))
    left = sum(column.width + MARGIN_PIXELS for column in columns) + MARGIN_PIXELS
    lines: list[tuple[str, ImageFont.FreeTypeFont, tuple[int, int, int]]] = [(example.task, bold, (0, 0, 0))]
    for heading, text in texts:
        lines.append((heading, font, (120, 120, 120)))
        lines += [(line, font, (0, 0, 0)) for line in wrap(text, font)]
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


def _draw_picture(example: Example, patch_size: int) -> Image.Image:
    pixels = example.image.astype(np.float32)
    height, width = pixels.shape[:2]
    if example.patches is not None:
        dim = np.full((height // patch_size, width // patch_size), DIMMED, np.float32)
        dim.ravel()[example.patches] = 1
        dim = dim.repeat(patch_size, 0).repeat(patch_size, 1)
        pixels = pixels[: dim.shape[0], : dim.shape[1]] * dim[..., None]
    if example.hole is not None:
        y0, x0, y1, x1 = example.hole
        pixels[y0:y1, x0:x1] = HOLE_GREY
    scale = PICTURE_PIXELS / width
    picture = _scaled(Image.fromarray(pixels.astype(np.uint8)), PICTURE_PIXELS)
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


def _scaled(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.NEAREST)


def draw_codes(codes: Sequence[int]) -> Image.Image:
    """One colour per code, the first square of them: equal codes look equal, nothing else is meant."""
    side = math.isqrt(len(codes))
    colours = [
        colorsys.hsv_to_rgb(code * 0.618034 % 1, 0.35 + code * 0.381966 % 0.6, 0.55 + code * 0.271 % 0.4)
        for code in codes[: side * side]
    ]
    pixels = (np.array(colours).reshape(side, side, 3) * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((PICTURE_PIXELS // 2, PICTURE_PIXELS // 2), Image.Resampling.NEAREST)


def wrap(text: str, font: ImageFont.FreeTypeFont, *, width: int = TEXT_PIXELS, max_lines: int = 12) -> list[str]:
    """Lines that fit `width` pixels; a line end of the text is a blank."""
    lines, line = [], ""
    for word in text[:MAX_CHARACTERS].split():
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], lines[max_lines - 1] + " ..."]

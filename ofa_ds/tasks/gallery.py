"""Captions and the pictures that were painted for them, as one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ofa_ds.tasks.preview import FONT_PIXELS, MARGIN_PIXELS, draw_sheet, wrap

SIDE_PIXELS = 192
"""Longer side of a picture on the sheet."""
GAP_PIXELS = 6
MAX_ACROSS = 6
"""Pictures of one caption beside each other."""
MAX_COLUMNS = 4
_LINE_PIXELS = FONT_PIXELS + 5


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A caption, and pictures uint8 RGB [H, W, 3], the best first."""

    caption: str
    pictures: Sequence[np.ndarray]
    notes: Sequence[str] = ()
    """What stands under each picture, such as its score; nothing where there are none."""


def draw_gallery(entries: Sequence[Entry]) -> Image.Image:
    """Every entry with its caption above its pictures, as near to a square as it goes.

    Raises ValueError where there is nothing to draw, or not as many notes as pictures.
    """
    if not entries or not all(len(entry.pictures) for entry in entries):
        raise ValueError("a gallery: want one picture or more of each caption, and one caption or more")
    columns = min(MAX_COLUMNS, math.ceil(math.sqrt(len(entries)))) if len(entries) > 1 else 1
    across = min(max(math.ceil(math.sqrt(len(entry.pictures))) for entry in entries), MAX_ACROSS)
    return draw_sheet([_card(entry, across) for entry in entries], columns)


def _card(entry: Entry, across: int) -> Image.Image:
    if entry.notes and len(entry.notes) != len(entry.pictures):
        raise ValueError(f"a gallery: {len(entry.notes)} notes of {len(entry.pictures)} pictures of {entry.caption!r}")
    font = ImageFont.load_default(FONT_PIXELS)
    step_x = SIDE_PIXELS + GAP_PIXELS
    step_y = step_x + (_LINE_PIXELS if entry.notes else 0)
    width = across * step_x - GAP_PIXELS
    lines = wrap(entry.caption, font, width=width, max_lines=4)
    top = MARGIN_PIXELS + len(lines) * _LINE_PIXELS + GAP_PIXELS
    rows = -(-len(entry.pictures) // across)
    card = Image.new("RGB", (width + 2 * MARGIN_PIXELS, top + rows * step_y - GAP_PIXELS + MARGIN_PIXELS), "white")
    pen = ImageDraw.Draw(card)
    for number, line in enumerate(lines):
        pen.text((MARGIN_PIXELS, MARGIN_PIXELS + number * _LINE_PIXELS), line, fill="black", font=font)
    for number, picture in enumerate(entry.pictures):
        x, y = MARGIN_PIXELS + number % across * step_x, top + number // across * step_y
        card.paste(_scaled(picture), (x, y))
        if entry.notes:
            pen.text((x, y + SIDE_PIXELS), entry.notes[number], fill=(120, 120, 120), font=font)
    return card


def _scaled(picture_HW3: np.ndarray) -> Image.Image:
    """Longer side SIDE_PIXELS; small pictures keep their pixels to be seen, large ones are averaged."""
    image = Image.fromarray(np.ascontiguousarray(picture_HW3))
    scale = SIDE_PIXELS / max(image.size)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.resize([max(1, round(side * scale)) for side in image.size], how)

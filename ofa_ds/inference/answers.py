"""What a model answers, as text and as pictures: boxes in pixels, codes as colours, one card per task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ofa_ds.data.example import Example
from ofa_ds.data.image import decode, resize
from ofa_ds.data.shards import Negatives, Shards
from ofa_ds.data.text import clean_caption, clean_question
from ofa_ds.inference.loaded_model import Subject, generated, load_subject
from ofa_ds.tasks import pretraining as ofa_tasks
from ofa_ds.tasks import preview
from ofa_ds.tasks.judges import Box, Objects
from ofa_ds.tasks.pretraining import Context
from ofa_ds.tasks.preview import find_example
from ofa_ds.terms import TASKS

EXPECTED, GENERATED = (60, 180, 75), (230, 25, 75)
"""Colours of the boxes: green and red."""

_CODES_GAP = 8
"""Pixels between expected and generated codes."""
_NO_BOXES = np.empty((0, 4), np.float32)


def boxes_of(ctx: Context, ids: Sequence[int]) -> list[Box]:
    """The boxes among generated ids, each four bins in a row, in pixels of the network's picture."""
    return [box for box, _ in objects_of(ctx, ids)]


def objects_of(ctx: Context, ids: Sequence[int]) -> Objects:
    """Boxes with the text that follows each; bins that do not come in fours are skipped."""
    found: Objects = []
    bins: list[int] = []
    words: list[int] = []
    for token in ids:
        if ctx.vocab.is_bin(token):
            if words and found:
                found[-1] = (found[-1][0], ctx.vocab.decode(words).strip())
            words = []
            bins.append(token)
            if len(bins) == 4:
                found.append((_box(ctx, bins), ""))
                bins = []
        else:
            bins = []
            words.append(token)
    if words and found:
        found[-1] = (found[-1][0], ctx.vocab.decode(words).strip())
    return found


def _box(ctx: Context, bins: Sequence[int]) -> Box:
    pixels_a_bin = ctx.config.max_image_size / (ctx.vocab.num_bins - 1)
    x0, y0, x1, y1 = ((token - ctx.vocab.bin_start) * pixels_a_bin for token in bins)
    return x0, y0, x1, y1


def sample_sheet(
    subject: Subject, shards: Shards, *, tasks: Sequence[str] = TASKS, row: int = 0, beam: int = 1
) -> Image.Image:
    """A card per task that the shards have: picture, boxes, source, expected and generated text.

    Under ZeRO-3 all ranks call it together, with the same arguments.
    """
    ctx = subject.context(shards.negatives)
    cards = []
    for task in tasks:
        try:
            example = find_example(shards, task, row, dataclasses.replace(ctx, split="train") if task == "itm" else ctx)
        except LookupError:
            continue
        cards.append(draw_answer(ctx, example, generated(subject, [example], beam=beam)[0]))
    if not cards:
        raise ValueError(f"{shards.path}: has no row for {', '.join(tasks)}")
    return preview.draw_sheet(cards)


def draw_answer(ctx: Context, example: Example, ids: Sequence[int], *, expected: bool = True) -> Image.Image:
    """One card: expected boxes green, generated ones red; image codes of both, the expected above."""
    given = objects_of(ctx, ids)
    known = expected or example.task == "grounded_caption"  # whose region is part of the question
    boxes = [(box, EXPECTED, name) for box, name in _expected_objects(example)] if known else []
    boxes += [(box, GENERATED, name) for box, name in given]
    texts = [("source", example.source_text)]
    if expected:
        texts.append(("expected (green)" if len(example.boxes) else "expected", example.target_text))
    texts.append(("generated (red)" if given else "generated", readable(ctx, ids)))
    target = example.target if expected else np.array([*ids, ctx.vocab.eos])
    card = preview.draw_card(dataclasses.replace(example, boxes=_NO_BOXES, labels=(), target=target), texts)
    if example.image is not None:
        scale = preview.PICTURE_PIXELS / example.image.shape[1]
        _draw_boxes(card, [(np.array(box) * scale + preview.MARGIN_PIXELS, *rest) for box, *rest in boxes])
    if example.code and expected and ids:
        codes = preview.draw_codes(ids)
        left = 2 * preview.MARGIN_PIXELS + preview.PICTURE_PIXELS
        top = preview.MARGIN_PIXELS + preview.PICTURE_PIXELS - codes.height + _CODES_GAP
        card.paste(codes.crop((0, 0, codes.width, codes.height - _CODES_GAP)), (left, top))
    return card


def _expected_objects(example: Example) -> Objects:
    names = example.labels or ("",) * len(example.boxes)
    return list(zip((tuple(map(float, box)) for box in example.boxes), names, strict=True))


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

    text: the question (vqa), the caption to check (itm), the phrase to find (visual_grounding), the region
    "x0,y0,x1,y1" in pixels (grounded_caption), or the text with <mask> where something is missing (text_infilling).
    average: ask the moving average of the weights. Raises ValueError: a picture or text that the task needs is missing
    or malformed.
    """
    subject = load_subject(checkpoint, average=average, vocab=vocab)
    ctx = subject.context(Negatives([], [], {"other": []}))
    picture = None if task == "text_infilling" else _read_picture(task, image)
    example = ask(ctx, task, picture, text)
    ids = generated(subject, [example], beam=beam, max_tokens=_answer_limit(ctx, task))[0]
    if png is not None:
        draw_answer(ctx, example, ids, expected=False).save(png)
    found = objects_of(ctx, ids) if task in ("visual_grounding", "detection") else []
    if not found or picture is None:
        return readable(ctx, ids)
    scale = np.array(picture.shape[1::-1] * 2) / np.array(example.image.shape[1::-1] * 2)
    return "\n".join(f"{','.join(f'{v:.0f}' for v in np.array(box) * scale)} {name}".strip() for box, name in found)


def _answer_limit(ctx: Context, task: str) -> int:
    codes = (ctx.config.code_image_size // ofa_tasks.PIXELS_PER_CODE) ** 2
    longest = {"detection": 256, "image_infilling": codes, "text_infilling": ctx.config.max_text_tokens}
    return longest.get(task, 64)


def _read_picture(task: str, image: str | Path | None) -> np.ndarray:
    if image is None:
        raise ValueError(f"{task} is about a picture: give --image FILE")
    try:
        return decode(Path(image).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"--image {image}: {error}") from error


def ask(ctx: Context, task: str, picture: np.ndarray | None, text: str) -> Example:
    """The example of a task without its answer, worded as in training. picture: uint8 [h, w, 3] of any size.

    Raises ValueError where the text is missing or, for a region, is not a box inside the picture.
    """
    if task in _TEXT_OF and not text.strip():
        raise ValueError(f"{task} needs --text: {_TEXT_OF[task]}")
    config, encode = ctx.config, ctx.vocab.encode
    if task == "text_infilling":
        before, after = ofa_tasks.INFILL_TEXT_PROMPT
        pieces = [encode(piece) for piece in f" {text.strip().lower()}".replace(" <mask>", "<mask>").split("<mask>")]
        masked = pieces[0] + [token for piece in pieces[1:] for token in (ctx.vocab.mask, *piece)]
        return _question(ctx, task, f"{before} {text}{after}", encode(before) + masked + encode(after))
    other = task in ("image_infilling", "detection")
    side = config.infill_image_size if other else config.image_size
    seen = resize(picture, side, side)
    if task == "grounded_caption":
        box = np.array([_read_box(text, picture)], np.float32) * np.array([side / n for n in picture.shape[1::-1]] * 2)
        ids = encode(ofa_tasks.REGION_PROMPT) + ofa_tasks.bin_ids(box, ctx)[0]
        return _question(ctx, task, f"{ofa_tasks.REGION_PROMPT} {text}", ids, image=seen, boxes=box.astype(np.float32))
    start, hole_side = (side - config.code_image_size) // 2, config.code_image_size
    hole = (start, start, start + hole_side, start + hole_side) if task == "image_infilling" else None
    cleaned = (clean_question if task == "vqa" else clean_caption)(text, config.max_source_words)
    prompt = _PROMPTS[task].format(cleaned)
    return _question(ctx, task, prompt, encode(prompt), image=seen, hole=hole, code=hole is not None)


_TEXT_OF = {
    "vqa": "the question", "itm": "the caption to check", "visual_grounding": "the phrase to find",
    "grounded_caption": "the region as x0,y0,x1,y1 in pixels", "text_infilling": "the text, <mask> for what is missing",
}  # fmt: skip
_PROMPTS = {
    "caption": ofa_tasks.CAPTION_PROMPT, "vqa": " {}", "itm": ofa_tasks.CAPTION_MATCH_PROMPT,
    "visual_grounding": ofa_tasks.GROUNDING_PROMPT, "detection": ofa_tasks.DETECTION_PROMPT,
    "image_infilling": ofa_tasks.INFILL_IMAGE_PROMPT,
}  # fmt: skip


def _read_box(text: str, picture: np.ndarray) -> tuple[float, float, float, float]:
    height, width = picture.shape[:2]
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--text {text!r}: want a region x0,y0,x1,y1 in pixels") from error
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"--text {text!r}: not a region inside the picture, which is {width} x {height}")
    return x0, y0, x1, y1


def _question(ctx: Context, task: str, text: str, source: list[int], **fields: Any) -> Example:
    vocab = ctx.vocab
    return Example(
        task=task, source_text=text, source=np.array([vocab.bos, *source, vocab.eos]),
        target=np.array([vocab.eos]), prev=np.array([vocab.bos]), **fields,
    )  # fmt: skip

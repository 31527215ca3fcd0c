"""Image-text matching: does this caption, or this answer to a question, go with the picture?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture, resize
from ofa_ds.data.text import clean_caption, clean_question
from ofa_ds.tasks import judges
from ofa_ds.tasks.context import Context, Row, frame, question, sample_patches
from ofa_ds.tasks.negatives import negative_answer, negative_caption
from ofa_ds.tasks.vqa import best_answer

CAPTION_PROMPT = ' does the image describe " {} "?'
ANSWER_PROMPT = ' what is the answer to question " {} ". is " {} "?'
YES, NO = " yes", " no"


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """Half of them true."""
    return statement(row, seen, rng, ctx, match=rng.random() >= 0.5)


def held_out(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> list[Example]:
    """The true statement of a row and a false one."""
    return [statement(row, seen, rng, ctx, match=match) for match in (True, False)]


def statement(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context, *, match: bool) -> Example:
    """A true or a false one about the row's picture; an answer weighs what its annotators were sure of."""
    limit, conf = ctx.config.max_source_words, 1.0
    if row["type"] == "caption":
        text = clean_caption(row["caption"], limit)
        if not match:
            text = negative_caption(row["caption"], row["gt_objects"], ctx.negatives, rng, limit)
        source = CAPTION_PROMPT.format(text)
    else:
        answer, conf = best_answer(row)
        if not match:
            answer = negative_answer(answer, conf, ctx.negatives, ctx.answer_types, rng)
        source = ANSWER_PROMPT.format(clean_question(row["question"], limit), answer)
    return frame(row, ctx, source, YES if match else NO, image=seen.image, patches=sample_patches(rng, ctx), conf=conf)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    side = ctx.config.image_size
    source = CAPTION_PROMPT.format(clean_caption(text, ctx.config.max_source_words))
    return question(ctx, source, image=resize(picture, side, side))


def texts(row: Row) -> list[str]:
    if row["type"] == "caption":
        return [CAPTION_PROMPT.format(clean_caption(row["caption"])), YES, NO]
    asked = clean_question(row["question"])
    return [*(ANSWER_PROMPT.format(asked, answer) for answer, _ in row["answers"]), YES, NO]


def judge(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    right = judges.exact([example.target_text for example in asked], judges.texts_of(ctx, answers))
    of_caption = [example.row_type == "caption" for example in asked]
    return {
        "accuracy": judges.mean(right),
        "accuracy, captions": judges.mean([hit for hit, yes in zip(right, of_caption, strict=True) if yes]),
        "accuracy, answers": judges.mean([hit for hit, yes in zip(right, of_caption, strict=True) if not yes]),
    }


def constant(asked: Sequence[Example]) -> judges.Scores:
    """Always yes: half of the statements are true."""
    return dict.fromkeys(("accuracy", "accuracy, captions", "accuracy, answers"), 0.5)

"""Text to image: a caption in, the codes of a whole picture out (docs/downstream.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ofa_ds.data import scenes, scenes_judge
from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.tasks import judges
from ofa_ds.tasks.context import PIXELS_PER_CODE, Context, Row
from ofa_ds.tasks.downstream.frame import asked_row, best_answer, downstream_frame
from ofa_ds.tasks.kind import Decoding, Task
from ofa_ds.terms import BEST_OF

PROMPT = " what is the complete image? caption: "
EQUAL_CODES = "equal codes"
COLOR_RIGHT, SHAPE_RIGHT, PLACE_RIGHT = "colour right", "shape right", "place right"


def _caption(text: str, ctx: Context) -> str:
    return " ".join(text.lower().split()[: ctx.config.max_source_words])


def caption_of(source: str) -> str:
    """The caption of a text that the model reads."""
    return source[len(PROMPT) :]


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """No picture goes in, also where the row has one.

    Raises ValueError where the number of codes is not the configuration's, or one is outside the vocabulary's.
    """
    best, source = best_answer(row), PROMPT + _caption(row["text"], ctx)
    if best is None:
        return downstream_frame(row, ctx, source, "", answer=(), code=True)
    codes = [int(code) for code in best[0].split()]
    if len(codes) != ctx.num_codes:
        raise ValueError(
            f"{len(codes)} codes, want {ctx.num_codes}: data.code_image_size {ctx.config.code_image_size} has one for "
            f"each {PIXELS_PER_CODE} x {PIXELS_PER_CODE} pixels"
        )
    readable = "".join(f"<code_{code}>" for code in codes)
    return downstream_frame(row, ctx, source, readable, answer=[ctx.vocab.code(code) for code in codes], code=True)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    """Raises ValueError for more words than training reads of a caption."""
    limit = ctx.config.max_source_words
    if (words := len(text.split())) > limit:
        raise ValueError(f"--text: {words} words, want {limit} at most (data.max_source_words); shorten it")
    return downstream_frame(asked_row(None, text), ctx, PROMPT + _caption(text, ctx), "", answer=(), code=True)


def texts(row: Row) -> list[str]:
    return [PROMPT + " ".join(row["text"].lower().split())]


def judge(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    """Share of the codes that are those of the row's own picture, which is one of many that fit its caption.

    Where no VQGAN is at hand and codes are those of scenes, `scene_scores` too.
    """
    pairs = list(zip(asked, answers, strict=True))
    scores = {EQUAL_CODES: judges.mean([_equal_share(each, ids) for each, ids in pairs if len(each.target) > 1])}
    said = said_of(asked)
    if said is None or ctx.paint is not None or ctx.vocab.num_codes != scenes.NUM_CODES:
        return scores
    codes = [[int(token) - ctx.vocab.code_start for token in ids] for ids in answers]
    found = [[scenes_judge.look_at(scenes.picture_of_codes(each))] if each else [()] for each in codes]
    return scores | scene_scores(said, found)


def said_of(asked: Sequence[Example]) -> list[scenes_judge.Said] | None:
    """What the captions say, where all are of `ofa-ds scenes`."""
    try:
        return [scenes_judge.parse(caption_of(example.source_text)) for example in asked]
    except ValueError:
        return None


def scene_scores(
    said: Sequence[scenes_judge.Said], found: Sequence[Sequence[Sequence[scenes_judge.Found]]]
) -> judges.Scores:
    """Is what each caption names in its picture, and nothing else?

    colour right: the colours; shape right: each shape in its colour; place right: of two, as well where they lie.
    found: of each caption what one picture shows, or each of several: the first counts, and, under names of their own,
    the one that has most of this right.
    """
    verdicts = [[scenes_judge.compare(each, one) for each in shown] for one, shown in zip(said, found, strict=True)]
    number = max(map(len, verdicts), default=1)
    scores = _means([each[0] for each in verdicts])
    if number > 1:
        best = [max(each, key=lambda v: (v.color, v.looks, bool(v.place))) for each in verdicts]
        scores |= {f"{name}{BEST_OF}{number}": value for name, value in _means(best).items()}
    return scores


def _means(verdicts: Sequence[scenes_judge.Verdict]) -> judges.Scores:
    return {
        COLOR_RIGHT: judges.mean([float(each.color) for each in verdicts]),
        SHAPE_RIGHT: judges.mean([float(each.looks) for each in verdicts]),
        PLACE_RIGHT: judges.mean([float(each.place) for each in verdicts if each.place is not None]),
    }


def _equal_share(example: Example, ids: Sequence[int]) -> float:
    right = example.target[:-1].tolist()
    return sum(a == b for a, b in zip(right, ids, strict=False)) / len(right)


def constant(asked: Sequence[Example]) -> judges.Scores:
    """The commonest code of each place."""
    share = judges.constant_sequence_share([example.target[:-1].tolist() for example in asked])
    return {EQUAL_CODES: share, judges.TOKEN_ACCURACY: share}


def hand_in(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> list[Any]:
    """[{"uniq_id", "codes": row by row}], which `ofa-ds codes decode` paints."""
    start = ctx.vocab.code_start
    return [
        {"uniq_id": example.row_id, "codes": [int(token) - start for token in ids]}
        for example, ids in zip(asked, answers, strict=True)
    ]


TEXT_TO_IMAGE = Task(
    name="text_to_image", family="downstream", row_types=("text_to_image",), build=build, texts=texts, ask=ask,
    needs_picture=False, text_is="the caption", columns={"id": 0, "codes": 1, "text": 2}, width=3,
    other_columns={2: {"id": 0, "text": 1}, 4: {"id": 0, "image": 1, "text": 2, "codes": 3}},
    settings={"max_source_words": 64, "code_image_size": 256},
    decoding=Decoding(codes=True, top_k=256), metric=EQUAL_CODES, judge=judge, constant=constant,
    hand_in=hand_in,
)  # fmt: skip
"""The number of codes follows from data.code_image_size: 1,024 of 256 x 256 pixels."""

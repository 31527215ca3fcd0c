"""Summarisation: an article in, its headline out."""

from __future__ import annotations

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.data.text import clean_caption
from ofa_ds.tasks.context import Context, Row
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import asked_row, best_answer, downstream_frame
from ofa_ds.tasks.kind import Decoding, Task

PROMPTS = {"en": ' what is the summary of article " {} "?', "zh": "{} 请用一个句子简单总结上文："}


def _clean(text: str, max_words: int | None = None) -> str:
    return clean_caption(text, max_words).replace("<unk>", "unk")


def _example(row: Row, ctx: Context, answer_text: str, **fields) -> Example:
    """The limit of the source counts words of the article, then tokens of all: it may cut the end of the question."""
    limit = ctx.config.max_source_words
    source = PROMPTS[ctx.config.task.language].format(_clean(row["text"], limit))
    return downstream_frame(row, ctx, source, answer_text, source=ctx.vocab.encode(source, limit), **fields)


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """The headline begins without a blank, unlike every other answer."""
    best = best_answer(row)
    if best is None:
        return _example(row, ctx, "", answer=())
    return _example(row, ctx, _clean(best[0], ctx.config.max_target_words), rng=rng)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    return _example(asked_row(None, text), ctx, "", answer=())


def texts(row: Row) -> list[str]:
    return [PROMPTS["en"].format(_clean(row["text"])), *(_clean(answer) for answer, _ in row["answers"])]


GIGAWORD = Task(
    name="gigaword", family="downstream", row_types=("gigaword",), build=build, texts=texts, ask=ask,
    needs_picture=False, text_is="the article", columns={"text": 0, "answer": 1}, width=2,
    settings={"max_source_words": 512, "max_target_words": 64, "task.decoder_noise": 0.2},
    decoding=Decoding(beams=6, max_len=32, no_repeat_ngram=3, len_penalty=0.7), hand_in_format="lines",
    metric=scoring.ROUGE_L, judge=scoring.judge_summary, constant=scoring.constant_summary,
    hand_in=scoring.hand_in_summary,
)  # fmt: skip

"""Visual question answering: a picture and a question in, the answer out, which is one of a list or open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.data.text import clean_question
from ofa_ds.tasks.context import Context, Row
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import asked_row, best_answer, downstream_frame, picture_of, seen_by_the_network
from ofa_ds.tasks.kind import Decoding, Task
from ofa_ds.terms import EOS_ID

OBJECTS = " object: "


def _question(text: str, max_words: int | None = None) -> str:
    text = clean_question(text, max_words)
    return f" {text}" if text.endswith("?") else f" {text}?"


def _objects(row: Row, max_objects: int | None = None) -> str:
    """The blanks around single objects stay, as in the original; those around all of them do not."""
    return OBJECTS + " ".join("&&".join(row.get("objects", ())).strip().split("&&")[:max_objects])


def _example(row: Row, ctx: Context, answer_text: str, answer: Sequence[int], **fields) -> Example:
    options = ctx.config.task
    parts = [_question(row["text"], ctx.config.max_source_words)]
    if options.objects:
        parts.append(_objects(row, options.max_objects))
    source = [token for part in parts for token in ctx.vocab.encode(part, ctx.max_positions)]
    return downstream_frame(row, ctx, "".join(parts), answer_text, source=source, answer=answer, **fields)


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """The best answer; its confidence weighs the loss."""
    best = best_answer(row)
    text, conf = best or ("", 1.0)
    answer = _answer_ids(f" {text}", ctx) if best else ()
    return _example(row, ctx, f" {text}", answer, conf=conf, rng=rng, image=picture_of(row, ctx))


def _answer_ids(text: str, ctx: Context) -> list[int]:
    """At most task.max_target_tokens; whole where only the whole is in the list, as its end would have no chance."""
    ids = ctx.vocab.encode(text)
    cut = ids[: ctx.config.task.max_target_tokens]
    if len(cut) == len(ids) or ctx.candidates is None or not ctx.config.task.constrained:
        return cut
    trie = ctx.candidates.trie
    return ids if EOS_ID in trie.next(ids) and EOS_ID not in trie.next(cut) else cut


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    return _example(asked_row(picture, text), ctx, "", (), image=seen_by_the_network(picture, ctx))


def texts(row: Row) -> list[str]:
    return [_question(row["text"]), _objects(row), *(f" {answer}" for answer, _ in row["answers"])]


VQA = Task(
    name="vqa", family="downstream", row_types=("vqa",), build=build, texts=texts, ask=ask, text_is="the question",
    columns={"id": 0, "image_id": 1, "text": 2, "answers": 3, "objects": 4, "image": 5}, width=6, candidates="file",
    settings={"image_size": 480, "task.prompt": "prev_output", "task.objects": True},
    decoding=Decoding(candidates=True, beams=5, max_len=30, normalize=False),
    metric=scoring.SOFT_ACCURACY, judge=scoring.judge_vqa, constant=scoring.constant_vqa, kind=scoring.question_type,
    hand_in=scoring.hand_in_vqa,
)  # fmt: skip

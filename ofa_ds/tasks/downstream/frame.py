"""How a downstream example is put together: source, decoder prompt, answer, and what may come where.

See docs/downstream.md, Decoder prompt.

Legend: T source tokens, P prompt tokens, A answer tokens.

    prompt   none: nothing;  src: source eos;  prev_output: source
    prev     bos prompt answer             target   pad x P, answer eos
    without eos (a label, GLUE):
    prev     bos prompt answer[:-1]        target   pad x P, answer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ofa_ds.data import image as pictures
from ofa_ds.data.example import Example
from ofa_ds.tasks.context import Context, Row
from ofa_ds.terms import NUM_SPECIAL_IDS, PAD_ID


def downstream_frame(
    row: Row, ctx: Context, source_text: str, answer_text: str,
    *, source: Sequence[int] | None = None, answer: Sequence[int] | None = None, ends: bool = True,
    rng: np.random.Generator | None = None, **fields: Any,
) -> Example:  # fmt: skip
    """The example of a downstream row; the task is not yet named.

    source, answer: ids; those of the texts where not given. What is longer than the model's positions is cut, the
    source first, and `cut` says so; image codes (`code=True`) have positions of their own. rng: of the decoder noise of
    training; none where not given. Raises ValueError for image codes behind a decoder prompt.
    """
    vocab, options, code = ctx.vocab, ctx.config.task, fields.get("code", False)
    if code and options.prompt != "none":
        raise ValueError(f"data.task.prompt={options.prompt}: image codes come right after bos; want none")
    source = vocab.encode(source_text, ctx.max_positions) if source is None else source
    answer = list(vocab.encode(answer_text, ctx.max_positions) if answer is None else answer)
    answer_room = len(answer) if code else max(ctx.max_positions - 1, 0)
    source_room = ctx.max_positions - 2 - (len(answer[:answer_room]) if options.prompt != "none" else 0)
    cut = len(source) > max(source_room, 0) or len(answer) > answer_room
    source, answer = list(source[: max(source_room, 0)]), answer[:answer_room]
    prompt = {"none": [], "src": [*source, vocab.eos], "prev_output": source}[options.prompt]
    last = [vocab.eos] if ends else []
    told = _noisy(answer, ctx, rng) if rng is not None and ctx.train and options.decoder_noise else answer
    allowed: tuple[np.ndarray, ...] = ()
    if ctx.candidates is not None and options.constrained:
        allowed = (*[_NO_IDS] * len(prompt), *ctx.candidates.allowed(answer))
    return Example(
        task="", source_text=source_text, target_text=answer_text, row_id=row["id"], row_type=row.get("type", ""),
        image_id=row.get("image_id", ""), references=tuple(row.get("answers", ())), region=row.get("box"),
        picture_size=(row.get("width", 0), row.get("height", 0)), source=np.array([vocab.bos, *source, vocab.eos]),
        prompt=np.array(prompt, np.int64), target=np.array([*[PAD_ID] * len(prompt), *answer, *last], np.int64),
        prev=np.array([vocab.bos, *prompt, *told][: len(prompt) + len(answer) + len(last)], np.int64),
        allowed=allowed, cut=fields.pop("cut", False) or cut, **fields,
    )  # fmt: skip


def picture_of(row: Row, ctx: Context) -> np.ndarray | None:
    """uint8 [S, S, 3], S = data.image_size, whatever the ratio of the sides was; None where the row has no picture."""
    return seen_by_the_network(pictures.load(row["image"], ctx.config.decode), ctx) if row["image"] else None


def seen_by_the_network(picture_HW3: pictures.Picture, ctx: Context) -> np.ndarray:
    """The whole picture, squashed to data.image_size (docs/downstream.md, Pictures)."""
    return pictures.resize(picture_HW3, ctx.config.image_size, ctx.config.image_size)


def asked_row(picture_HW3: pictures.Picture | None, text: str, text_pair: str = "") -> Row:
    """What a user asks, as a row without an answer."""
    height, width = (0, 0) if picture_HW3 is None else picture_HW3.shape[:2]
    return {"id": "", "text": text, "text_pair": text_pair, "width": width, "height": height, "answers": []}


def asked_sentences(text: str, count: int) -> tuple[str, str]:
    """The one or two sentences of --text, a tab between; "" for the second of one.

    Raises ValueError for another number, or an empty one.
    """
    parts = [part.strip() for part in text.split("\t")]
    if len(parts) != count or not all(parts):
        want = "one sentence, without a tab" if count == 1 else "two sentences with a tab between, such as $'A\\tB'"
        raise ValueError(f"--text: want {want}, got {text[:60]!r}")
    return parts[0], parts[1] if count == 2 else ""


def best_answer(row: Row) -> tuple[str, float] | None:
    """The answer of highest confidence with it, the first of equals; None where the row has none."""
    return max(row["answers"], key=lambda answer: answer[1], default=None)


def _noisy(answer: Sequence[int], ctx: Context, rng: np.random.Generator) -> list[int]:
    """The answer, each token replaced by a random one of the text (<mask> is one too) at the rate decoder_noise."""
    replaced = rng.random(len(answer)) < ctx.config.task.decoder_noise
    drawn = rng.integers(NUM_SPECIAL_IDS, ctx.vocab.code_start, len(answer))
    return np.where(replaced, drawn, np.array(answer, np.int64)).tolist()


_NO_IDS = np.empty(0, np.int64)

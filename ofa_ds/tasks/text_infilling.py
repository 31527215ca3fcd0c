"""Text infilling: a text with words masked in, the whole text out."""

from __future__ import annotations

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.tasks.context import Context, Row, frame, question
from ofa_ds.tasks.noising import mask_spans

PROMPT = ' what is the complete text of "', ' "?'


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """Of a text of up to twice the limit the end, of a longer one the second half of what twice the limit holds."""
    vocab, wanted = ctx.vocab, ctx.config.max_text_tokens
    before, after = (vocab.encode(part) for part in PROMPT)
    room = max(ctx.max_positions - 2 - len(before) - len(after), 1)
    limit = min(wanted, room)
    found = vocab.encode(" " + row["text"].strip().lower(), 2 * wanted)
    ids = found[: 2 * limit][-limit:]
    tokens = np.array([vocab.bos, *ids, vocab.eos])
    noised = mask_spans(tokens, vocab.word_starts[tokens], vocab.mask, rng)[1:-1].tolist()
    cut = len(ids) < min(len(found), wanted) or len(noised) > room  # masks that are put in make a text longer
    noised = noised[:room]
    texts = (f"{PROMPT[0]}{vocab.decode(noised)}{PROMPT[1]}", vocab.decode(ids)) if ctx.readable else ("", "")
    conf = ctx.config.extra_confidence
    return frame(row, ctx, *texts, source=before + noised + after, target=ids, conf=conf, cut=cut)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    """text: <mask> stands for what is missing."""
    vocab, most = ctx.vocab, ctx.max_positions
    pieces = f" {text.strip().lower()}".replace(" <mask>", "<mask>").split("<mask>")
    before, after = (vocab.encode(part) for part in PROMPT)
    masked: list[int] = []
    for number, piece in enumerate(pieces[:most]):
        masked += [vocab.mask] * bool(number) + vocab.encode(piece, most)
    return question(ctx, f"{PROMPT[0]} {text}{PROMPT[1]}", before + masked + after)


def texts(row: Row) -> list[str]:
    return [PROMPT[0], f" {row['text'].strip().lower()}", PROMPT[1]]

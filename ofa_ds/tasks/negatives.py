"""Wrong captions and wrong answers for image-text matching (docs/ofa.md, Tasks: negatives).

Unlike the original's, a negative never reads the same as the positive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ofa_ds.data.text import clean_caption

if TYPE_CHECKING:
    from ofa_ds.data.shards import Negatives

SWAP_OBJECT_ABOVE = 0.6
SAME_TYPE_MARGIN = 0.1
COUNT_OFF_BY_ONE_ABOVE = 0.5
COUNT_TYPE = "how many"


def negative_caption(
    caption: str, objects: Sequence[str], negatives: Negatives, rng: np.random.Generator, max_words: int
) -> str:
    """The caption with one of its objects exchanged (0.4 of those that have objects), or another caption; cleaned.

    An exchange that changes nothing (the word is not literally there, because of case or plural) gives way to another
    caption. Raises ValueError where no caption differs.
    """
    positive = clean_caption(caption, max_words)
    if rng.random() > SWAP_OBJECT_ABOVE and objects and negatives.objects:
        there = objects[rng.integers(len(objects))]
        swapped = clean_caption(caption.replace(there, _draw_other(negatives.objects, there, rng)), max_words)
        if swapped != positive:
            return swapped
    other = _scan_other(negatives.captions, positive, lambda text: clean_caption(text, max_words), rng)
    if other is None:
        raise ValueError(
            f"no negative caption differs from {positive!r}: build the shards with --negatives DIR, whose "
            "all_captions.txt has at least two captions"
        )
    return clean_caption(other, max_words)


def negative_answer(
    answer: str, conf: float, negatives: Negatives, answer_types: Mapping[str, str], rng: np.random.Generator
) -> str:
    """A wrong answer, often of the right one's type: the surer the annotators, the more often.

    answer_types: type of each known answer, as in `Context.answer_types`.
    """
    u = rng.random()
    kind = answer_types.get(answer, "other") if conf > u + SAME_TYPE_MARGIN else "other"
    if kind == COUNT_TYPE and answer.isdecimal() and u > COUNT_OFF_BY_ONE_ABOVE:
        step = 1 if rng.random() < 0.5 else -1
        return str(int(answer) + (step if int(answer) else 1))  # the original makes -1 of 0
    drawn = _draw_other(negatives.type2ans.get(kind, ()), answer, rng)
    if drawn is not None and _plain(drawn) != _plain(answer):
        return drawn
    everything = [text for answers in negatives.type2ans.values() for text in answers]
    drawn = _scan_other(everything, _plain(answer), _plain, rng)
    if drawn is None:
        raise ValueError(
            f"no negative answer differs from {answer!r}: build the shards with --negatives DIR, whose type2ans.json "
            "has at least two answers"
        )
    return drawn


def _plain(text: str) -> str:
    return text.strip().lower()


def _draw_other(options: Sequence[str], value: str, rng: np.random.Generator) -> str | None:
    """Uniform over all but the last; the last where `value` was drawn. None where there are no options."""
    if not options:
        return None
    drawn = options[rng.integers(max(len(options) - 1, 1))]
    return options[-1] if drawn == value else drawn


def _scan_other(
    options: Sequence[str], value: str, clean: Callable[[str], str], rng: np.random.Generator
) -> str | None:
    """The first option from a random one on that does not clean to `value`."""
    if not options:
        return None
    start = int(rng.integers(len(options)))
    return next(
        (
            options[(start + i) % len(options)]
            for i in range(len(options))
            if clean(options[(start + i) % len(options)]) != value
        ),
        None,
    )

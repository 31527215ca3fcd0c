"""Cleaning of captions and questions before they are tokenised (docs/ofa.md, Data: text cleaning)."""

from __future__ import annotations

import re
from collections.abc import Callable

LEADING_PUNCTUATION = ",.!?*#:;~"
CHARACTERS_A_WORD = 16
"""More than the average of any language that separates words by spaces."""
_SPACES = re.compile(r"\s{2,}")


def clean_question(text: str, max_words: int | None = None) -> str:
    """Lower case, no leading punctuation, `-` and `/` as spaces, spaces run together; at most `max_words` words."""
    return _first_words(_clean, text, max_words)


def clean_caption(text: str, max_words: int | None = None) -> str:
    """As `clean_question`, and `<person>` (which stands for a name in Conceptual Captions) becomes `person`."""
    return _first_words(lambda part: _clean(part).replace("<person>", "person"), text, max_words)


def _first_words(clean: Callable[[str], str], text: str, max_words: int | None) -> str:
    """The first words of clean(text). Of a long text no more is cleaned than they need."""
    if max_words is None:
        return clean(text)
    end = CHARACTERS_A_WORD * max_words
    while end < len(text):
        words = clean(text[:end]).split(" ")
        if len(words) > max_words:  # the last one may be cut, and is not taken
            return " ".join(words[:max_words])
        end *= 2
    return " ".join(clean(text).split(" ")[:max_words])


def clean_chinese(text: str, max_characters: int | None = None) -> str:
    """As `clean_caption` for text without spaces between words: the limit counts characters."""
    return _clean(text).replace("<person>", "person")[:max_characters]


def _clean(text: str) -> str:
    text = text.lower().lstrip(LEADING_PUNCTUATION).replace("-", " ").replace("/", " ")
    return _SPACES.sub(" ", text).rstrip("\n").strip(" ")

"""Cleaning of captions and questions before they are tokenised (docs/ofa.md, Data: text cleaning)."""

from __future__ import annotations

import re

LEADING_PUNCTUATION = ",.!?*#:;~"
_SPACES = re.compile(r"\s{2,}")


def clean_question(text: str, max_words: int | None = None) -> str:
    """Lower case, no leading punctuation, `-` and `/` as spaces, spaces run together; at most `max_words` words."""
    words = _clean(text).split(" ")
    return " ".join(words[:max_words])


def clean_caption(text: str, max_words: int | None = None) -> str:
    """As `clean_question`, and `<person>` (which stands for a name in Conceptual Captions) becomes `person`."""
    words = _clean(text).replace("<person>", "person").split(" ")
    return " ".join(words[:max_words])


def clean_chinese(text: str, max_characters: int | None = None) -> str:
    """As `clean_caption` for text without spaces between words: the limit counts characters."""
    return _clean(text).replace("<person>", "person")[:max_characters]


def _clean(text: str) -> str:
    text = text.lower().lstrip(LEADING_PUNCTUATION).replace("-", " ").replace("/", " ")
    return _SPACES.sub(" ", text).rstrip("\n").strip(" ")

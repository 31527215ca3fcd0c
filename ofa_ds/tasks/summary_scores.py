"""What a summary is worth: Gigaword's post-processing, and ROUGE (docs/downstream.md, Scores)."""

from __future__ import annotations

import string
from collections.abc import Sequence

ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
"""Name in `rouge_score` -> our own."""

_ESCAPES = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "[UNK]": "UNK",
    "&": "&amp;", "<": "&lt;", ">": "&gt;",
}  # fmt: skip
_ENDINGS = ("s", "d", "ll")


def summary_text(generated: str) -> str:
    """A generated text as it is handed in and scored: in Gigaword's spelling, a digit 1 as #."""
    return gigaword_spelling(generated.lower().strip()).replace("1", "#")


def gigaword_spelling(text: str) -> str:
    """The tokens of a text as the data set writes them: brackets, quotes, n't, 's, 3,000, 3.03, well-known.

    Initials are joined whole, U . S . A . as U.S.A.; the original leaves their last dots behind.
    """
    given, out = text.split(), _Words()
    place = 0
    while place < len(given):
        place += out.take(given, place)
    return " ".join(out.words)


class _Words:
    """The words so far, and which quotes and dashes are open."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.in_quotes = self.in_single_quotes = self.after_dash = False

    def take(self, given: Sequence[str], place: int) -> int:
        """Takes what stands at `place`; returns how many tokens that were."""
        word, following = given[place], list(given[place + 1 : place + 3])
        after_dash, self.after_dash = self.after_dash, False
        last = self.words[-1] if self.words else ""
        if word in _ESCAPES:
            return self._add(_ESCAPES[word])
        if word == '"':
            self.in_quotes = not self.in_quotes
            return self._add("``" if self.in_quotes else "''")
        if word == "'":
            return self._apostrophe(last, following)
        if word == "." and following == [".", "."]:
            return self._add("...", 3)
        if word == "," and _is_number(last) and following and _is_number(following[0]):
            return self._join("," + following[0], 2)
        if word == "." and last.isdigit() and following and following[0].isdigit():
            return self._join("." + following[0], 2)
        if word == "." and _is_initial(last) and (joined := _initials(given, place + 1)):
            return self._join("." + joined, 1 + len(joined))
        if word == "-":
            return self._dash(place, last, following)
        if after_dash and self.words and word[0] not in string.punctuation:
            return self._join(word)
        return self._add(word)

    def _add(self, word: str, taken: int = 1) -> int:
        self.words.append(word)
        return taken

    def _join(self, more: str, taken: int = 1) -> int:
        self.words[-1] += more
        return taken

    def _apostrophe(self, last: str, following: Sequence[str]) -> int:
        if last.endswith("n") and following[:1] == ["t"]:
            self.words[-1] = last[:-1]
            return self._add("n't", 2)
        if following and following[0] in _ENDINGS:
            return self._add(f"'{following[0]}", 2)
        self.in_single_quotes = not self.in_single_quotes
        return self._add("`" if self.in_single_quotes else "'")

    def _dash(self, place: int, last: str, following: Sequence[str]) -> int:
        if following[:1] == ["-"]:
            return self._add("--", 2)
        if place and following and last not in string.punctuation and following[0][0] not in string.punctuation:
            self.after_dash = True
            return self._join("-")
        return self._add("-")


def _is_number(word: str) -> bool:
    return all(character.isdigit() or character == "," for character in word) and bool(word)


def _is_initial(word: str) -> bool:
    return len(word) == 1 and word.isupper()


def _initials(given: Sequence[str], place: int) -> str:
    """`N.` of N . , `S.A.` of S . A . , as many as come."""
    found = ""
    while place + 1 < len(given) and _is_initial(given[place]) and given[place + 1] == ".":
        found += given[place] + "."
        place += 2
    return found


def rouge_scores(
    references: Sequence[Sequence[str]], texts: Sequence[str], *, characters: bool = False
) -> dict[str, float | None]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with Porter's stems, 0 ... 1; of the best reference where there are more.

    characters: compare those in place of words, for Chinese. All None without `rouge_score`, or without texts.
    """
    scorer = _scorer(characters)
    if scorer is None or not texts:
        return dict.fromkeys(ROUGE.values())
    found = [scorer.score_multi(list(right) or [""], text) for right, text in zip(references, texts, strict=True)]
    return {ours: sum(each[name].fmeasure for each in found) / len(found) for name, ours in ROUGE.items()}


def _scorer(characters: bool):
    try:
        from rouge_score import rouge_scorer, tokenizers
    except ImportError:
        return None

    class Characters(tokenizers.Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return [character for character in text.lower() if character.isalnum()]

    tokenizer = Characters() if characters else None
    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=not characters, tokenizer=tokenizer)

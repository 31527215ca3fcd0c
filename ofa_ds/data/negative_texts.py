"""What wrong captions and answers are drawn from where no negatives are given: texts of vision-language rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_DERIVED = 1_000_000
"""Texts of a kind that are kept: the first ones."""

KINDS = ("captions", "objects", "answers")


class NegativeTexts:
    """Captions, object words and answers, in order, each once."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, None]] = {kind: {} for kind in KINDS}

    def add(self, row: Mapping[str, Any]) -> None:
        """row: of the vision-language family, its picture not looked at."""
        if row["type"] == "caption":
            self._keep("captions", [row["caption"]])
        self._keep("objects", row["gt_objects"])
        self._keep("answers", [text for text, _ in row["answers"]])

    def _keep(self, kind: str, texts: Iterable[str]) -> None:
        found = self.kinds[kind]
        for text in texts:
            if len(found) < MAX_DERIVED and text.strip():
                found[" ".join(text.split())] = None

    def write(self, path: Path) -> None:
        """A line of JSON for each text, in order."""
        with path.open("w", encoding="utf-8") as file:
            for kind, texts in self.kinds.items():
                file.writelines(json.dumps([kind, text]) + "\n" for text in texts)

    def add_file(self, path: Path) -> None:
        """What `write` wrote, after what is here."""
        with path.open(encoding="utf-8") as file:
            for line in file:
                kind, text = json.loads(line)
                self._keep(kind, [text])

    def type2ans(self) -> dict[str, list[str]]:
        """Answer type -> answers of it, as OFA's file has them; what is of no type known is "other"."""
        answers = self.kinds["answers"]
        numbers = [answer for answer in answers if answer.isdecimal()]
        polar = [answer for answer in ("yes", "no") if answer in answers]
        types = {kind: texts for kind, texts in (("how many", numbers), ("yes/no", polar)) if texts}
        known = {answer for texts in types.values() for answer in texts}
        return types | {"other": [text for text in answers if text not in known]}

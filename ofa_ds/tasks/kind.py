"""What a task is: one value that says where its rows come from, how it is asked, answered, judged and shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.tasks import judges
from ofa_ds.tasks.context import Context, Row
from ofa_ds.terms import GROUP_OF

Build = Callable[[Row, Framed | None, np.random.Generator, Context], Example]
BuildHeldOut = Callable[[Row, Framed | None, np.random.Generator, Context], list[Example]]
Ask = Callable[[Context, Picture | None, str], Example]
Judge = Callable[[Context, Sequence[Example], judges.Answers], judges.Scores]
HandIn = Callable[[Context, Sequence[Example], judges.Answers], list[Any]]

SHORT_ANSWER_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a downstream task is answered; names are those of `GenerationConfig`."""

    candidates: bool = False
    """Score every candidate of the list and take the best, where there is a list; else search with beams."""
    beams: int = 1
    min_len: int = 1
    max_len: int = 200
    """Tokens of an answer without eos."""
    no_repeat_ngram: int = 0
    len_penalty: float = 1.0
    normalize: bool = True
    bins_only: bool = False
    """Nothing but coordinate bins may come."""
    codes: bool = False
    """Nothing but image codes may come, as many as the picture has (data.code_image_size)."""
    top_k: int = 0
    """Drawn among that many most probable tokens, `beams` times, in place of a search; 0: a search."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """From a row to an example, from an example to a question, from an answer to a score and a picture."""

    name: str
    """One of terms.TASKS."""
    family: str
    """Of the rows that give it: one of terms.FAMILIES."""
    row_types: tuple[str, ...] = ()
    """Of these types; all rows of the family where empty."""
    build: Build
    """(row, its picture where the family has one view for all tasks, generator, context) -> the training example."""
    held_out: BuildHeldOut | None = None
    """The examples of a held-out row, where not the one that `build` makes; a generator of its own draws for it."""
    texts: Callable[[Row], list[str]]
    """Every text of a row as the task presents it: what a vocabulary is trained on."""

    ask: Ask
    """(context, picture of any size, --text) -> the example without its answer, worded as in training.

    Raises ValueError for a text that cannot be asked.
    """
    needs_picture: bool = True
    text_is: str = ""
    """What --text holds, where the task needs it."""
    answer_tokens: Callable[[Context], int] = lambda ctx: SHORT_ANSWER_TOKENS
    """Where an answer to a user is cut off."""

    judge: Judge | None = None
    """Scores of generated answers; without it the task has its token accuracy."""
    judge_slowly: Judge | None = None
    """Further scores, which other programs take their time for: told by `ofa-ds evaluate`, not while training."""
    constant: Callable[[Sequence[Example]], judges.Scores] = lambda asked: {}
    """Scores of the constant answer that is best in hindsight, under the names that `judge` gives."""
    kind: Callable[[Example], str] | None = None
    """The kind of question, where the exact match of each is told apart."""
    shows: Literal["text", "boxes", "region"] = "text"
    """Whether boxes that a picture shows are the answer, or the region that is the question."""

    columns: Mapping[str, int] = field(default_factory=dict)
    """Downstream: which column of the original's TSV holds what: names of `ofa_ds.data.task_rows.READERS` -> place."""
    width: int = 0
    """Downstream: columns of such a line."""
    other_columns: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    """Downstream: of files with another number of columns, which the original knows too."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Downstream: what stands in the file -> the answer."""
    candidates: Literal["none", "labels", "file"] = "none"
    """Downstream: where the list of possible answers comes from."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Downstream: what its recipes say in [data] where that is not the default: key, as in data.KEY=VALUE -> value."""
    ends: bool = True
    """Downstream: an answer ends in eos."""
    decoding: Decoding = Decoding()
    metric: str = ""
    """Downstream: the score by which the best checkpoint is chosen; higher is better."""
    hand_in: HandIn | None = None
    """Downstream: (context, examples, answers) -> the records that `ofa-ds predict` writes, one for each."""
    hand_in_format: Literal["json", "tsv", "lines"] = "json"
    """Downstream: a JSON list, a table with a head, or a line each."""

    @property
    def group(self) -> str:
        """Whose token count divides the loss: one of terms.GROUPS."""
        return GROUP_OF[self.name]

    def is_made_of(self, family: str, row_type: str) -> bool:
        return self.family == family and (not self.row_types or row_type in self.row_types)

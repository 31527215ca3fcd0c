"""GLUE: is a sentence, or a pair, this or that? The answer is one label word without eos (docs/downstream.md)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.tasks.context import Context, Row
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import asked_row, asked_sentences, best_answer, downstream_frame
from ofa_ds.tasks.kind import Decoding, Judge, Task

NO_YES = {"0": "no", "1": "yes"}
ZERO_ONE = {"no": "0", "yes": "1"}
ENTAILS = {"no": "not_entailment", "yes": "entailment"}


def _asked(row: Row, instruction: str, max_words: int | None = None) -> str:
    return instruction.format(*(_sentence(row[column], max_words) for column in ("text", "text_pair")))


def _sentence(text: str, max_words: int | None) -> str:
    return " ".join(text.lower().split()[:max_words])


def _task(
    name: str, instruction: str, columns: Mapping[str, int], width: int, labels: Mapping[str, str],
    hand_in: Mapping[str, str], judge: Judge = scoring.judge_label, metric: str = scoring.ACCURACY,
) -> Task:  # fmt: skip
    """hand_in: answer -> what GLUE calls it."""

    def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
        source, best = _asked(row, instruction, ctx.config.max_source_words), best_answer(row)
        if best is None:
            return downstream_frame(row, ctx, source, "", answer=(), ends=False)
        return downstream_frame(row, ctx, source, f" {best[0]}", ends=False, rng=rng)

    def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
        first, second = asked_sentences(text, 2 if "text_pair" in columns else 1)
        source = _asked(asked_row(None, first, second), instruction, ctx.config.max_source_words)
        return downstream_frame(asked_row(None, first, second), ctx, source, "", answer=(), ends=False)

    def texts(row: Row) -> list[str]:
        return [_asked(row, instruction), *(f" {answer}" for answer, _ in row["answers"])]

    return Task(
        name=name, family="downstream", row_types=(name,), build=build, texts=texts, ask=ask, needs_picture=False,
        text_is="the sentence" if "text_pair" not in columns else "both sentences with a tab between",
        columns=columns, width=width, labels=labels, candidates="labels", ends=False,
        settings={"max_source_words": 512, "task.prompt": "src"},
        decoding=Decoding(candidates=True), metric=metric, judge=judge, constant=scoring.constant_label,
        hand_in=scoring.hand_in_label(hand_in), hand_in_format="tsv",
    )  # fmt: skip


COLA = _task(
    "cola", ' is the text " {} " grammatically correct?', {"text": 1, "label": 2}, 3, NO_YES, ZERO_ONE,
    scoring.judge_cola, scoring.MATTHEWS,
)  # fmt: skip
MNLI = _task(
    "mnli", ' can text1 " {} " imply text2 " {} "?', {"text": 0, "text_pair": 1, "label": 2}, 3,
    {"0": "maybe", "1": "yes", "2": "no"}, {"maybe": "neutral", "yes": "entailment", "no": "contradiction"},
)  # fmt: skip
MRPC = _task(
    "mrpc", ' does text1 " {} " and text2 " {} " have the same semantics?', {"text": 0, "text_pair": 1, "label": 2}, 3,
    NO_YES, ZERO_ONE, scoring.judge_paraphrase,
)  # fmt: skip
QNLI = _task(
    "qnli", ' does " {1} " contain the answer to question " {0} "?', {"id": 0, "text": 1, "text_pair": 2, "label": 3},
    4, NO_YES | {"not_entailment": "no", "entailment": "yes"}, ENTAILS,
)  # fmt: skip
QQP = _task(
    "qqp", ' is question " {} " and question " {} " equivalent?', {"id": 0, "text": 3, "text_pair": 4, "label": 5}, 6,
    NO_YES, ZERO_ONE, scoring.judge_paraphrase,
)  # fmt: skip
RTE = _task(
    "rte", ' can text1 " {} " imply text2 " {} "?', {"id": 0, "text": 1, "text_pair": 2, "label": 3}, 4,
    {"not_entailment": "no", "entailment": "yes"}, ENTAILS,
)  # fmt: skip
SST2 = _task(
    "sst2", ' is the sentiment of text " {} " positive or negative?', {"text": 0, "label": 1}, 2,
    {"0": "negative", "1": "positive"}, {"negative": "0", "positive": "1"},
)  # fmt: skip

TASKS = (COLA, MNLI, MRPC, QNLI, QQP, RTE, SST2)

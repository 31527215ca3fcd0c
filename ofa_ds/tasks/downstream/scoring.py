"""How downstream tasks are judged and handed in: functions for the values of the tasks (docs/downstream.md, Scores).

A judge takes generated ids without bos, decoder prompt and eos, and gives scores; a hand-in gives one record for each,
as the task's leaderboard takes it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.vocab import Vocab
from ofa_ds.tasks import caption_scores, judges, label_scores, summary_scores
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.kind import HandIn
from ofa_ds.terms import UNK_ID

SOFT_ACCURACY, ACCURACY, MATTHEWS, F1 = "soft accuracy", "accuracy", "Matthews", "F1"
ACC_IOU = "acc@IoU0.5"
ROUGE_L = "ROUGE-L"
NO_BOX = (0.0, 0.0, 0.0, 0.0)
"""Handed in for an answer that is no box."""


def text_of(vocab: Vocab, ids: Sequence[int]) -> str:
    """A generated text with <unk> where the original has it: close to what stands around it."""
    if vocab.kind != "bpe":
        return vocab.decode(ids)
    runs = groupby(ids, key=lambda token: int(token) == UNK_ID)
    return "".join("<unk>" * len(list(run)) if unk else vocab.decode(run) for unk, run in runs)


def texts_of(ctx: Context, answers: judges.Answers) -> list[str]:
    return [text_of(ctx.vocab, ids).strip() for ids in answers]


def number_or_text(name: str) -> int | str:
    """An id as leaderboards want it: a whole number where it reads as one."""
    return int(name) if name.isascii() and name.isdigit() and str(int(name)) == name else name


# Captions


def caption_of(vocab: Vocab, ids: Sequence[int]) -> str:
    return caption_scores.bare(text_of(vocab, ids))


def judge_caption(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    """BLEU, ROUGE-L and CIDEr, all references without punctuation, as the hand-in is."""
    references = _captions(asked)
    return caption_scores.caption_scores(references, _generated_captions(ctx, answers), _split(references))


def judge_caption_slowly(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    references = _captions(asked)
    return caption_scores.slow_caption_scores(references, _generated_captions(ctx, answers), _split(references))


def constant_caption(asked: Sequence[Example]) -> judges.Scores:
    references = _captions(asked)
    best = caption_scores.constant_caption(references)
    return caption_scores.caption_scores(references, [best] * len(references), _split(references))


def hand_in_caption(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> list[Any]:
    """COCO's results: [{"image_id", "caption"}]."""
    texts = _generated_captions(ctx, answers)
    ids = [number_or_text(example.image_id or example.row_id) for example in asked]
    return [{"image_id": name, "caption": text} for name, text in zip(ids, texts, strict=True)]


def _generated_captions(ctx: Context, answers: judges.Answers) -> list[str]:
    return [caption_of(ctx.vocab, ids) for ids in answers]


def _captions(asked: Sequence[Example]) -> list[list[str]]:
    return [[caption_scores.bare(text) for text, _ in example.references] for example in asked]


def _split(references: Sequence[Sequence[str]]) -> caption_scores.Split:
    return caption_scores.character_split if _are_chinese(references) else caption_scores.coco_split


def _are_chinese(references: Sequence[Sequence[str]]) -> bool:
    """Texts that nothing splits into words: they are compared by character."""
    return any("\u4e00" <= character <= "\u9fff" for each in references for text in each for character in text)


# Questions


def judge_vqa(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    return {SOFT_ACCURACY: judges.mean(soft_hits(ctx, asked, answers))}


def soft_hits(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> list[float]:
    """Of each answer the confidence that it has among the references."""
    return label_scores.soft([dict(example.references) for example in asked], texts_of(ctx, answers))


def question_type(example: Example) -> str:
    return judges.question_type(example.source_text)


def constant_vqa(asked: Sequence[Example]) -> judges.Scores:
    """The best constant answer of each question type."""
    worth = soft_constant(asked, judges.merged_types([question_type(example) for example in asked]))
    return {SOFT_ACCURACY: worth}


def soft_constant(asked: Sequence[Example], types: Sequence[str] | None = None) -> float | None:
    """Mean confidence of the constant answer that is best in hindsight for each type (for all, without types)."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for example, kind in zip(asked, types or [""] * len(asked), strict=True):
        for answer, confidence in dict(example.references).items():
            sums[kind][answer] += confidence
    best = sum(max(each.values(), default=0.0) for each in sums.values())
    return best / len(asked) if asked else None


def hand_in_vqa(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> list[Any]:
    """EvalAI's results: [{"question_id", "answer"}]."""
    texts = texts_of(ctx, answers)
    return [{"question_id": number_or_text(e.row_id), "answer": text} for e, text in zip(asked, texts, strict=True)]


# Boxes


def box_of(ctx: Context, example: Example, ids: Sequence[int]) -> np.ndarray | None:
    """float32 [4]: x0, y0, x1, y1 in pixels of the stored picture; None for what is not exactly four bins.

    In the original's order of operations, and its precision.
    """
    vocab = ctx.vocab
    if len(ids) != 4 or not all(vocab.is_bin(int(token)) for token in ids):
        return None
    ratios = np.float32([ctx.config.image_size / pixels for pixels in example.picture_size])
    bins = np.float32([int(token) - vocab.bin_start for token in ids])
    seen = bins / np.float32(vocab.num_bins - 1) * np.float32(ctx.config.max_image_size)
    return seen / np.tile(ratios, 2)


def judge_box(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    """Share of boxes that overlap the right one, in pixels of the stored picture."""
    return {ACC_IOU: judges.mean([_hit(ctx, e, ids) for e, ids in zip(asked, answers, strict=True)])}


def _hit(ctx: Context, example: Example, ids: Sequence[int]) -> float:
    box = box_of(ctx, example, ids)
    return judges.found([example.region], [None if box is None else tuple(box.tolist())])[0]


def constant_box(asked: Sequence[Example]) -> judges.Scores:
    """The box that overlaps most of the right ones, each brought to a picture of one size."""
    sizes = [np.tile(np.maximum(example.picture_size, 1), 2) for example in asked]
    boxes = [tuple(np.array(e.region) / size) for e, size in zip(asked, sizes, strict=True) if e.region is not None]
    return {ACC_IOU: judges.constant_box_share(boxes)} if boxes else {}


def hand_in_box(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> list[Any]:
    """[{"uniq_id", "box": x0, y0, x1, y1 in pixels of the stored picture}]."""
    boxes = [box_of(ctx, example, ids) for example, ids in zip(asked, answers, strict=True)]
    plain = [list(NO_BOX) if box is None else box.tolist() for box in boxes]
    return [{"uniq_id": example.row_id, "box": box} for example, box in zip(asked, plain, strict=True)]


# One of a few labels


def judge_label(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    return {ACCURACY: label_scores.share(labels_of(asked), texts_of(ctx, answers))}


def judge_cola(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    expected, given = labels_of(asked), texts_of(ctx, answers)
    return {MATTHEWS: label_scores.matthews(expected, given), ACCURACY: label_scores.share(expected, given)}


def judge_paraphrase(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    """MRPC and QQP."""
    expected, given = labels_of(asked), texts_of(ctx, answers)
    return {ACCURACY: label_scores.share(expected, given), F1: label_scores.f1(expected, given)}


def labels_of(asked: Sequence[Example]) -> list[str]:
    return [example.references[0][0] if example.references else "" for example in asked]


def constant_label(asked: Sequence[Example]) -> judges.Scores:
    """The most frequent label; F1 of always "yes", and no correlation."""
    expected = labels_of(asked)
    always = label_scores.f1(expected, [label_scores.POSITIVE] * len(expected))
    return {ACCURACY: judges.constant_share(expected), F1: always, MATTHEWS: 0.0}


def hand_in_answer(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> list[Any]:
    """[{"uniq_id", "answer"}]: what the original writes for SNLI-VE and ImageNet."""
    texts = texts_of(ctx, answers)
    return [{"uniq_id": example.row_id, "answer": text} for example, text in zip(asked, texts, strict=True)]


def hand_in_label(names: Mapping[str, str]) -> HandIn:
    """GLUE's: {"index": the row's id, "prediction": label} of each. names: answer -> GLUE's own label."""

    def hand_in(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> list[Any]:
        texts = texts_of(ctx, answers)
        if unknown := sorted(set(texts) - set(names)):
            raise ValueError(f"the model answers {unknown[0]!r}, which is none of {', '.join(names)}")
        ids = [number_or_text(example.row_id) for example in asked]
        return [{"index": name, "prediction": names[text]} for name, text in zip(ids, texts, strict=True)]

    return hand_in


# Summaries


def judge_summary(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    texts = [summary_scores.summary_text(text) for text in texts_of(ctx, answers)]
    references = _summaries(asked)
    return summary_scores.rouge_scores(references, texts, characters=_are_chinese(references))


def constant_summary(asked: Sequence[Example]) -> judges.Scores:
    references = _summaries(asked)
    counts = Counter(text for each in references for text in each)
    best = max(counts, key=counts.__getitem__, default="")
    return summary_scores.rouge_scores(references, [best] * len(references), characters=_are_chinese(references))


def _summaries(asked: Sequence[Example]) -> list[list[str]]:
    return [[text.lower().strip() for text, _ in example.references] for example in asked]


def hand_in_summary(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> list[Any]:
    """A line each."""
    return [" ".join(summary_scores.summary_text(text).split()) for text in texts_of(ctx, answers)]

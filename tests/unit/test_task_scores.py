"""Scores and hand-ins of downstream tasks, checked by property, by hand, or beside the library they stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_ds.config import DataConfig, TaskOptions
from ofa_ds.data.example import Example
from ofa_ds.data.vocab import Vocab, train_vocab
from ofa_ds.tasks import caption_scores, label_scores, summary_scores
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.kind import Task
from ofa_ds.tasks.task import DOWNSTREAM

LABELS = st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1, max_size=40)
CAPTIONS = [
    ["a red circle above a blue square", "a circle"],
    ["two green triangles", "triangles that aren't red"],
    ["a dog's bowl", "the bowl"],
]
needs_java = pytest.mark.skipif(caption_scores._jar() is None, reason="no Java here, or no pycocoevalcap")


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    texts = [" yes no maybe a red circle above blue square two dogs"] * 8
    return train_vocab(texts, 320, tmp_path_factory.mktemp("scores") / "vocab", num_codes=8, num_bins=11)


def context(vocab: Any, language: str = "en", **options: Any) -> Context:
    config = DataConfig(task=TaskOptions(language=language), **options)
    return Context(vocab=vocab, negatives=None, config=config, patch_size=16, max_positions=64, split="heldout")


def asked(*answers: tuple[str, float], **fields: Any) -> Example:
    empty = np.zeros(2, np.int64)
    return Example(task="", source=empty, target=empty, prev=empty, references=answers, **fields)


@given(LABELS)
def test_matthews_is_the_correlation_of_two_rows_of_ones_and_zeros(pairs: list[tuple[str, str]]) -> None:
    expected, answers = zip(*pairs, strict=True)
    rows = np.array([[each == "yes" for each in expected], [each == "yes" for each in answers]], float)
    found = label_scores.matthews(expected, answers)
    if rows.std(1).all():
        assert found == pytest.approx(np.corrcoef(rows)[0, 1], abs=1e-12)
    else:
        assert found == 0


@given(LABELS)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs: list[tuple[str, str]]) -> None:
    hits = pairs.count(("yes", "yes"))
    precision = hits / max(sum(b == "yes" for _, b in pairs), 1)
    recall = hits / max(sum(a == "yes" for a, _ in pairs), 1)
    mean = 2 * precision * recall / (precision + recall) if hits else 0
    assert label_scores.f1(*zip(*pairs, strict=True)) == pytest.approx(mean)


def test_no_answers_have_no_score() -> None:
    assert label_scores.share([], []) is None
    assert set(caption_scores.caption_scores([], []).values()) == {None}
    assert set(summary_scores.rouge_scores([], []).values()) == {None}


@needs_java
def test_words_are_those_of_cocos_own_evaluation() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = ["A man's dog isn't here, is it?", "", '(two) cats -- "both" black...', "café  at 5:30", "can't\ncannot"]
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert caption_scores.coco_split(texts) == [found[i][0] for i in range(len(texts))]


def test_captions_that_are_right_word_by_word_have_the_best_scores() -> None:
    pytest.importorskip("pycocoevalcap", reason="scores of captions need the package pycocoevalcap")
    own = [each[0] for each in CAPTIONS]
    same = caption_scores.caption_scores(CAPTIONS, own, caption_scores.word_split)
    other = caption_scores.caption_scores(CAPTIONS, own[1:] + own[:1], caption_scores.word_split)
    assert same["BLEU-1"] == pytest.approx(1, abs=1e-6) and same["ROUGE-L"] == pytest.approx(1)
    assert all(same[name] > other[name] for name in same)
    assert caption_scores.caption_scores(CAPTIONS[:1], own[:1], caption_scores.word_split)["CIDEr"] is None


@needs_java
def test_meteor_prefers_the_right_caption() -> None:
    own = [each[0] for each in CAPTIONS]
    same = caption_scores.slow_caption_scores(CAPTIONS, own)["METEOR"]
    other = caption_scores.slow_caption_scores(CAPTIONS, own[1:] + own[:1])["METEOR"]
    assert same == pytest.approx(1, abs=0.05) and other < 0.5


def test_chinese_captions_are_compared_by_character() -> None:
    assert caption_scores.character_split(["一只 猫。"]) == ["一 只 猫"]
    right = summary_scores.rouge_scores([["一只猫"]], ["一只狗"], characters=True)
    assert right["ROUGE-1"] == pytest.approx(2 / 3)


def test_chinese_rows_are_judged_and_have_a_constant_by_character(vocab: Vocab) -> None:
    rows = [asked(("一只猫在桌上", 1.0)), asked(("一只狗在桌上", 1.0)), asked(("一只猫在桌上", 1.0))]
    answers = [vocab.encode(row.references[0][0]) for row in rows]
    own, constant = scoring.judge_summary(context(vocab, "zh"), rows, answers), scoring.constant_summary(rows)
    assert own["ROUGE-L"] == 1 and constant["ROUGE-L"] == pytest.approx((1 + 5 / 6 + 1) / 3)
    own, constant = scoring.judge_caption(context(vocab, "zh"), rows, answers), scoring.constant_caption(rows)
    assert own["BLEU-4"] == pytest.approx(1) and 0.3 < constant["BLEU-4"] < 1


def test_the_constant_caption_is_the_most_frequent_one_and_among_equals_of_common_words() -> None:
    assert caption_scores.constant_caption([["A dog", "x"], ["a  dog", "y"]]) == "a dog"
    assert caption_scores.constant_caption([["a cat"], ["zebras run"], ["a dog and a cat"]]) == "a cat"


def test_a_stranger_in_a_text_stands_close_as_in_the_original(vocab: Vocab) -> None:
    ids = [*vocab.encode(" a red"), vocab.unk, vocab.unk, *vocab.encode(" circle")]
    assert scoring.text_of(vocab, ids) == " a red<unk><unk> circle"


@pytest.mark.parametrize("name, id_", [("42", 42), ("042", "042"), ("COCO_42", "COCO_42"), ("", ""), ("²", "²")])
def test_an_id_that_reads_as_a_number_is_handed_in_as_one(name: str, id_: int | str) -> None:
    assert scoring.number_or_text(name) == id_


def test_what_is_handed_in_has_the_fields_of_each_leaderboard(vocab: Vocab) -> None:
    ctx, ids = context(vocab), [vocab.encode(" a red circle")]
    row = asked(row_id="7", image_id="9")
    assert scoring.hand_in_caption(ctx, [row], ids) == [{"image_id": 9, "caption": "a red circle"}]
    assert scoring.hand_in_vqa(ctx, [row], ids) == [{"question_id": 7, "answer": "a red circle"}]
    assert scoring.hand_in_answer(ctx, [row], ids) == [{"uniq_id": "7", "answer": "a red circle"}]
    assert scoring.hand_in_summary(ctx, [row], ids) == ["a red circle"]
    label = scoring.hand_in_label({"yes": "entailment", "no": "not_entailment"})
    assert label(ctx, [row], [vocab.encode(" no")]) == [{"index": 7, "prediction": "not_entailment"}]
    with pytest.raises(ValueError, match="'maybe', which is none of yes, no"):
        label(ctx, [row], [vocab.encode(" maybe")])


def test_a_box_is_told_in_pixels_of_the_stored_picture(vocab: Vocab) -> None:
    ctx = context(vocab, image_size=64, infill_image_size=64, code_image_size=32, max_image_size=100)
    row = asked(row_id="r", image=np.zeros((64, 64, 3), np.uint8), picture_size=(128, 32), region=(0, 0, 100, 25))
    ids = [vocab.bin(k) for k in (0, 0, 5, 5)]
    assert scoring.hand_in_box(ctx, [row], [ids]) == [{"uniq_id": "r", "box": [0, 0, 100, 25]}]
    assert scoring.judge_box(ctx, [row], [ids]) == {"acc@IoU0.5": 1}
    assert scoring.judge_box(ctx, [row], [ids[:3]]) == {"acc@IoU0.5": 0}
    without = dataclasses.replace(row, image=None)  # training lets go of pictures before it judges
    assert scoring.judge_box(ctx, [without], [ids]) == {"acc@IoU0.5": 1}


def test_the_best_constants_are_found_in_hindsight() -> None:
    questions = [asked(("red", 1.0), ("blue", 0.3), source_text=" what color") for _ in range(2)]
    questions.append(asked(("blue", 1.0), source_text=" what color"))
    assert scoring.soft_constant(questions) == pytest.approx(2 / 3)
    labels = [asked(("yes", 1.0))] * 3 + [asked(("no", 1.0))]
    assert scoring.constant_label(labels) == {"accuracy": 0.75, "F1": pytest.approx(6 / 7), "Matthews": 0}
    boxes = [asked(region=(0, 0, w, h), picture_size=(2 * w, h)) for w, h in ((10, 20), (30, 30))]
    boxes.append(asked(region=(9, 9, 10, 10), picture_size=(10, 10)))
    assert scoring.constant_box(boxes) == {"acc@IoU0.5": pytest.approx(2 / 3)}


@given(st.text(alphabet="ab13.,-'\"() ", max_size=40))
def test_a_summary_never_fails_and_only_its_spaces_quotes_and_brackets_change(text: str) -> None:
    spelt = summary_scores.gigaword_spelling(text)
    for theirs, ours in (("``", '"'), ("''", '"'), ("-lrb-", "("), ("-rrb-", ")"), ("`", "'")):
        spelt = spelt.replace(theirs, ours)
    same = str.maketrans("", "", " '\"")
    assert spelt.translate(same) == text.translate(same)


@pytest.mark.parametrize("task", DOWNSTREAM.values(), ids=lambda task: task.name)
def test_every_task_is_scored_by_its_metric_and_handed_in(vocab: Vocab, task: Task) -> None:
    pytest.importorskip("rouge_score", reason="ROUGE needs the package rouge-score")
    sizes = {"image_size": 64, "infill_image_size": 64, "code_image_size": 32, "max_image_size": 512}
    ctx, label = context(vocab, **sizes), next(iter(task.labels.values()), "a red circle")
    picture = np.zeros((64, 64, 3), np.uint8)
    rows = [asked((label, 1.0), row_id=str(k), source_text=" what is", image=picture, picture_size=(64, 64),
                  region=(0.0, 0.0, 50.0, 50.0)) for k in range(3)]  # fmt: skip
    ids = [vocab.bin(k) for k in (0, 0, 1, 1)] if task.shows == "boxes" else vocab.encode(f" {label}")
    ids = rows[0].target[:-1].tolist() if task.decoding.codes else ids
    scores, constant = task.judge(ctx, rows, [ids] * 3), task.constant(rows)
    assert scores[task.metric] is not None and scores[task.metric] >= constant[task.metric]
    assert set(scores) <= set(constant), "a blind baseline beside each score"
    records = task.hand_in(ctx, rows, [ids] * 3)
    kind = str if task.hand_in_format == "lines" else dict
    assert len(records) == 3 and all(isinstance(record, kind) for record in records)
    if task.hand_in_format == "tsv":
        assert [list(each)[-1] for each in records] == ["prediction"] * 3

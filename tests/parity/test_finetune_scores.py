"""Post-processing and metrics of fine-tuning are the original's: the recorded cases of postprocess.json.

Where the original is wrong, ours does what is meant, and the test's name says what is wrong. Cases of image generation
(image_gen_*) are not among them: there is no such task here yet.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ofa_ds.config import DataConfig
from ofa_ds.data.example import Example
from ofa_ds.data.vocab import Vocab, load_vocab, train_vocab
from ofa_ds.tasks import judges, label_scores
from ofa_ds.tasks.caption_scores import bare
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.summary_scores import gigaword_spelling, rouge_scores, summary_text

VOCAB_DIR = Path(__file__).parents[2].parent / "shared" / "vocab"

golden = pytest.mark.golden("finetune/postprocess.json")
needs_vocab = pytest.mark.skipif(not VOCAB_DIR.is_dir(), reason=f"OFA's vocabulary files are not in {VOCAB_DIR}")

INITIALS = re.compile(r"(^| )[A-Z] \. [A-Z] \.( |$)")
BINS = types.SimpleNamespace(kind="bpe", bin_start=58457, num_bins=1000, is_bin=lambda token: 58457 <= token < 59457)
"""What boxes need of OFA's vocabulary."""


@pytest.fixture(scope="module")
def cases(golden_root: Path) -> dict[str, Any]:
    return json.loads((golden_root / "finetune" / "postprocess.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def english() -> Vocab:
    return load_vocab(VOCAB_DIR / "en")


def context(vocab: Any, **options: Any) -> Context:
    config = DataConfig(**options)
    return Context(vocab=vocab, negatives=None, config=config, patch_size=16, max_positions=1024, split="heldout")


def asked(**fields: Any) -> Example:
    empty = np.zeros(2, np.int64)
    return Example(task="", source=empty, target=empty, prev=empty, **fields)


def without_eos(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token != 2]


@golden
def test_gigaword_spelling_is_the_original_one_but_that_initials_are_joined_whole(cases: dict) -> None:
    for case in cases["gigaword_fix_tokenization"]:
        ours = gigaword_spelling(case["in"])
        if ours == case["out"]:
            assert ours.replace("1", "#") == case["evaluation"]
        else:  # the original goes on behind the second initial: U.N. . says
            assert INITIALS.search(case["in"]), case
            assert re.sub(r"[ .]", "", ours) == re.sub(r"[ .]", "", case["out"]), case


@pytest.mark.parametrize(
    "given, ours",
    [("U . N . says", "U.N. says"), ("U . S . A . wins", "U.S.A. wins"), ("the U . N . - led x", "the U.N.-led x")],
)
def test_initials_lose_no_dot_where_the_original_leaves_some_behind(given: str, ours: str) -> None:
    assert gigaword_spelling(given) == ours


@golden
@needs_vocab
def test_generated_summaries_read_as_the_original_ones(cases: dict, english: Vocab) -> None:
    for case in cases["gigaword_evaluation"]:
        text = scoring.text_of(english, without_eos(case["tokens"]))
        assert summary_text(text) == case["hyp"], case


@golden
def test_rouge_is_the_original_one(cases: dict) -> None:
    pytest.importorskip("rouge_score", reason="ROUGE needs the package rouge-score")
    for case in cases["rouge"]:
        found = rouge_scores([[case["ref"]]], [case["hyp"]])
        assert {name: found[ours] for name, ours in zip(("rouge1", "rouge2", "rougeL"), found, strict=True)} == {
            name: pytest.approx(case[name]["f1"], abs=1e-12) for name in ("rouge1", "rouge2", "rougeL")
        }, case


@golden
@needs_vocab
def test_captions_are_handed_in_as_the_original_writes_them(cases: dict, english: Vocab) -> None:
    for case in cases["caption"]:
        example = asked(image_id=case["result"]["image_id"])
        (record,) = scoring.hand_in_caption(context(english), [example], [without_eos(case["tokens"])])
        assert record["caption"] == case["result"]["caption"], case
        assert str(record["image_id"]) == case["result"]["image_id"]


@golden
@needs_vocab
def test_captions_and_references_are_scored_as_the_original_does(cases: dict, english: Vocab) -> None:
    for case in cases["caption_validation"]:
        assert scoring.caption_of(english, without_eos(case["tokens"])) == case["hyp"]
        end = case["target"].index(2)
        assert [bare(text) for text in english.decode(case["target"][:end]).split("&&")] == case["refs"]


@golden
@needs_vocab
def test_an_unknown_token_in_a_caption_is_scored_where_the_original_fails(cases: dict, english: Vocab) -> None:
    example = asked(references=(("a dog", 1.0),))
    tokens = without_eos(cases["caption_validation_unk_error"]["tokens"])
    assert "error" in cases["caption_validation_unk_error"]
    scores = scoring.judge_caption(context(english), [example], [tokens])
    assert set(scores) >= {"BLEU-1", "CIDEr"} and "unk" in scoring.caption_of(english, tokens)


@golden
@needs_vocab
def test_answers_to_questions_score_their_confidence_letter_by_letter(cases: dict, english: Vocab) -> None:
    for case in cases["vqa_beam_search"]:
        prompt = [token for token in case["prefix_tokens"] if token != 1]
        tokens = without_eos(case["tokens"])
        assert tokens[: len(prompt)] == prompt
        example = asked(references=tuple(case["ref_dict"].items()), row_id=str(case["result"]["question_id"]))
        answer = tokens[len(prompt) :]
        assert scoring.soft_hits(context(english), [example], [answer]) == [pytest.approx(case["score"])]
        assert scoring.hand_in_vqa(context(english), [example], [answer]) == [case["result"]]


@golden
@pytest.mark.parametrize("side", [512, 480])
def test_boxes_are_the_original_ones_to_the_last_bit_of_fp32(cases: dict, side: int) -> None:
    ctx = context(BINS, image_size=side, max_image_size=512)
    for case in cases[f"refcoco_S{side}"]:
        picture = np.zeros((side, side, 3), np.uint8)
        example = asked(
            image=picture, picture_size=tuple(case["image_size"]), region=tuple(case["region_coord"]),
            row_id=case["result"]["uniq_id"],
        )  # fmt: skip
        (record,) = scoring.hand_in_box(ctx, [example], [case["tokens"]])
        (hit,) = scoring.judge_box(ctx, [example], [case["tokens"]]).values()
        assert hit == case["correct_at_0.5"], case
        if all(BINS.is_bin(token) for token in case["tokens"]):
            assert record == case["result"]
            ratios = np.float32([side / n for n in case["image_size"]])
            assert ratios.tolist() == [case["w_resize_ratio"], case["h_resize_ratio"]]
        else:
            assert record["box"] == list(scoring.NO_BOX)


@golden
def test_what_is_no_four_bins_is_no_box_where_the_original_computes_with_any_token(cases: dict) -> None:
    example = asked(picture_size=(512, 512))
    for case in cases["refcoco_S512"]:
        if not all(map(BINS.is_bin, case["tokens"])):
            assert min(case["result"]["box"]) < 0, "the original's"
            assert scoring.box_of(context(BINS), example, case["tokens"]) is None
    for tokens in ([58457] * 3, [58457] * 5, [58457, 58456, 58458, 58459], []):
        assert scoring.box_of(context(BINS), example, tokens) is None


@golden
def test_a_box_is_found_from_the_same_overlap_on(cases: dict) -> None:
    recorded = cases["refcoco_iou"]
    overlaps = judges.iou(np.float32(recorded["boxes"]), np.float32(recorded["references"]))
    for threshold, hits in recorded["thresholds"].items():
        assert (overlaps >= float(threshold)).astype(float).tolist() == hits
    found = judges.found(recorded["references"], recorded["boxes"])
    assert found == recorded["thresholds"]["0.5"]


@golden
@pytest.mark.parametrize("task", ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"])
def test_glue_scores_are_the_original_ones_and_constant_answers_have_no_correlation(cases: dict, task: str) -> None:
    ours = {"mcc": label_scores.matthews, "F1": label_scores.f1, "acc": label_scores.share}
    for case in cases["glue"][task]:
        expected, given = case["references"], case["predictions"]
        for name, value in case.get("metrics", {}).items():
            assert ours[name](expected, given) == pytest.approx(value, abs=6e-4), (name, case)  # recorded rounded
        counts = case["counts"]
        assert ours["acc"](expected, given) == pytest.approx(counts["_score_sum"] / counts["_score_cnt"])
        if "metrics_error" in case:  # the original divides by zero
            assert ours["mcc"](expected, given) == 0


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    texts = [" yes no maybe positive negative"] * 8
    return train_vocab(texts, 300, tmp_path_factory.mktemp("labels") / "vocab", num_codes=8, num_bins=8)


@golden
@pytest.mark.parametrize("task", ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"])
def test_glue_is_judged_and_evaluated_alone_where_the_original_raises(cases: dict, task: str, labels: Vocab) -> None:
    """Its stand-alone evaluation takes keys()[0] of a dictionary."""
    assert cases["glue"][f"{task}_standalone_evaluation_error"].startswith("TypeError")
    judge = {"cola": scoring.judge_cola, "mrpc": scoring.judge_paraphrase, "qqp": scoring.judge_paraphrase}
    case = cases["glue"][task][0]
    examples = [asked(references=((answer, 1.0),)) for answer in case["references"]]
    answers = [labels.encode(f" {answer}") for answer in case["predictions"]]
    scores = judge.get(task, scoring.judge_label)(context(labels), examples, answers)
    counts = case["counts"]
    assert scores["accuracy"] == pytest.approx(counts["_score_sum"] / counts["_score_cnt"])
    assert {"cola": "Matthews", "mrpc": "F1", "qqp": "F1"}.get(task, "accuracy") in scores

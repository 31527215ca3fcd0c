"""Downstream lines become what the original's data sets make of them, field by field and token by token.

`--golden DIR` reads DIR/finetune. Where the original is at fault a test below says what is right, and that ours is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune_rows
import numpy as np
import pytest
import torch
from finetune_rows import PATCH_SIZE, VOCAB_DIR, Case, vocab

from ofa_ds.batch import pack
from ofa_ds.data import task_rows
from ofa_ds.data.example import Example
from ofa_ds.model.stem import normalize
from ofa_ds.tasks.caption_scores import bare
from ofa_ds.terms import BOS_ID, EOS_ID, PAD_ID, UNK_ID

pytestmark = pytest.mark.skipif(not VOCAB_DIR.is_dir(), reason=f"OFA's vocabulary files are not in {VOCAB_DIR}")
golden = pytest.mark.golden("finetune/finetune_samples.json")

BICUBIC_LEVELS = 2
"""Of 255, by which our resizing may differ from Pillow's."""
LEVELS_OF_THE_OTHER_ORDER = 24
"""The same on noise, where both axes shrink and Pillow goes along the columns first."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = finetune_rows.cases(metafunc.config.getoption("golden") / "finetune")
        chosen = {name: case for name, case in found.items() if _wanted(metafunc.function.__name__, case)}
        metafunc.parametrize("case", chosen.values(), ids=chosen)


def _wanted(test: str, case: Case) -> bool:
    if "list" in test:
        return "constraint_mask" in case.samples[0]
    if "picture" in test:
        return "patch_image" in case.samples[0]
    if "batch" in test:
        return "collated" in case.stored
    return True


def mended(case: Case, sample: dict[str, Any], line: list[str]) -> str:
    """The fault of the original that a sample shows; empty where it shows none."""
    places = case.columns
    if "captions" in places and "&&" in line[places["captions"]]:
        return "captions glued"
    if "box" in places and (UNK_ID in sample["target"] or _outside(case, line)):
        return "box outside"
    if "answers" in places and sample.get("constraint_mask") and case.answers:
        answer = max(case.row(line)["answers"], key=lambda pair: pair[1])[0]
        if answer in case.answers and EOS_ID not in sample["constraint_mask"][-1]:
            return "answer cut"
    return ""


def _outside(case: Case, line: list[str]) -> bool:
    row = case.row(line)
    x0, y0, x1, y1 = row["box"]
    return min(x0, y0, x1, y1) < 0 or max(x0, x1) > row["width"] or max(y0, y1) > row["height"]


def pairs(case: Case, fault: str = "") -> Iterator[tuple[Example, dict[str, Any], list[str]]]:
    """(our example, the recorded sample, its line), of the samples that show this fault of the original."""
    rows = zip(case.examples(vocab(case.language)), case.samples, case.lines, strict=True)
    return ((ours, sample, line) for ours, sample, line in rows if mended(case, sample, line) == fault)


@golden
def test_source_target_and_previous_output_are_the_original_s(case: Case) -> None:
    for ours, sample, _ in pairs(case):
        assert ours.source.tolist() == sample["source"]
        assert ours.target.tolist() == sample["target"]
        assert ours.prev.tolist() == sample["prev_output_tokens"]
        assert not ours.cut


@golden
def test_everything_beside_the_tokens_is_the_original_s(case: Case) -> None:
    """Ids, prompts, confidences, right answers, ratios of the sides, boxes, expected texts."""
    known = {
        "source", "target", "prev_output_tokens", "patch_image", "patch_mask", "constraint_mask", "id",
        "decoder_prompt", "ref_dict", "conf", "w_resize_ratio", "h_resize_ratio", "region_coord", "target_str",
    }  # fmt: skip
    for ours, sample, line in pairs(case):
        assert set(sample) <= known
        if "id" in case.columns:
            assert ours.row_id == sample["id"] == line[case.columns["id"]]
        if "decoder_prompt" in sample:
            assert [BOS_ID, *ours.prompt] == sample["decoder_prompt"]
        if "ref_dict" in sample:
            assert dict(ours.references) == sample["ref_dict"]
        assert np.float32(ours.conf) == sample.get("conf", [1.0])[0]
        assert sample.get("patch_mask", [True]) == [True] and (ours.image is not None) == ("patch_mask" in sample)
        if "region_coord" in sample:
            side = case.stored["cfg"]["patch_image_size"]
            ratios = (np.float32(side / pixels) for pixels in ours.picture_size)
            assert [*ratios] == [sample["w_resize_ratio"], sample["h_resize_ratio"]]
            assert np.array(ours.region, np.float32).tolist() == sample["region_coord"]
        if "target_str" in sample:
            assert ours.references[0][0].lower() == sample["target_str"]


@golden
def test_what_the_list_allows_is_the_original_s(case: Case) -> None:
    for ours, sample, _ in pairs(case):
        assert [ids.tolist() for ids in ours.allowed] == sample["constraint_mask"]


@golden
def test_nothing_is_constrained_where_the_original_has_no_mask(case: Case) -> None:
    for ours, sample in zip(case.examples(vocab(case.language)), case.samples, strict=True):
        assert bool(ours.allowed) == ("constraint_mask" in sample)


@golden
def test_the_picture_is_the_original_s_within_the_rounding_of_bicubic_weights(case: Case, golden_root) -> None:
    norm = "imagenet" if case.stored["cfg"].get("imagenet_default_mean_and_std") else "half"
    level = 2 / 255 if norm == "half" else 1 / 255 / 0.224
    with np.load(golden_root / "finetune/finetune_samples_images.npz", allow_pickle=False) as stored:
        for ours, sample, _ in pairs(case):
            pixels = torch.from_numpy(ours.image.transpose(2, 0, 1)[None].copy())
            ours_3HW = normalize(pixels, torch.zeros(1, 4, dtype=torch.int32), torch.float32, norm)[0].numpy()
            recorded = sample["patch_image"]
            assert list(ours_3HW.shape) == recorded["shape"]
            if recorded.get("npz") in stored:
                levels = np.abs(ours_3HW - stored[recorded["npz"]]) / level
                assert (levels <= BICUBIC_LEVELS).mean() >= 0.98 and levels.max() <= LEVELS_OF_THE_OTHER_ORDER
            elif "channel_means" in recorded:
                assert np.abs(ours_3HW.mean((1, 2)) - recorded["channel_means"]).max() < level / 10


@golden
def test_a_batch_holds_what_the_original_s_batch_holds(case: Case) -> None:
    """Ours has no padding; the original's rows without theirs are the same. It marks padding as `all allowed`."""
    collated = case.stored["collated"]
    examples = case.examples(vocab(case.language))
    clean = [not mended(case, sample, line) for sample, line in zip(case.samples, case.lines, strict=True)]
    batch = pack(examples, [ours.image.shape[:2] for ours in examples if ours.image is not None], PATCH_SIZE, 128)
    offsets = batch.decoder_offsets.tolist()
    if all(clean):
        assert int((batch.targets != PAD_ID).sum()) == collated["ntokens"]
    assert batch.num_examples == collated["nsentences"]
    for e in range(batch.num_examples):
        if not clean[e]:
            continue
        start, end = offsets[e], offsets[e + 1]
        size, inputs = end - start, collated["net_input"]
        assert _unpadded(collated["target"][e], size) == batch.targets[start:end].tolist()
        assert _unpadded(inputs["prev_output_tokens"][e], size) == batch.decoder_tokens[start:end].tolist()
        assert _unpadded(inputs["src_tokens"][e], inputs["src_lengths"][e]) == examples[e].source.tolist()
        if collated.get("conf"):
            assert batch.loss_weight[start:end].tolist() == [collated["conf"][e]] * size
        if collated.get("prefix_tokens"):
            prompt = examples[e].prompt.tolist()
            assert _unpadded(collated["prefix_tokens"][e], len(prompt)) == prompt
        if collated.get("constraint_masks"):
            rows, bounds = collated["constraint_masks"][e], batch.allowed_offsets.tolist()
            ours = [batch.allowed_ids[bounds[m] : bounds[m + 1]].tolist() for m in range(start, end)]
            assert ours == rows[:size] and set(rows[size:]) <= {"all"}


def _unpadded(row: list[int], size: int) -> list[int]:
    assert set(row[size:]) <= {PAD_ID}
    return row[:size]


@golden
def test_the_columns_of_the_table_are_those_that_the_original_selects(case: Case) -> None:
    """But where a case says otherwise: Chinese grounding, and the second stage of captioning, named by its pictures."""
    expected = {name: case.task.columns[name] for name in case.columns if name in case.task.columns}
    if case.task.name == "refcoco" and case.language == "zh":
        expected = {"id": 0, "image": 3, "text": 1, "box": 2}
    if "captions" in case.columns and case.stored["table"].endswith("2"):
        expected["id"] = case.task.columns["image_id"]
    assert case.columns == expected
    if case.columns == {name: case.task.columns[name] for name in case.columns}:
        assert {len(line) for line in case.lines} == {case.task.width}


@golden
def test_a_line_is_read_as_the_samples_have_it_or_refused_with_a_reason(case: Case) -> None:
    """The strict reader gives the rows of these tests, or names the column of what the original takes all the same."""
    refused = 0
    for number, line in enumerate(case.lines):
        lines = task_rows.TaskLines(
            type=case.task.row_types[0], columns=case.columns, width=len(line), labels=case.task.labels
        )
        expected = {"id": str(number), **{name: value for name, value in case.row(line).items() if value != ""}}
        try:
            row = task_rows.parse(lines, "\t".join(line).encode(), number)
        except ValueError as error:
            assert str(error).split(":")[0] in case.columns
            refused += 1
            continue
        assert {name: row[name] for name in expected} == expected | {"box": row["box"]}
        assert (row["box"] is None) == (expected["box"] is None)
    assert refused < len(case.lines)


@golden
def test_mended_several_captions_are_not_glued_together_but_one_is_drawn(case: Case) -> None:
    """The original deletes && like other punctuation, or keeps it in the target; each caption stands alone here."""
    for line in case.lines:
        if "captions" not in case.columns or "&&" not in line[case.columns["captions"]]:
            continue
        captions = [bare(text) for text in line[case.columns["captions"]].split("&&")]
        ctx, words = case.context(vocab(case.language)), case.stored["cfg"]["max_tgt_length"]
        possible = {" ".join(text.split()[:words]) for text in captions if text}
        learnt = ctx.train and case.task.name == "caption"
        targets = {
            case.task.build(case.row(line), None, np.random.default_rng(seed), ctx).target_text.strip()
            for seed in range(40)
        }
        first = next(text for text in line[case.columns["captions"]].split("&&") if bare(text))
        assert targets == (possible if learnt else {bare(" ".join(first.split()))})


@golden
def test_mended_all_right_captions_stand_beside_the_target(case: Case) -> None:
    """The original's held-out target is all of them with && between; ours, so joined, are its tokens."""
    for ours, sample, line in pairs(case, "captions glued"):
        references = [bare(" ".join(text.split())) for text, _ in ours.references]
        assert len(references) == line[case.columns["captions"]].count("&&") + 1
        if case.stored["split"] != "train" or case.task.name == "caption_scst":
            joined = vocab(case.language).encode(" " + "&&".join(references))
            assert [*joined, EOS_ID] == sample["target"]


@golden
def test_mended_a_box_ends_at_the_edge_of_the_picture_and_has_a_bin_everywhere(case: Case) -> None:
    """The original's coordinates outside the picture are no bins: it learns <unk>, or a place where nothing is."""
    words = vocab(case.language)
    side = case.stored["cfg"].get("patch_image_size", 0)
    for ours, sample, _ in pairs(case, "box outside"):
        places = ours.target[:4] - words.bin_start
        size = np.array(ours.picture_size * 2)
        wanted = np.clip(ours.region, 0, size) * side / size / 512 * 999
        assert np.abs(places - wanted).max() <= 0.5 + 1e-3
        for token, recorded, was_inside in zip(ours.target, sample["target"], wanted == _raw(ours, side), strict=False):
            assert not was_inside or token == recorded


def _raw(ours: Example, side: int) -> np.ndarray:
    return np.array(ours.region) * side / np.array(ours.picture_size * 2) / 512 * 999


@golden
def test_mended_an_answer_of_the_list_is_not_cut_where_it_then_could_not_end(case: Case) -> None:
    """The original cuts it inside an entry, where eos is not allowed: an infinite loss."""
    for ours, sample, _ in pairs(case, "answer cut"):
        cut = len(sample["target"]) - 1
        assert ours.target[:cut].tolist() == sample["target"][:cut] and len(ours.target) > len(sample["target"])
        assert [ids.tolist() for ids in ours.allowed[: cut + 1]] == sample["constraint_mask"]
        scored = [(token, ids) for token, ids in zip(ours.target, ours.allowed, strict=True) if token != PAD_ID]
        assert all(token in ids for token, ids in scored)


def test_every_fault_of_the_original_that_is_mended_is_among_our_own_cases() -> None:
    found = {
        mended(case, sample, line)
        for case in finetune_rows.cases(Path(__file__).parent / "golden/finetune").values()
        for sample, line in zip(case.samples, case.lines, strict=True)
    }
    assert found == {"", "captions glued", "box outside", "answer cut"}

"""The eight tasks: golden strings and ids, weights, cuts, negatives, one test for each mended fault of the original."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ofa_ds.config import DataConfig
from ofa_ds.data.example import Example
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.tasks import caption, detection, grounding, image_infilling, matching
from ofa_ds.tasks.boxes import bin_ids
from ofa_ds.tasks.context import Context, row_generator
from ofa_ds.tasks.negatives import negative_answer, negative_caption
from ofa_ds.tasks.task import examples, held_out_examples

REPOSITORY = Path(__file__).parents[2]
OFA_VOCAB = next(
    (d for d in (REPOSITORY / "shared/vocab/en", REPOSITORY.parent / "shared/vocab/en") if d.is_dir()), None
)
"""OFA's English files; not part of the repository. The tests that need their ids say so."""

NEGATIVES = SimpleNamespace(
    captions=["a red bus.", "two dogs play", "a man on a horse"],
    objects=["cat", "dog", "horse"],
    type2ans={"other": ["table", "sky", "wood"], "how many": ["1", "2", "3"], "color": ["red", "blue", "green"]},
)


def jpeg(height: int = 120, width: int = 160, seed: int = 0) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def vl_row(kind: str, **fields) -> dict:
    row = dict(
        id="row1", image=jpeg(), width=160, height=120, caption="", question="", answers=[], box=None, gt_objects=[],
        dataset="coco", type=kind,
    )  # fmt: skip
    return row | fields


CAPTION_ROW = vl_row("caption", caption="A cat")
QA_ROW = vl_row("qa", question="What color?", answers=[("red", 1.0)])
GROUNDING_ROW = vl_row("visual_grounding", caption="a cat", box=(20.0, 30.0, 100.0, 110.0))
SIZES = {"patch_size": 16, "max_positions": 1024}
CONFIG = DataConfig(image_size=96, infill_image_size=64, code_image_size=32, sample_patches=16, max_image_size=512)


@pytest.fixture(scope="module")
def ofa_vocab():
    if OFA_VOCAB is None:
        pytest.skip("OFA's English vocabulary is not here (shared/vocab/en)")
    return load_vocab(OFA_VOCAB)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    texts = [f" what does the image describe? word{i % 40} a cat and two dogs" for i in range(200)]
    return train_vocab(texts, 400, tmp_path_factory.mktemp("vocab") / "v", num_codes=64, num_bins=1000)


@pytest.fixture
def ctx(vocab):
    return Context(vocab=vocab, negatives=NEGATIVES, config=CONFIG, **SIZES)


def make(family: str, row: dict, ctx: Context, seed: int = 0) -> list[Example]:
    return examples(family, row, row_generator(seed, family, 0, 0), ctx)


def vl(row: dict, ctx: Context, seed: int = 0) -> list[Example]:
    return make("vision_language", row, ctx, seed)


def itm_of(row: dict, ctx: Context, seed: int) -> Example:
    return vl(row, ctx, seed)[1]


# Golden strings and ids (docs/ofa.md, Tasks: golden strings) --------------


@pytest.mark.parametrize(
    "text, ids",
    [
        (caption.PROMPT, "99 473 5 2274 6190 116"),
        (matching.CAPTION_PROMPT.format("a cat"), "473 5 2274 6190 22 10 4758 22 116"),
        (grounding.PHRASE_PROMPT.format("a cat"), "61 976 473 5 2788 22 10 4758 22 6190 116"),
        (grounding.REGION_PROMPT, "1437 99 473 5 976 6190 116 976 35"),
        (image_infilling.PROMPT, "99 16 5 2274 11 5 1692 233 116"),
        (detection.PROMPT, "99 32 5 8720 11 5 2274 116"),
        (matching.ANSWER_PROMPT.format("what color?", "red"),
         "99 16 5 1948 7 864 22 99 3195 116 43809 16 22 1275 22 116"),
        (matching.YES, "4420"),
        (matching.NO, "117"),
    ],
)  # fmt: skip
def test_prompts_have_the_ids_of_the_original(ofa_vocab, text, ids):
    assert " ".join(map(str, ofa_vocab.encode(text))) == ids


def test_each_example_is_framed_like_the_original(ofa_vocab):
    ctx = Context(vocab=ofa_vocab, negatives=NEGATIVES, config=CONFIG, **SIZES)
    caption, itm = vl(CAPTION_ROW, ctx)
    assert caption.source.tolist() == [0, 99, 473, 5, 2274, 6190, 116, 2]
    assert caption.prev.tolist() == [0, 10, 4758] and caption.target.tolist() == [10, 4758, 2]
    assert itm.target.tolist() in ([4420, 2], [117, 2]) and itm.prev.tolist() in ([0, 4420], [0, 117])
    vqa, itm = vl(QA_ROW, ctx)
    assert vqa.source.tolist() == [0, 99, 3195, 116, 2] and vqa.target.tolist() == [1275, 2]
    grounding, described = vl(GROUNDING_ROW, ctx)
    assert grounding.source.tolist() == [0, 61, 976, 473, 5, 2788, 22, 10, 4758, 22, 6190, 116, 2]
    assert (grounding.target[:4] >= 58457).all() and grounding.target[4:].tolist() == [2]
    assert described.source.tolist() == [0, 1437, 99, 473, 5, 976, 6190, 116, 976, 35, *grounding.target]
    assert described.target.tolist() == [10, 4758, 2]


def test_text_infilling_keeps_the_original_instruction_around_the_text(ofa_vocab):
    ctx = Context(vocab=ofa_vocab, negatives=NEGATIVES, config=CONFIG, **SIZES)
    (example,) = make("text", {"id": "t", "text": " The cat sat on a Mat \n"}, ctx)
    assert example.source[:8].tolist() == [0, 99, 16, 5, 1498, 2788, 9, 22]
    assert example.source[-3:].tolist() == [22, 116, 2]
    assert example.target.tolist() == [*ofa_vocab.encode(" the cat sat on a mat"), 2]
    assert ofa_vocab.mask in example.source and example.conf == 2.0 and example.image is None


# Vision-language rows ------------------------------


@pytest.mark.parametrize(
    "row, names", [(CAPTION_ROW, ["caption", "itm"]), (QA_ROW, ["vqa", "itm"]),
                   (GROUNDING_ROW, ["visual_grounding", "grounded_caption"])]
)  # fmt: skip
def test_a_row_gives_exactly_two_examples_that_share_one_picture(ctx, row, names):
    pair = vl(row, ctx)
    assert [example.task for example in pair] == names
    assert pair[0].image is pair[1].image and pair[0].image.shape == (96, 96, 3)
    assert pair[0].patches.tolist() != pair[1].patches.tolist(), "patches are sampled for each example"


@pytest.mark.parametrize("row, count", [(CAPTION_ROW, 1), (QA_ROW, 1), (GROUNDING_ROW, 2)])
def test_heldout_rows_give_the_main_examples_of_the_whole_unaugmented_picture(ctx, row, count):
    ctx = replace(ctx, split="heldout")
    found = vl(row, ctx)
    assert len(found) == count and all(example.patches is None for example in found)
    assert "itm" not in [example.task for example in found]
    np.testing.assert_array_equal(found[0].image, vl(row, ctx, seed=9)[0].image)


def test_evaluation_gets_both_matching_examples_of_a_row(ctx):
    ctx = replace(ctx, split="heldout")
    yes, no = held_out_examples(["itm"], "vision_language", CAPTION_ROW, 5, ctx)
    assert (yes.target_text, no.target_text) == (" yes", " no")
    assert yes.source_text == ' does the image describe " a cat "?' != no.source_text
    again = held_out_examples(["itm"], "vision_language", CAPTION_ROW, 5, ctx)
    assert again[1].source_text == no.source_text


def test_half_of_the_matching_examples_are_positive(ctx):
    count = Counter(itm_of(QA_ROW, ctx, seed).target_text for seed in range(600))
    assert abs(count[" yes"] / 600 - 0.5) < 0.07


def test_captions_are_cut_to_30_words_and_matching_captions_to_80(ctx):
    words = [f"w{i}" for i in range(100)]
    row = vl_row("caption", caption=" ".join(words))
    assert vl(row, ctx)[0].target_text == " " + " ".join(words[:30])
    yes, _ = held_out_examples(["itm"], "vision_language", row, 0, replace(ctx, split="heldout"))
    assert yes.source_text == ' does the image describe " ' + " ".join(words[:80]) + ' "?'


def test_cc12m_captions_take_no_loss_on_the_first_two_target_tokens(ctx):
    row = vl_row("caption", caption="a cat and a dog", dataset="cc12m")
    example, plain = vl(row, ctx)[0], vl({**row, "dataset": "coco"}, ctx)[0]
    assert example.target[:2].tolist() == [1, 1] and example.target[2:].tolist() == plain.target[2:].tolist()
    np.testing.assert_array_equal(example.prev, plain.prev)
    short = vl({**row, "caption": ""}, ctx)[0]
    assert short.target[-1] == ctx.vocab.eos


def test_the_surest_answer_is_taken_the_first_of_equals_and_weighs_both_examples(ctx):
    row = vl_row("qa", question="is it?", answers=[("maybe", 0.3), ("No", 0.6), ("yes", 0.6)])
    main, itm = vl(row, ctx)
    assert main.target_text == " No" and main.conf == itm.conf == 0.6


def test_bins_divide_by_max_image_size_and_round_half_to_even_in_float32(ctx):
    boxes = np.array([[0, 384, 0.5 * 512 / 999, 1.5 * 512 / 999], [128, 256, 300.3, 512]], np.float32)
    bins = np.array(bin_ids(boxes, ctx)) - ctx.vocab.bin_start
    assert bins.tolist() == [[0, 749, 0, 2], [250, 500, 586, 999]]


def test_a_grounded_box_follows_its_object_through_the_crop(ctx):
    pixels = np.zeros((150, 200, 3), np.uint8)
    pixels[40:100, 60:120] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    row = vl_row("visual_grounding", caption="the box", image=out.getvalue(), box=(60.0, 40.0, 120.0, 100.0))
    for seed in range(5):
        example = vl(row, ctx, seed)[0]
        rows, columns = np.nonzero(example.image[..., 0] > 127)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(example.boxes[0] - seen).max() <= 1.5
        bins = example.target[:4] - ctx.vocab.bin_start
        np.testing.assert_array_equal(bins, np.rint(example.boxes[0] / 512 * 999))


def test_without_augmentation_pictures_and_boxes_are_only_resized(ctx):
    ctx = replace(ctx, config=replace(CONFIG, augment="none", sample_patches=0))
    grounding, _ = vl(GROUNDING_ROW, ctx)
    np.testing.assert_allclose(grounding.boxes, [[12, 24, 60, 88]])
    np.testing.assert_array_equal(grounding.image, vl(GROUNDING_ROW, ctx, seed=3)[0].image)
    assert grounding.patches is None


def test_sampled_patches_are_distinct_sorted_and_uniform(ctx):
    drawn = [vl(CAPTION_ROW, ctx, seed)[0].patches for seed in range(400)]
    assert all(len(patches) == 16 and (np.diff(patches) > 0).all() for patches in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=36)
    assert len(counts) == 36 and abs(counts / 400 - 16 / 36).max() < 0.12


# The other families ------------------------------


def image_row(side: int = 64, codes: int = 16) -> dict:
    return {"id": "i", "image": jpeg(side, side), "codes": np.arange(codes, dtype=np.int16)}


def test_image_infilling_hides_the_middle_and_asks_for_its_codes(ctx):
    (example,) = make("image", image_row(), ctx)
    assert example.hole == (16, 16, 48, 48) and example.code and example.conf == 2.0 and example.patches is None
    assert example.target.tolist() == [*(ctx.vocab.code(k) for k in range(16)), ctx.vocab.eos]


def test_the_hole_is_that_of_the_original_at_256_pixels(vocab):
    ctx = Context(vocab=vocab, negatives=NEGATIVES, config=DataConfig(), **SIZES)
    row = {"id": "i", "image": jpeg(256, 256), "codes": np.zeros(256, np.int16)}
    assert make("image", row, ctx)[0].hole == (64, 64, 192, 192)


@pytest.mark.parametrize(
    "row, message", [(image_row(side=60), "60 x 60, want 64 x 64"), (image_row(codes=15), "15 codes, want 16")]
)
def test_a_wrong_picture_size_or_code_count_is_named(ctx, row, message):
    with pytest.raises(ValueError, match=message):
        make("image", row, ctx)


def detection_row(boxes: list, names: list[str]) -> dict:
    return {
        "id": "d", "image": jpeg(), "width": 160, "height": 120, "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "cat_ids": ["1"] * len(names), "cat_names": names,
    }  # fmt: skip


def test_detection_lists_boxes_and_names_in_file_order(ctx):
    ctx = replace(ctx, split="heldout")
    (example,) = make("detection", detection_row([[80, 60, 160, 120], [0, 0, 40, 30]], ["dog", "cat"]), ctx)
    assert example.target_text == "<bin_62> <bin_62> <bin_125> <bin_125> dog <bin_0> <bin_0> <bin_31> <bin_31> cat"
    bins = [ctx.vocab.bin(k) for k in (62, 62, 125, 125)]
    assert example.target[: 4 + len(ctx.vocab.encode(" dog"))].tolist() == bins + ctx.vocab.encode(" dog")
    assert example.conf == 2.0 and example.image.shape == (64, 64, 3) and example.patches is None


def test_no_objects_means_a_target_of_just_eos(ctx):
    (example,) = make("detection", detection_row([], []), ctx)
    assert example.target.tolist() == [2] and example.prev.tolist() == [0]


def test_objects_cropped_away_leave_the_target(ctx):
    lengths = {len(make("detection", detection_row([[0, 0, 4, 4]], ["cat"]), ctx, seed)[0].boxes) for seed in range(40)}
    assert lengths == {0, 1}


def test_half_of_the_detection_pictures_are_mirrored(ctx):
    ctx = replace(ctx, config=replace(CONFIG, augment="none"))
    row = detection_row([[0, 0, 40, 30]], ["cat"])
    left = [make("detection", row, ctx, seed)[0].boxes[0, 0] == 0 for seed in range(300)]
    assert abs(np.mean(left) - 0.5) < 0.1


def test_text_is_cut_to_twice_the_limit_and_its_end_is_kept(ctx):
    ctx = replace(ctx, config=replace(CONFIG, max_text_tokens=5))
    text = "cat dogs " * 20
    ids = ctx.vocab.encode(" " + text.strip())
    (example,) = make("text", {"id": "t", "text": text}, ctx)
    assert example.target.tolist() == [*ids[:10][-5:], 2]


# Faults of the original that are mended ------------------------------


def test_mended_negative_caption_is_never_the_positive():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        negative = negative_caption("A Cat.", ["cat"], NEGATIVES, rng, 80)  # "cat" is not literally there
        assert negative != "a cat."
        rng = np.random.default_rng(seed)
        assert negative_caption("a red bus.", [], NEGATIVES, rng, 80) != "a red bus."


def test_two_fifths_of_negative_captions_exchange_an_object():
    found = Counter(
        negative_caption("a cat and a cat", ["cat"], NEGATIVES, np.random.default_rng(seed), 80) for seed in range(2000)
    )
    swapped = found["a dog and a dog"] + found["a horse and a horse"]
    assert abs(swapped / 2000 - 0.4) < 0.04
    assert set(found) == {"a dog and a dog", "a horse and a horse", "a red bus.", "two dogs play", "a man on a horse"}


def test_mended_zero_minus_one_is_never_an_answer():
    types = {"0": "how many", "2": "how many"}
    found = {negative_answer("0", 1.0, NEGATIVES, types, np.random.default_rng(seed)) for seed in range(500)}
    assert "-1" not in found and "1" in found
    found = {negative_answer("2", 1.0, NEGATIVES, types, np.random.default_rng(seed)) for seed in range(500)}
    assert {"1", "3"} <= found and "2" not in found


def test_mended_negative_answer_is_never_the_positive():
    for answer in ["wood", "Red", "red", "green"]:
        types = {"red": "color", "green": "color"}
        for seed in range(200):
            drawn = negative_answer(answer, 0.8, NEGATIVES, types, np.random.default_rng(seed))
            assert drawn.lower() != answer.lower()


def test_sure_answers_are_mostly_replaced_by_one_of_their_type():
    types = {"red": "color"}
    drawn = [negative_answer("red", 1.0, NEGATIVES, types, np.random.default_rng(seed)) for seed in range(1000)]
    assert abs(np.mean([answer in ("blue", "green") for answer in drawn]) - 0.9) < 0.04


@pytest.mark.parametrize("empty", [dict(captions=["A cat"]), dict(captions=[])])
def test_shards_without_another_caption_say_so(empty):
    negatives = SimpleNamespace(**{**vars(NEGATIVES), "objects": [], **empty})
    with pytest.raises(ValueError, match="no negative caption differs from 'a cat'.*--negatives"):
        negative_caption("A cat", [], negatives, np.random.default_rng(0), 80)


def test_mended_detection_target_ends_before_the_position_table_does(ctx):
    row = detection_row([[0, 0, 160, 120]] * 400, ["two dogs"] * 400)
    (example,) = make("detection", row, ctx)
    per_object = 4 + len(ctx.vocab.encode(" two dogs"))
    assert 1023 - per_object < len(example.target) <= 1023 and len(example.target) % per_object == 1
    assert len(example.boxes) == len(example.labels) == len(example.target) // per_object


def test_mended_long_words_do_not_overrun_the_position_table(ctx):
    row = vl_row("qa", question="x" * 9000, answers=[("y" * 9000, 1.0)])
    for example in vl(row, ctx):
        assert len(example.source) <= 1024 and len(example.target) <= 1024
        assert example.source[-1] == ctx.vocab.eos == example.target[-1]


def test_mended_every_row_and_epoch_draws_its_own_augmentation(ctx):
    draws = {
        key: row_generator(*key).random()
        for key in [(1, "text", 0, 0), (2, "text", 0, 0), (1, "image", 0, 0), (1, "text", 1, 0), (1, "text", 0, 1)]
    }
    assert len(set(draws.values())) == len(draws)
    pictures = {vl(CAPTION_ROW, ctx, seed)[0].image.tobytes() for seed in range(20)}
    assert len(pictures) > 15


def test_an_example_depends_on_row_and_generator_alone(ctx):
    np.random.seed(0)
    first = vl(CAPTION_ROW, ctx, seed=4)
    np.random.seed(1)
    for _ in range(3):
        vl(QA_ROW, ctx, seed=5)
    again = vl(CAPTION_ROW, pickle.loads(pickle.dumps(ctx)), seed=4)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.patches, other.patches)
        assert one.source.tolist() == other.source.tolist() and one.target.tolist() == other.target.tolist()


def test_pictures_beyond_the_last_bin_are_refused(vocab):
    with pytest.raises(ValueError, match="max_image_size 256 is less than the pictures' side 384"):
        Context(vocab=vocab, negatives=NEGATIVES, config=DataConfig(max_image_size=256), **SIZES)

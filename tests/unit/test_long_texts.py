"""Texts of any length: cut where the model's positions end, told, and never encoded further than what is kept."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import NEGATIVES, detection_row, image_row, vl_row

from ofa_ds.config import DataConfig
from ofa_ds.data.text import _clean, clean_caption, clean_question
from ofa_ds.data.vocab import Vocab, train_vocab
from ofa_ds.data.vocab_files import Files
from ofa_ds.tasks import text_infilling
from ofa_ds.tasks.context import Context, row_generator
from ofa_ds.tasks.preview import describe
from ofa_ds.tasks.task import TABLE, ask, examples, held_out_examples

CONFIG = DataConfig(image_size=32, infill_image_size=64, code_image_size=32, sample_patches=0, augment="none")
MEGABYTES_5 = 5_000_000


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Vocab:
    texts = [" what does the image describe? a cat and two dogs, it's 12 o'clock"] * 20
    return train_vocab(texts, 420, tmp_path_factory.mktemp("vocab") / "v", num_codes=64, num_bins=1000)


@pytest.fixture(scope="module")
def wordpiece() -> Vocab:
    letters = [*"abcdt12'.-", "é", "漢"]
    pieces = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), "cat", "##cat", "dog", "##dogs"]
    return Vocab(Files("wordpiece", pieces, pieces, (), 64, 1000))


words = st.text("abcdtéÀ漢字'.-12İΣ", min_size=1, max_size=9) | st.sampled_from(["cat", "describe", "it's", "don't"])
gaps = st.sampled_from([" ", " ", " ", " ", "  ", "\n", "\t", " \u00a0", "\u3000"])


@st.composite
def texts(draw: st.DrawFn) -> str:
    few = draw(st.lists(st.tuples(words, gaps), min_size=1, max_size=12))
    return draw(st.sampled_from(["", " "])) + "".join(word + gap for word, gap in few) * draw(st.integers(1, 40))


@given(texts(), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_the_first_ids_are_those_of_the_whole_text(bpe, wordpiece, text, limit):
    for vocab in (bpe, wordpiece):
        assert vocab.encode(text, limit) == vocab.encode(text)[:limit]


@given(texts(), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_the_first_words_are_those_of_the_whole_text(text, max_words):
    whole = " ".join(_clean(text).split(" ")[:max_words])
    assert clean_question(text, max_words) == whole
    assert clean_caption(f"<person> {text}", max_words) == " ".join(
        _clean(f"<person> {text}").replace("<person>", "person").split(" ")[:max_words]
    )


def long_rows(length: int, word: str) -> list[tuple[str, dict]]:
    """Rows of every family whose texts and lists have that length."""
    text = (word * (length // len(word) + 1))[:length]
    names = [text[:40] or "x"] * (length // 40) or [text]
    return [
        ("vision_language", vl_row("caption", caption=text, gt_objects=[text, "cat"])),
        ("vision_language", vl_row("qa", question=text, answers=[(text or "x", 1.0)])),
        ("vision_language", vl_row("visual_grounding", caption=text, box=(20.0, 30.0, 100.0, 110.0))),
        ("text", {"id": "t", "text": text}),
        ("image", image_row()),
        ("detection", detection_row([[1, 2, 150, 110]] * len(names), names)),
        ("detection", detection_row([[1, 2, 150, 110]], [text])),
    ]


@given(st.integers(40, 200), st.integers(0, 3000), st.sampled_from(["x", "a cat ", "it's 12 ", "漢"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_is_longer_than_the_positions_of_the_model_and_what_is_cut_says_so(bpe, positions, length, word, train):
    config = DataConfig(**{**CONFIG.__dict__, "max_text_tokens": 1 + length % 500})
    split = "train" if train else "heldout"
    ctx = Context(vocab=bpe, negatives=NEGATIVES, config=config, patch_size=16, max_positions=positions, split=split)
    wide = Context(vocab=bpe, negatives=NEGATIVES, config=config, patch_size=16, max_positions=100_000, split=split)
    for family, row in long_rows(length, word):
        rows = [examples(family, row, row_generator(0, family, 0, 0), each) for each in (ctx, wide)]
        if family == "vision_language":
            tasks = [name for name, task in TABLE.items() if task.family == family]
            held_out = [held_out_examples(tasks, family, row, 0, each) for each in (ctx, wide)]
            rows = [a + b for a, b in zip(rows, held_out, strict=True)]
        for example, uncut in zip(*rows, strict=True):
            assert len(example.source) <= positions and example.source[-1] == bpe.eos == example.target[-1]
            assert example.code or len(example.target) == len(example.prev) <= positions
            same = len(example.source) == len(uncut.source) and len(example.target) == len(uncut.target)
            assert example.cut is not same, (example.task, len(example.source), len(uncut.source))
            assert ("cut to the model's" in describe(example, ctx)) == example.cut


def test_a_text_that_is_cut_keeps_its_instruction_whole(bpe):
    begin, end = (bpe.encode(part) for part in text_infilling.PROMPT)
    positions = 2 + len(begin) + len(end) + 3
    ctx = Context(vocab=bpe, negatives=NEGATIVES, config=CONFIG, patch_size=16, max_positions=positions)
    lengths = set()
    for seed in range(200):  # masks that are put in make three tokens four or more
        (example,) = examples("text", {"id": "t", "text": "a cat " * 500}, row_generator(seed, "text", 0, 0), ctx)
        lengths.add(len(example.source))
        assert example.cut and example.source[1 : 1 + len(begin)].tolist() == begin
        assert example.source[-1 - len(end) : -1].tolist() == end
    assert max(lengths) == positions


@pytest.mark.parametrize("limit", range(1, 60, 7))
def test_a_text_of_long_pieces_is_not_cut_inside_a_word(bpe, limit):
    assert len(bpe.encode(" describe")) == 1, "nine characters, more than a piece is taken to have"
    text = " describe" * 200
    assert bpe.encode(text, limit) == bpe.encode(text)[:limit]


@pytest.mark.parametrize("task", [name for name, task in TABLE.items() if task.text_is and name != "grounded_caption"])
@pytest.mark.parametrize("text", ["x1 " * 3000, "x" * MEGABYTES_5, "<mask> " * 100_000], ids=["words", "one", "masks"])
def test_a_question_longer_than_the_model_reads_names_the_option(bpe, task, text):
    config = DataConfig(**{**CONFIG.__dict__, "max_source_words": 5000})
    ctx = Context(vocab=bpe, negatives=NEGATIVES, config=config, patch_size=16, max_positions=128, split="heldout")
    with pytest.raises(ValueError, match=f"^--text: with the instruction of {task} .* the 128 positions of the model"):
        ask(ctx, task, np.zeros((32, 32, 3), np.uint8), text)


@pytest.mark.parametrize("word", ["a cat on a mat ", "x", "  \t"], ids=["words", "one word", "gaps"])
def test_rows_of_five_megabytes_are_ready_in_a_moment(bpe, word):
    ctx = Context(vocab=bpe, negatives=NEGATIVES, config=CONFIG, patch_size=16, max_positions=512)
    for family, row in long_rows(MEGABYTES_5, word):
        began = time.process_time()
        for example in examples(family, row, row_generator(0, family, 0, 0), ctx):
            describe(example, ctx)
        assert time.process_time() - began < 1.5, family


def test_negatives_of_five_megabytes_are_cut_too(bpe):
    text = "a cat " * (MEGABYTES_5 // 6)
    negatives = SimpleNamespace(
        captions=[text + "1", text + "2 "], objects=[text], type2ans={"other": [text + "1", text + "2"]}
    )
    ctx = Context(vocab=bpe, negatives=negatives, config=CONFIG, patch_size=16, max_positions=512)
    row = vl_row("qa", question="is it?", answers=[("yes", 1.0)])
    began = time.process_time()
    assert len(held_out_examples(["itm"], "vision_language", row, 0, ctx)[1].source) == 512
    assert time.process_time() - began < 1.5

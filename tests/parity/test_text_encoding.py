"""Tokenisation and cleaning are the original's: the recorded cases of text_encoding.json, and golden strings.

docs/ofa.md, Tasks: golden strings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ofa_ds.data.text import clean_caption, clean_chinese, clean_question
from ofa_ds.data.vocab import Vocab, import_vocab, load_vocab

VOCAB_DIR = Path(__file__).parents[2].parent / "shared" / "vocab"

golden = pytest.mark.golden("text_encoding.json")
needs_vocab = pytest.mark.skipif(not VOCAB_DIR.is_dir(), reason=f"OFA's vocabulary files are not in {VOCAB_DIR}")

# docs/ofa.md, Tasks: golden strings
KNOWN_IDS = {
    " what does the image describe?": "99 473 5 2274 6190 116",
    ' does the image describe " a cat "?': "473 5 2274 6190 22 10 4758 22 116",
    ' which region does the text " a cat " describe?': "61 976 473 5 2788 22 10 4758 22 6190 116",
    "  what does the region describe? region:": "1437 99 473 5 976 6190 116 976 35",
    ' what is the complete text of " "?': "99 16 5 1498 2788 9 22 22 116",
    " what is the image in the middle part?": "99 16 5 2274 11 5 1692 233 116",
    " what are the objects in the image?": "99 32 5 8720 11 5 2274 116",
    " what is the complete image? caption: a cat": "99 16 5 1498 2274 116 3747 35 10 4758",
    ' what is the answer to question " what color? ". is " red "?': (
        "99 16 5 1948 7 864 22 99 3195 116 43809 16 22 1275 22 116"
    ),
    " what are the texts on the image?": "99 32 5 14301 15 5 2274 116",
    ' can image and text1 " a " imply text2 " b "?': "64 2274 8 2788 134 22 10 22 25696 2788 176 22 741 22 116",
    ' is the text " a " grammatically correct?': "16 5 2788 22 10 22 25187 45236 4577 116",
    ' is the sentiment of text " a " positive or negative?': "16 5 5702 9 2788 22 10 22 1313 50 2430 116",
    ' does text1 " a " and text2 " b " have the same semantics?': (
        "473 2788 134 22 10 22 8 2788 176 22 741 22 33 5 276 46264 116"
    ),
    ' what is the summary of article " a "?': "99 16 5 4819 9 1566 22 10 22 116",
    " yes": "4420", " no": "117", " maybe": "2085", " positive": "1313", " negative": "2430",
    "a dog": "102 2335", " house": "790",
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(golden_dir: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((golden_dir / "text_encoding.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["the original's files", "imported"])
def english(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    return _vocab("en", request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=["the original's files", "imported"])
def chinese(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    return _vocab("zh", request.param, tmp_path_factory)


def _vocab(language: str, how: str, tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    if not VOCAB_DIR.is_dir():
        pytest.skip(f"OFA's vocabulary files are not in {VOCAB_DIR}")
    if how == "imported":
        return import_vocab(VOCAB_DIR / language, tmp_path_factory.mktemp("vocab") / language)
    return load_vocab(VOCAB_DIR / language)


@golden
def test_english_text_has_the_original_ids(cases: dict, english: Vocab) -> None:
    for case in cases["english_bpe"]:
        assert english.encode(case["text"]) == case["ids"], case["text"]


@golden
def test_english_ids_read_as_the_original_text(cases: dict, english: Vocab) -> None:
    for case in cases["english_bpe"]:
        assert english.decode(case["ids"]) == case["decoded"]


@golden
@needs_vocab
def test_dictionary_words_have_the_original_ids(cases: dict) -> None:
    english = load_vocab(VOCAB_DIR / "en")  # GPT-2's numbers are names in the original's own files only
    for case in cases["english_raw_use_bpe_false"]:
        assert english.encode_words(case["text"]) == case["ids"], case["text"]


@golden
def test_options_of_the_original_encoder_are_a_cut_and_two_ids(cases: dict, english: Vocab) -> None:
    for case in cases["english_options"]:
        options = case["kwargs"]
        ids = english.encode(case["text"])[: options.get("length")]
        ids = [english.bos] * options.get("append_bos", False) + ids + [english.eos] * options.get("append_eos", False)
        assert ids == case["ids"], case


@golden
def test_captions_and_questions_are_cleaned_as_in_the_original(cases: dict) -> None:
    for name, clean in (
        ("pre_caption", clean_caption),
        ("pre_question", clean_question),
        ("chinese_pre", clean_chinese),
    ):
        for case in cases[name]:
            assert clean(case["text"], case["max_words"]) == case["out"], (name, case)


@golden
def test_chinese_text_has_the_original_ids(cases: dict, chinese: Vocab) -> None:
    for case in cases["chinese_bert"]:
        assert chinese.encode(case["text"]) == case["ids"], case["text"]
        assert [chinese.symbol(token) for token in case["ids"]] == case["tokens"].split()


@golden
def test_chinese_ids_read_as_the_original_text(cases: dict, chinese: Vocab) -> None:
    for case in cases["chinese_bert"]:
        assert chinese.decode(case["ids"]) == case["decoded"]


@golden
def test_sizes_are_those_of_the_released_models(cases: dict, english: Vocab, chinese: Vocab) -> None:
    assert (english.size, chinese.size) == (cases["meta"]["english_vocab"], cases["meta"]["chinese_vocab"])


@pytest.mark.parametrize("text", KNOWN_IDS, ids=lambda text: text.strip())
def test_instruction_has_the_documented_ids(text: str, english: Vocab) -> None:
    assert english.encode(text) == [int(token) for token in KNOWN_IDS[text].split()]


def test_english_layout_is_the_documented_one(english: Vocab) -> None:
    assert (english.mask, english.code(0), english.code(8191)) == (50264, 50265, 58456)
    assert (english.bin(0), english.bin(999), english.size) == (58457, 59456, 59457)


def test_chinese_layout_is_the_documented_one(chinese: Vocab) -> None:
    assert (chinese.mask, chinese.code(0), chinese.bin(0), chinese.size) == (21132, 21133, 29325, 30325)
    assert chinese.symbol(4) == "[PAD]"

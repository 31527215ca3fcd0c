"""Vocabularies: one layout of ids whatever the files, nothing unknown to a byte-level BPE, wrong files named."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.data.vocab import Vocab, import_vocab, load_vocab, train_vocab

TEXTS = [" the quick brown fox", " the quick red fox jumps", " a lazy dog and the quick fox", " 12 dogs, 12 foxes"] * 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    return train_vocab(TEXTS, 280, tmp_path_factory.mktemp("vocab") / "own", num_codes=16, num_bins=10)


def test_ids_are_specials_text_mask_codes_bins(trained: Vocab) -> None:
    assert trained.mask == 4 + 280
    assert trained.code_start == 285 and trained.bin_start == 285 + 16 and trained.size == 285 + 16 + 10
    assert [trained.symbol(k) for k in (0, 1, 2, 3, 284, 285, 301)] == [
        "<s>", "<pad>", "</s>", "<unk>", "<mask>", "<code_0>", "<bin_0>",
    ]  # fmt: skip
    assert trained.encode_words("<bin_9> <code_15>  <bin_10> fox </s>") == [trained.bin(9), trained.code(15), 3, 3, 2]


def test_a_vocabulary_without_bins_says_how_to_have_some(tmp_path: Path) -> None:
    vocab = train_vocab([" ab ab"], 300, tmp_path / "small", num_codes=0, num_bins=0)
    with pytest.raises(ValueError, match="no coordinate bins; make one that has: ofa-ds vocab train --bins 1000"):
        vocab.bin(0)


def test_frequent_words_become_one_token(trained: Vocab) -> None:
    assert len(trained.encode(" quick")) == 1
    assert trained.encode(" quick") != trained.encode("quick")


@given(text=st.text())
def test_any_text_survives_encoding(trained: Vocab, text: str) -> None:
    ids = trained.encode(text)
    assert all(4 <= token < trained.mask for token in ids)
    assert trained.decode(ids) == text


def test_symbols_in_text_are_plain_characters(trained: Vocab) -> None:
    text = "<mask> <bin_3> </s>"
    assert all(4 <= token < trained.mask for token in trained.encode(text))
    assert trained.decode(trained.encode(text)) == text


def test_decode_shows_symbols_and_hides_ends(trained: Vocab) -> None:
    fox = trained.encode(" fox")
    ids = [trained.bos, trained.bin(1), trained.bin(2), *fox, trained.mask, trained.code(7), trained.eos, trained.pad]
    assert trained.decode(ids) == "<bin_1> <bin_2> fox <mask> <code_7>"


def test_words_start_where_a_space_does(trained: Vocab) -> None:
    ids = trained.encode(" fox") + trained.encode("fox")[:1]
    assert [trained.starts_word(token) for token in ids] == [True, False]
    assert all(trained.starts_word(token) for token in (0, 1, 2, 3, trained.mask, trained.code(0), trained.bin(0)))
    assert trained.word_starts.shape == (trained.size,)


def test_the_same_texts_give_the_same_files(trained: Vocab, tmp_path: Path) -> None:
    again = train_vocab(iter(TEXTS), 280, tmp_path / "again", num_codes=16, num_bins=10)
    other = train_vocab(TEXTS, 270, tmp_path / "other", num_codes=16, num_bins=10)
    assert again.fingerprint == trained.fingerprint != other.fingerprint


def test_few_texts_give_fewer_entries_than_asked_for(tmp_path: Path) -> None:
    vocab = train_vocab([" ab ab"], 5000, tmp_path / "small", num_codes=0, num_bins=0)
    assert 256 < vocab.mask - 4 < 270 and vocab.size == vocab.mask + 1


def test_it_travels_to_worker_processes(trained: Vocab) -> None:
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.encode(TEXTS[0]) == trained.encode(TEXTS[0]) and copy.fingerprint == trained.fingerprint


@pytest.mark.parametrize("size, codes", [(255, 1), (300, -1)])
def test_sizes_that_cannot_be_are_refused(size: int, codes: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="255|-1"):
        train_vocab(TEXTS, size, tmp_path / "no", num_codes=codes)
    assert not (tmp_path / "no").exists()


def test_an_occupied_directory_is_refused(trained: Vocab, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="not an empty directory"):
        trained.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_ids_outside_are_refused(trained: Vocab) -> None:
    for call in (trained.code, trained.bin, trained.symbol):
        with pytest.raises(ValueError, match="outside"):
            call(1000)


def hugging_face(path: Path, entries: list[str], added: list[str] | None = None) -> Path:
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({entry: k for k, entry in enumerate(entries)}))
    (path / "merges.txt").write_text("#version: 0.2\na b\n")
    if added is not None:
        (path / "added_tokens.json").write_text(json.dumps({entry: len(entries) + k for k, entry in enumerate(added)}))
    return path


SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]


def test_hugging_face_layout_gets_ofa_codes_and_bins_unless_it_has_its_own(tmp_path: Path) -> None:
    entries = [*SPECIALS, "a", "b", "ab", "<mask>"]
    plain = load_vocab(hugging_face(tmp_path / "plain", entries))
    assert (plain.mask, plain.num_codes, plain.num_bins) == (7, 8192, 1000)
    assert plain.encode("abba") == [6, 5, 4]
    own = load_vocab(hugging_face(tmp_path / "own", entries, ["<code_0>", "<code_1>", "<bin_0>"]))
    assert (own.num_codes, own.num_bins, own.size) == (2, 1, 11)
    inside = load_vocab(hugging_face(tmp_path / "inside", [*entries, "<code_0>", "<code_1>", "<bin_0>"]))
    assert inside.fingerprint == own.fingerprint != plain.fingerprint


def test_modelscope_chinese_layout_is_read(tmp_path: Path) -> None:
    entries = [*SPECIALS, "[UNK]", "[MASK]", "猫", "cat", "##s", "<mask>"]
    (tmp_path / "vocab.txt").write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
    vocab = load_vocab(tmp_path)
    assert vocab.encode("猫Cats 狗") == [6, 7, 8, 4]
    assert (vocab.mask, vocab.num_codes, vocab.size) == (9, 8192, 10 + 8192 + 1000)
    assert [vocab.starts_word(token) for token in (6, 7, 8)] == [True, True, False]


def test_pieces_missing_from_the_dictionary_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("0 10\n2 5\n")
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n")
    assert load_vocab(tmp_path).encode("aabb") == [4, 5, 3]


def hf(merges: str, vocab: str | None = None) -> dict[str, str]:
    """Hugging Face's two files."""
    entries = [*SPECIALS, "a", "b", "ab", "<mask>"]
    return {"vocab.json": vocab or json.dumps({entry: k for k, entry in enumerate(entries)}), "merges.txt": merges}


def words(*pieces: str) -> dict[str, str]:
    """ModelScope's file."""
    return {"vocab.txt": "\n".join([*SPECIALS, "[UNK]", *pieces, "<mask>"]) + "\n"}


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "found nothing"),
        ({"vocab.json": "{}"}, "want dict.txt .* found vocab.json"),
        ({"vocab.json": "{", "merges.txt": ""}, "vocab.json: want JSON"),
        ({"vocab.json": '{"<s>": 0, "a": 2}', "merges.txt": ""}, "each id of 0 ... 1 once"),
        ({"vocab.json": '{"a": 0, "<mask>": 1}', "merges.txt": ""}, "as ids 0 ... 3"),
        ({"vocab.txt": "<s>\n<pad>\n</s>\n<unk>\na\n<mask>\n"}, r"\[UNK\]"),
        ({"vocab.txt": "<s>\n<pad>\n</s>\n<unk>\n[UNK]\n<mask>\n<bin_0>\n<code_0>\n"}, "got <bin_0>"),
        ({"dict.txt": "[UNK] 1\nno-count\n", "vocab.txt": "[UNK]\n"}, "dict.txt:2: want 'SYMBOL COUNT'"),
        ({"dict.txt": "0 1\n", "encoder.json": '{"a": 0}', "vocab.bpe": "a b c\n"}, "vocab.bpe:1: want two pieces"),
        (hf("#version: 0.2\r\na b\r\n"), "merges.txt:1: ends in CRLF, want LF alone; convert it: sed -i"),
        (hf("#version: 0.2\na b\r\n"), "merges.txt:2: ends in CRLF"),
        (hf("\ufeff#version: 0.2\na b\n"), "merges.txt:1: starts with a byte order mark"),
        (hf("a c\n"), "merges.txt:1: 'c' is no piece of vocab.json; the files do not go together"),
        (hf("ab a\n"), "merges.txt:1: 'aba' is no piece of vocab.json"),
        (hf("", '["a", "b"]'), r"vocab.json: want a JSON object .*, got \['a', 'b'\]"),
        (hf("", '{"a": "0"}'), "vocab.json: 'a': want a whole number .*, got '0'"),
        (hf("", '{"a": true}'), "vocab.json: 'a': want a whole number .*, got True"),
        (hf("", '{"a": 0.0}'), "vocab.json: 'a': want a whole number .*, got 0.0"),
        (hf("", '{"a": -1}'), "vocab.json: 'a': want a whole number of at least 0 .*, got -1"),
        (hf("", '{"a": {"b": 1}}'), "vocab.json: 'a': want a whole number"),
        (hf("", '{"a": 0, "b": 0}'), "vocab.json: id 0 is that of 'a' and of 'b'"),
        (hf("", '{"a": 0, "a": 1}'), "vocab.json: want JSON: the key 'a' is there twice"),
        (hf("", "[" * 100_000), "vocab.json: want JSON"),
        (hf("", '{"a": ' + "9" * 5000 + "}"), "vocab.json: want JSON"),
        (hf("", '{"a": NaN}'), "vocab.json: want JSON: NaN is no JSON"),
        (hf("a b\n") | {"added_tokens.json": '{"a": 9}'}, "added_tokens.json: 'a' has id 9, in vocab.json it has 4"),
        (hf("a b\n") | {"added_tokens.json": "3"}, "added_tokens.json: want a JSON object .*, got 3"),
        ({"dict.txt": "0 1\n", "encoder.json": "[]", "vocab.bpe": ""}, "encoder.json: want a JSON object"),
        ({"dict.txt": "0 1\n0 2\n", "encoder.json": '{"a": 0}', "vocab.bpe": ""}, "dict.txt:2: '0' is in line 1 too"),
        ({"dict.txt": "[UNK] 1\r\n", "vocab.txt": "[UNK]\n"}, "dict.txt:1: ends in CRLF"),
        (words("a", "a"), "vocab.txt:7: 'a' is in line 6 too; want each entry once"),
        (words("", "a", ""), "vocab.txt:8: '' is in line 6 too"),
        (words("a") | {"ofa_vocab.json": "{}"}, "ofa_vocab.json: num_codes: want a whole number .*, got None"),
        (words("a") | {"ofa_vocab.json": '{"num_codes": "8"}'}, "ofa_vocab.json: num_codes: .*, got '8'"),
        (words("a") | {"ofa_vocab.json": '{"num_codes": 8, "num_bins": -1}'}, "ofa_vocab.json: num_bins: .*, got -1"),
        (words("a") | {"ofa_vocab.json": '{"num_codes": 8, "num_bins": 1e15}'}, "ofa_vocab.json: num_bins: want a wh"),
        (words("a") | {"ofa_vocab.json": '{"num_codes": 8, "num_bins": 9}'}, "ofa_vocab.json: fingerprint: "),
        (words("a") | {"ofa_vocab.json": "[]"}, "ofa_vocab.json: want a JSON object"),
    ],
)
def test_wrong_files_are_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(ValueError, match=message) as raised:
        load_vocab(tmp_path)
    assert "\n" not in str(raised.value)


_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())


@given(
    changes=st.dictionaries(st.sampled_from([*SPECIALS, "a", "b", "<mask>", "x"]), _values, max_size=2),
    merges=st.text(st.sampled_from("ab \n\r\ufeff#"), max_size=8),
    meta=st.none() | st.dictionaries(st.sampled_from(["num_codes", "num_bins", "fingerprint"]), _values),
    layout=st.sampled_from(["hf", "words"]),
)
@settings(max_examples=150, deadline=None)
def test_no_content_of_a_vocabulary_is_more_than_a_value_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, changes: dict, merges: str, meta: dict | None, layout: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_vocabulary"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = hf(merges) if layout == "hf" else words(*(str(value) for value in changes.values()))
    if layout == "hf":
        files["vocab.json"] = json.dumps(json.loads(files["vocab.json"]) | changes)
    if meta is not None:
        files["ofa_vocab.json"] = json.dumps(meta)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_vocab(folder)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


def test_a_missing_directory_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ofa-ds vocab train"):
        load_vocab(tmp_path / "none")


def test_exchanged_files_do_not_pass_for_the_vocabulary(trained: Vocab, tmp_path: Path) -> None:
    trained.save(tmp_path / "mine")
    lines = (tmp_path / "mine" / "merges.txt").read_text().splitlines()
    (tmp_path / "mine" / "merges.txt").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="not those that"):
        load_vocab(tmp_path / "mine")


def test_importing_keeps_ids_and_fingerprint(trained: Vocab, tmp_path: Path) -> None:
    trained.save(tmp_path / "mine")
    imported = import_vocab(tmp_path / "mine", tmp_path / "imported")
    assert imported.fingerprint == trained.fingerprint and imported.encode(TEXTS[1]) == trained.encode(TEXTS[1])

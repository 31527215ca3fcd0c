"""CIDEr-D with given document frequencies, and where these come from: counted, written, read, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_task_rows import CAPTION, caption

from ofa_ds.bench.cider import library_scores
from ofa_ds.cli import main
from ofa_ds.data.document_frequency import (
    DocumentFrequency,
    count_ngrams,
    of_shards,
    read_document_frequency,
    write_document_frequency,
)
from ofa_ds.data.shards import Shards
from ofa_ds.tasks.cider import CiderD

WORDS = st.lists(st.sampled_from("a the red cat dog on mat .".split()), max_size=8).map(" ".join)
CAPTIONS = st.lists(WORDS, min_size=1, max_size=4)


@given(pictures=st.lists(st.tuples(WORDS, CAPTIONS), min_size=2, max_size=6))
def test_scores_are_those_of_the_library_on_the_same_captions(pictures: list[tuple[str, list[str]]]) -> None:
    counts = count_ngrams(references for _, references in pictures).counts
    frequency = DocumentFrequency(images=len(pictures), counts=counts)
    scorer = CiderD(frequency)
    ours = [scorer.scores([hypothesis], references)[0] for hypothesis, references in pictures]
    theirs = library_scores([[hypothesis] for hypothesis, _ in pictures], [each for _, each in pictures], frequency)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_a_caption_that_repeats_its_only_reference_has_the_full_score_and_a_strange_one_less_than_a_near_one() -> None:
    scorer = CiderD(count_ngrams([["a red cat on a mat"], ["two dogs run"], ["the sky"]]))
    texts = ["a red cat on a mat", "A red cat!", "a red cat on the mat", "two dogs run"]
    full, _, near, strange = scorer.scores(texts, ["a red, cat on a mat."])
    assert full == pytest.approx(10) and full > near > strange >= 0


def test_captions_without_a_reference_are_refused() -> None:
    with pytest.raises(ValueError, match="without references"):
        CiderD(count_ngrams([["a"], ["b"]])).scores(["a cat"], [])


def test_an_ngram_counts_once_for_each_picture_and_not_at_all_with_one_alone() -> None:
    found = count_ngrams([["a cat", "a cat, a cat"], ["a dog"], ["a cat"]])
    assert found.images == 3
    assert found.counts == {
        ("a",): 3, ("cat",): 2, ("<eos>",): 3, ("a", "cat"): 2, ("cat", "<eos>"): 2, ("a", "cat", "<eos>"): 2,
    }  # fmt: skip
    assert found.weight(("a", "dog")) == found.weight(("nowhere",)) > found.weight(("cat",)) > found.weight(("a",)) == 0


@given(pictures=st.lists(CAPTIONS, min_size=2, max_size=5))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, pictures: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("frequency") / "frequencies.json"
    found = count_ngrams(pictures)
    write_document_frequency(found, path)
    assert read_document_frequency(path) == found


BAD = {
    "no object": ("[1]", 'want an object with "images" and "ngrams"'),
    "another key": ('{"images": 3, "ngrams": {}, "more": 1}', 'want an object with "images"'),
    "no JSON": ("{", "no document frequencies"),
    "one picture": ('{"images": 1, "ngrams": {}}', '"images" is 1, want 2 or more'),
    "no number": ('{"images": true, "ngrams": {}}', '"images" is True'),
    "a list": ('{"images": 3, "ngrams": []}', "want up to 4 words"),
    "more than all": ('{"images": 3, "ngrams": {"a cat": 4}}', "n-gram 'a cat': 4, want up to 4 words: 1 to 3"),
    "none": ('{"images": 3, "ngrams": {"a cat": 0}}', "'a cat': 0"),
    "five words": ('{"images": 3, "ngrams": {"a b c d e": 2}}', "want up to 4 words"),
    "twice": ('{"images": 3, "ngrams": {"a": 2, "a": 3}}', "there twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_none_is_refused_with_its_name_and_what_is_wrong(name: str, tmp_path: Path) -> None:
    text, reason = BAD[name]
    path = tmp_path / "frequencies.json"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        read_document_frequency(path)
    assert str(path) in str(raised.value) and reason in str(raised.value) and "\n" not in str(raised.value)


def shards_of(tmp_path: Path, captions: list[tuple[str, str]], task: str = "caption", *options: str) -> Path:
    """(image id, captions) of each row."""
    lines = []
    for number, (image_id, text) in enumerate(captions):
        columns = caption(text.encode()).split(b"\t")
        columns[:2] = [str(number).encode(), image_id.encode()]
        lines.append(b"\t".join(columns))
    file, out = tmp_path / "captions.tsv", tmp_path / "shards"
    file.write_bytes(b"\n".join(lines) + b"\n")
    assert main(["shards", "build", "--task", task, "--out", str(out), *options, str(file)]) == 0
    return out


def test_the_command_counts_the_captions_of_one_picture_together_in_either_stage(tmp_path: Path) -> None:
    assert CAPTION.columns["captions"] == 2
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one = shards_of(tmp_path / "one", [("7", "a cat"), ("8", "a dog"), ("7", "the cat"), ("9", "a cat")])
    two = shards_of(tmp_path / "two", [("7", "a cat&&the cat"), ("8", "a dog"), ("9", "a cat")], "caption_scst")
    assert main(["shards", "frequencies", str(one), "--out", str(tmp_path / "one.json")]) == 0
    stored = json.loads((tmp_path / "one.json").read_text())
    assert stored["images"] == 3 and stored["ngrams"]["cat"] == 2 and "dog" not in stored["ngrams"]
    assert of_shards(Shards(two)) == read_document_frequency(tmp_path / "one.json")


def test_shards_of_another_task_have_no_captions_to_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tsv").write_text("an article\tits headline\n")
    assert main(["shards", "build", "--task", "gigaword", "--out", str(tmp_path / "a"), str(tmp_path / "a.tsv")]) == 0
    assert main(["shards", "frequencies", str(tmp_path / "a"), "--out", str(tmp_path / "out.json")]) == 1
    assert "a: want rows of captions, got rows of gigaword" in capsys.readouterr().err


def test_shards_of_one_picture_have_no_document_frequencies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = shards_of(tmp_path, [("7", "a cat"), ("7", "the cat")])
    assert main(["shards", "frequencies", str(shards), "--out", str(tmp_path / "out.json")]) == 1
    assert "has the captions of 1 pictures; document frequencies need two or more" in capsys.readouterr().err

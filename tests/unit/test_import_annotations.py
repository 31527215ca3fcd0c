"""Whatever stands in place of any value of a foreign annotation file, it is imported or refused in one line."""

from __future__ import annotations

import copy
import io
import json
import pickle
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_import_shards import picture

from ofa_ds.data import plain_pickle
from ofa_ds.data.building.source import SourceError, source_file
from ofa_ds.data.importing import annotations, tars
from ofa_ds.data.importing.item import Into
from ofa_ds.terms import ANNOTATIONS

IMAGES = [{"id": 1, "file_name": "COCO_a_000000000001.jpg", "width": 64, "height": 48}]
BOX = {"id": 7, "image_id": 1, "bbox": [1, 2, 30, 20], "category_id": 3, "iscrowd": 0}
INSTANCES = {"images": IMAGES, "annotations": [BOX], "categories": [{"id": 3, "name": "cat"}]}
SENTENCES = [{"sent": "left cat", "sent_id": 5, "raw": "Left cat"}, {"sent": "", "sent_id": 6, "raw": "a cat"}]
FORMATS: dict[str, list[Any]] = {
    "coco-captions": [{"images": IMAGES, "annotations": [{"id": 7, "image_id": 1, "caption": "a cat"}]}],
    "coco-instances": [INSTANCES],
    "vqa-v2": [
        {"data_subtype": "a", "questions": [{"question_id": 4, "image_id": 1, "question": "how many?"}]},
        {"annotations": [{"question_id": 4, "answers": [{"answer": "2"}, {"answer": "two"}]}]},
    ],
    "refcoco": [[{"ann_id": 7, "ref_id": 1, "sentences": SENTENCES}], INSTANCES],
}
HOSTILE = ['"\\ud800"', "NaN", "-Infinity", "1e999", "9" * 400, "-0", '"a\\nb"', '"\\u0000"', '"../x"', '"/etc"', '"."',
           '"' + "n" * 300 + '"', "[" * 900 + "]" * 900, '{"a": 1, "a": 2}', '"a,b"', '"a&&b"', "true"]  # fmt: skip
"""As JSON."""
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(NUMBERS | st.text(st.characters(), max_size=5),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
                      max_leaves=5)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    (path := tmp_path_factory.mktemp("pictures")).joinpath("COCO_a_000000000001.jpg").write_bytes(picture())
    (path / "sub").mkdir()
    return path


def read(form: str, texts: list[str | bytes], folder: Path, ends: tuple[str, ...] = (".json", ".json")) -> list[dict]:
    """Rows of annotation files with these contents. Records that are bad are left out, once they say so in one line."""
    with tempfile.TemporaryDirectory() as work:
        files = [Path(work) / f"{number}{ends[number]}" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_bytes(text.encode() if isinstance(text, str) else text)
        into = Into(kind=ANNOTATIONS[form], dataset=form)
        try:
            pieces = annotations.pieces_of(form, list(map(str, files)), str(folder), into, Path(work))
        except SourceError as error:
            assert any(f"{file}: " in str(error) for file in files) or "has no annotations" in str(error), error
            raise
        return list(rows(record for piece in pieces for record in piece.records(0)))


def rows(records: Iterator[Any]) -> Iterator[dict]:
    for record in records:
        try:
            yield record.read().row
        except ValueError as error:
            assert "\n" not in f"{record.place}{error}", error
            f"{record.place}{error}".encode()


def places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def replaced(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def refused_or_read(form: str, texts: list[str], folder: Path) -> None:
    try:
        read(form, texts, folder)
    except SourceError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        str(error).encode()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_as_it_is(form: str, folder: Path) -> None:
    assert len(read(form, list(map(json.dumps, FORMATS[form])), folder)) == (2 if form == "refcoco" else 1)


@pytest.mark.parametrize("form", FORMATS)
def test_a_hostile_value_anywhere_is_one_line(form: str, folder: Path) -> None:
    for number, table in enumerate(FORMATS[form]):
        for path in places(table):
            for hostile in HOSTILE:
                text = json.dumps(replaced(table, path, "\x01here")).replace('"\\u0001here"', hostile)
                texts = [text if k == number else json.dumps(each) for k, each in enumerate(FORMATS[form])]
                refused_or_read(form, texts, folder)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_value_anywhere_is_imported_or_one_line(form: str, folder: Path, data: st.DataObject) -> None:
    tables = list(FORMATS[form])
    for _ in range(data.draw(st.integers(1, 2))):
        number = data.draw(st.integers(0, len(tables) - 1))
        path = data.draw(st.sampled_from(places(tables[number])))
        tables[number] = replaced(tables[number], path, data.draw(VALUES))
    refused_or_read(form, list(map(json.dumps, tables)), folder)


MEMBER = {"question": "what?", "answers": {"cat": 0.5, "dog": 1}, "objects": ["cat"], "box": [1, 2, 30, 20],
          "boxes": [{"box": [1, 2, 30, 20], "category": "3", "name": "cat"}], "caption": "a cat"}  # fmt: skip


def from_tar(kind: str, text: str, tmp_path: Path) -> list[dict]:
    with tarfile.open(path := tmp_path / "x.tar", "w") as file:
        for name, content in (("a.jpg", picture()), ("a.json", text.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    columns = tuple((tars.COLUMNS | {"caption": "json:caption"}).items())
    return list(rows(tars.TarPiece(source_file(str(path)), Into(kind=kind), columns).records(0)))


@pytest.mark.parametrize("kind", ["caption", "qa", "visual_grounding", "detection"])
def test_a_hostile_value_anywhere_in_a_member_of_json_is_one_line(kind: str, tmp_path: Path) -> None:
    assert len(from_tar(kind, json.dumps(MEMBER), tmp_path)) == 1
    for path in places(MEMBER):
        for hostile in (*HOSTILE[:6], HOSTILE[12], "5", "null", "{}", "[]", "[[]]", '"x"'):
            text = json.dumps(replaced(MEMBER, path, "\x01here")).replace('"\\u0001here"', hostile)
            from_tar(kind, text, tmp_path)


@pytest.mark.parametrize(
    "form, path, value, message",
    [
        ("coco-captions", (0, "annotations", 0, "image_id"), True, "annotations.0: image_id: want a whole"),
        ("coco-captions", (0, "annotations", 0, "caption"), "\ud800", r"caption: want a text, got '\\ud800'"),
        ("coco-instances", (0, "annotations", 0, "bbox", 1), 10**400, "annotations.0: box: want a finite number"),
        ("coco-instances", (0, "annotations", 0, "iscrowd"), "no", "annotations.0: iscrowd: want 0 or 1, got 'no'"),
        ("coco-instances", (0, "images", 0, "file_name"), "\ud800.jpg", "images.0: file_name: want the name of"),
        ("vqa-v2", (0, "questions", 0, "image_id"), "x", "questions.0: image_id: want a whole number, got 'x'"),
        ("vqa-v2", (1, "annotations", 0, "answers", 0, "answer"), 5, "1.json: annotations.0: answers: answer: want a"),
        ("refcoco", (0, 0, "sentences", 1, "sent_id"), 5, "refs.0: sentences: the sent_id 5 is there twice"),
        ("refcoco", (0, 0, "sentences", 1, "sent_id"), None, "refs.0: sentences: sent_id: want a whole number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place_and_value(
    form: str, path: tuple, value: Any, message: str, folder: Path
) -> None:
    with pytest.raises(SourceError, match=message):
        read(form, list(map(json.dumps, replaced(FORMATS[form], path, value))), folder)


@pytest.mark.parametrize("form", ["coco-captions", "coco-instances"])
def test_an_annotation_whose_id_was_there_before_is_refused(form: str, folder: Path) -> None:
    (table,) = FORMATS[form]
    twice = table | {"annotations": table["annotations"] * 2}
    with pytest.raises(SourceError, match="annotations.1: the id 7 is there twice"):
        read(form, [json.dumps(twice)], folder)


def python_2(value: Any) -> bytes:
    """Protocol 2 as Python 2 writes it: texts are SHORT_BINSTRING."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python_2(key) + python_2(each) for key, each in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python_2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    return b"U" + bytes([len(value)]) + value.encode()


REFS, FOUND = FORMATS["refcoco"][0], json.dumps(INSTANCES)
ENDS = (".p", ".json")


@pytest.mark.parametrize("protocol", ["Python 2", 0, 1, 2, 3, 4, 5])
def test_refs_are_read_from_the_pickle_that_they_are_published_as(protocol: Any, folder: Path) -> None:
    data = b"\x80\x02" + python_2(REFS) + b"." if protocol == "Python 2" else pickle.dumps(REFS, protocol)
    assert plain_pickle.loads(data) == REFS
    found = read("refcoco", [data, FOUND], folder, ENDS)
    assert [(row["id"], row["caption"]) for row in found] == [("5", "left cat"), ("6", "a cat")]


def test_values_of_a_pickle_are_those_that_python_reads() -> None:
    values = [None, True, False, 1.5, -3, 1 << 70, "ü", [1, [2]], {"a": {"b": []}}, [], {}]
    for protocol in range(6):
        assert plain_pickle.loads(pickle.dumps(values, protocol)) == values
    assert plain_pickle.loads(pickle.dumps([(), (1,), (1, 2, 3), (1, 2, 3, 4)], 2)) == [
        [],
        [1],
        [1, 2, 3],
        [1, 2, 3, 4],
    ]


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # noqa: ANN204
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(protocol: int, tmp_path: Path, folder) -> None:
    data = pickle.dumps([*REFS, Harm(tmp_path / "harm")], protocol)
    with pytest.raises(
        SourceError, match=r"0.p: not a pickle of plain values: byte \d+: the instruction .* nothing was"
    ):
        read("refcoco", [data, FOUND], folder, ENDS)
    assert not (tmp_path / "harm").exists()
    pickle.loads(data)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_cut_or_damaged_pickle_is_one_line(protocol: int, folder: Path) -> None:
    data = pickle.dumps(REFS, protocol)
    for cut in range(len(data)):
        with pytest.raises(ValueError, match=r"^(byte|after byte) \d+: "):
            plain_pickle.loads(data[:cut])
    for at in range(len(data)):
        refused_or_read_pickle(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :], folder)
    with pytest.raises(ValueError, match="something follows"):
        plain_pickle.loads(data + b".")


def test_a_pickle_that_names_a_list_in_itself_again_and_again_is_refused_before_it_is_large() -> None:
    laughs: list = []
    for _ in range(40):
        laughs = [laughs] * 8
    with pytest.raises(ValueError, match="more than 1000000 values of lists and tables again"):
        plain_pickle.loads(pickle.dumps(laughs))
    twice = [1, {"a": [2]}]
    found = plain_pickle.loads(pickle.dumps([twice, twice]))
    assert found == [twice, twice] and found[0] is not found[1]


def refused_or_read_pickle(data: bytes, folder: Path) -> None:
    try:
        read("refcoco", [data, FOUND], folder, ENDS)
    except SourceError as error:
        assert "\n" not in str(error), error


def test_a_pickle_in_place_of_another_formats_json_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match="0.pkl: a pickle; coco-captions is read from JSON"):
        read("coco-captions", [pickle.dumps({})], folder, (".pkl",))

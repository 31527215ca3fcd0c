"""Lines of downstream tasks: what stands in which column, and what is refused with its reason."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tsv import picture

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.building.tsv_source import width_of
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards
from ofa_ds.data.task_rows import READERS, TaskLines, parse
from ofa_ds.tasks.task_shards import build_task_shards

IMAGE = base64.b64encode(picture())
CAPTION = TaskLines(type="caption", columns={"id": 0, "image_id": 1, "captions": 2, "image": 4}, width=5)
VQA = TaskLines(
    type="vqa",
    columns={"id": 0, "image_id": 1, "text": 2, "answers": 3, "objects": 4, "image": 5},
    width=6,
    listed=True,
)
REFCOCO = TaskLines(type="refcoco", columns={"id": 0, "image_id": 1, "text": 2, "box": 3, "image": 4}, width=5)
LABELS = {"entailment": "yes", "not_entailment": "no"}
RTE = TaskLines(type="rte", columns={"text": 1, "text_pair": 2, "label": 3}, width=4, labels=LABELS)
GIGAWORD = TaskLines(type="gigaword", columns={"text": 0, "answer": 1}, width=2)


def vqa(answers: bytes = b"1.0|!+red", question: bytes = b"what color?", objects: bytes = b"bus&&man") -> bytes:
    return b"\t".join((b"900", b"60", question, answers, objects, IMAGE))


def refcoco(box: bytes) -> bytes:
    return b"\t".join((b"0", b"40", b"the man", box, IMAGE))


def caption(captions: bytes) -> bytes:
    return b"\t".join((b"10", b"500", captions, b"not read", IMAGE))


def test_a_row_has_what_its_columns_hold_and_nothing_else() -> None:
    row = parse(VQA, vqa(b"0.3|!+two&&0.9|!+2"), 7)
    assert (row["id"], row["image_id"], row["text"], row["type"]) == ("900", "60", "what color?", "vqa")
    assert row["answers"] == [("two", 0.3), ("2", 0.9)] and row["objects"] == ["bus", "man"]
    assert row["image"] == picture() and row["width"] > 0 and row["box"] is None and row["text_pair"] == ""
    assert parse(CAPTION, caption(b"a man&&two men"), 1)["answers"] == [("a man", 1.0), ("two men", 1.0)]
    assert parse(REFCOCO, refcoco(b" 1 , 2.5 , 3 , 4 "), 1)["box"] == (1, 2.5, 3, 4)
    assert parse(RTE, b"0\ta\tb\tnot_entailment", 1)["answers"] == [("no", 1.0)]


def test_a_row_without_an_id_column_has_its_line_number() -> None:
    row = parse(GIGAWORD, b"an article\tits headline", 12)
    assert (row["id"], row["image"], row["width"], row["answers"]) == ("12", b"", 0, [("its headline", 1.0)])


BAD = {
    "a column too few": (RTE, b"0\ta\tentailment", r"columns: want 4 .* \(column 0, text, .*got 3; .*--columns"),
    "a column too many": (GIGAWORD, b"a\tb\tc", "columns: want 2 .* got 3"),
    "a carriage return": (GIGAWORD, b"a\tb\r", "answer: a carriage return"),
    "bytes that are no UTF-8": (GIGAWORD, b"a\xff\tb", "text: invalid UTF-8.* byte 1"),
    "a label of another task": (RTE, b"0\ta\tb\tneutral", "label: want entailment, not_entailment, got 'neutral'"),
    "a head line": (RTE, b"index\tsentence1\tsentence2\tlabel", "label: .*a head line is no row"),
    "an empty answer": (VQA, vqa(b"1.0|!+ "), "answers: the answer is empty"),
    "no answer at all": (VQA, vqa(b""), r"answers: want confidence\|!\+answer"),
    "an answer twice": (VQA, vqa(b"1.0|!+red&&0.3|!+red"), "answers: 'red' is there twice"),
    "a confidence over 1": (VQA, vqa(b"1.5|!+red"), "answers: want a confidence between 0 and 1, got '1.5'"),
    "a negative confidence": (VQA, vqa(b"-0.1|!+red"), "answers: want a confidence"),
    "a confidence that is no number": (VQA, vqa(b"nan|!+red"), "answers: want a confidence"),
    "a question of punctuation": (VQA, vqa(question=b"..."), "text: is empty, or nothing is left"),
    "an empty object": (VQA, vqa(objects=b"bus&&&&man"), "objects: a name between && is empty"),
    "an empty headline": (GIGAWORD, b"an article\t ", "answer: is empty"),
    "an empty caption": (CAPTION, caption(b"a man&&"), "captions: one is empty"),
    "a caption of punctuation": (CAPTION, caption(b"..."), "captions: one is empty, or nothing but punctuation"),
    "a box outside the picture": (REFCOCO, refcoco(b"0,0,9999,10"), "box: the box '0,0,9999,10' is outside"),
    "a box upside down": (REFCOCO, refcoco(b"5,5,1,1"), "box: .* is inverted or empty"),
    "a box of three": (REFCOCO, refcoco(b"1,2,3"), "box: want a box x0,y0,x1,y1"),
    "no picture": (REFCOCO, refcoco(b"1,2,3,4").removesuffix(IMAGE), "image: is empty"),
    "an empty id": (REFCOCO, refcoco(b"1,2,3,4")[1:], "id: is empty"),
}  # fmt: skip


@pytest.mark.parametrize("lines, line, message", BAD.values(), ids=BAD)
def test_a_bad_line_is_one_line_with_its_column_and_reason(lines: TaskLines, line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(lines, line, 1)
    assert "\n" not in str(error.value)


def test_an_answer_outside_the_list_is_a_bad_line_of_training_rows_alone() -> None:
    listed = frozenset({"red", "2"})
    assert parse(VQA, vqa(b"0.3|!+two&&0.9|!+2"), 1, listed)["answers"]  # the best one counts
    with pytest.raises(ValueError, match="answers: the answer 'two' is not among the 2 of --answers.*--held-out"):
        parse(VQA, vqa(b"0.9|!+two&&0.3|!+2"), 1, listed)
    held_out = TaskLines(type="vqa", columns=VQA.columns, width=6)
    assert parse(held_out, vqa(b"0.9|!+two"), 1, listed)["answers"] == [("two", 0.9)]


def test_rows_to_predict_need_not_say_what_is_right() -> None:
    lines = TaskLines(type="rte", columns={"text": 1, "text_pair": 2, "label": 3}, width=4, references=False)
    assert parse(lines, b"0\ta\tb\t", 1)["answers"] == [] == parse(lines, b"0\ta\tb\tanything", 1)["answers"]


@pytest.mark.parametrize(
    "name, columns, message",
    [
        ("vqa", "text=0,answers=1", "rows of vqa need image=N; got text=0,answers=1"),
        ("refcoco", "image=0,box=1", "rows of refcoco need text=N"),
        ("rte", "text=0,label=1", "rows of rte need text_pair=N"),
        ("refcoco", "image=0,text=1,answer=2", "what is right of refcoco is one of box; got answer"),
        ("vqa", "image=0,text=1,label=2", "what is right of vqa is one of answers, captions, answer; got label"),
        ("vqa", "image=0,text=1,answers=2,answer=3", "one of .*; got answers, answer"),
    ],
)
def test_columns_that_leave_out_what_a_task_needs_or_mean_another_are_refused(
    tmp_path: Path, name: str, columns: str, message: str
) -> None:
    (tmp_path / "a.tsv").write_text("a\tb\tc\td\n")
    given = {name: int(place) for name, _, place in (item.partition("=") for item in columns.split(","))}
    with pytest.raises(ValueError, match=message):
        build_task_shards(tmp_path / "out", name, [tmp_path / "a.tsv"], columns=given)


def test_a_sentence_about_a_picture_may_come_without_a_premise(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"\t".join((IMAGE, b"a man sleeps", b"entailment")) + b"\n")
    columns = {"image": 0, "text": 1, "label": 2}
    build_task_shards(tmp_path / "out", "snli_ve", [tmp_path / "a.tsv"], columns=columns)
    assert Shards(tmp_path / "out").row("downstream", 0)["text_pair"] == ""


@pytest.mark.parametrize("column", [{"answer": 1}, {"answers": 1}])
def test_an_answer_that_is_no_label_of_the_task_is_refused_in_any_column(column: dict[str, int]) -> None:
    lines = TaskLines(type="sst2", columns={"text": 0, **column}, width=2, labels={"0": "negative", "1": "positive"})
    conf = b"1|!+" if "answers" in column else b""
    assert parse(lines, b"a\t" + conf + b"positive", 1)["answers"] == [("positive", 1.0)]
    with pytest.raises(ValueError, match="answers?: want negative, positive, got 'sure'"):
        parse(lines, b"a\t" + conf + b"sure", 1)


@pytest.mark.parametrize(
    "columns, width, message",
    [
        ({"txt": 0}, 2, "want names of id, .* got 'txt'"),
        ({"text": 0, "label": 2}, 2, "the file has 2 columns, counted from 0; got text=0,label=2"),
        ({"text": 0, "label": 0}, 2, "two names stand for one column"),
        ({"text": 0}, 2, "none holds what is right .*--no-references"),
    ],
)
def test_columns_that_cannot_be_are_refused(columns: dict[str, int], width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskLines(type="sst2", columns=columns, width=width)


TEXT = st.text(st.characters(exclude_characters="\t\n\r&|", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() and text[0] != "\ufeff" and any(each.isalnum() for each in text)
)


@given(texts=st.lists(TEXT, min_size=1, max_size=3, unique=True), pair=TEXT, number=st.integers(1, 10**9))
def test_text_is_kept_as_it_came(texts: list[str], pair: str, number: int) -> None:
    lines = TaskLines(type="x", columns={"text": 1, "answers": 0}, width=2)
    joined = "&&".join(f"0.5|!+{text}" for text in texts)
    row = parse(lines, f"{joined}\t{pair}".encode(), number)
    assert row["answers"] == [(text, 0.5) for text in texts] and row["text"] == pair and row["id"] == str(number)


def built(tmp_path: Path, lines: TaskLines, content: list[bytes], **options: Any) -> Path:
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"\n".join(content) + b"\n")
    build_shards(tmp_path / "out", downstream=[path], lines=lines, workers=1, **options)
    return tmp_path / "out"


def test_shards_give_back_what_was_read_and_count_what_is_missing(tmp_path: Path) -> None:
    held_out = TaskLines(type="vqa", columns=VQA.columns, width=6)
    content = [vqa(), vqa(b"0.9|!+blue"), vqa(objects=b"")]
    folder = built(tmp_path, held_out, content, answers=("red", "green"))
    shards = Shards(folder)
    assert [shards.row("downstream", i) for i in range(3)] == [parse(held_out, line, 0) for line in content]
    assert shards.types == {"vqa": 3} and shards.answers == ("red", "green") and verify_shards(folder) == []
    part = shards.manifest.families["downstream"]
    assert (part.unlisted, part.unanswered, part.quarantined) == (1, 0, 0)


def test_bad_lines_and_answers_outside_the_list_go_to_quarantine_alike(tmp_path: Path) -> None:
    content = [vqa(), vqa(b"0.9|!+blue"), vqa(b"2|!+red")]
    folder = built(tmp_path, VQA, content, answers=("red",), on_error="quarantine")
    part = Shards(folder).manifest.families["downstream"]
    assert (part.rows, part.quarantined, part.unlisted) == (1, 2, 0)
    log = (folder / "quarantine/rows.log").read_text()
    assert "rows.tsv:2: answers: the answer 'blue'" in log and "rows.tsv:3: answers: want a confidence" in log


def test_a_list_of_answers_in_another_order_is_another_data_set(tmp_path: Path) -> None:
    names = []
    for number, answers in enumerate((("red", "blue"), ("blue", "red"), ())):
        (tmp_path / str(number)).mkdir()
        names.append(Shards(built(tmp_path / str(number), VQA, [vqa()], answers=answers)).fingerprint)
    assert len(set(names)) == 3


def test_verify_names_a_damaged_list_of_answers(tmp_path: Path) -> None:
    folder = built(tmp_path, VQA, [vqa()], answers=("red", "blue"))
    (folder / "answers.json").write_text('["blue", "red"]')
    assert [problem for problem in verify_shards(folder) if "answers.json: its checksum" in problem]


@pytest.mark.parametrize(
    "lines, line, doubt",
    [
        (VQA, vqa(b"1.0|!+nan"), "answers: 'nan' is what programs write"),
        (VQA, vqa(b"1.0|!+red&&0.3|!+blue "), "answers: 'blue ' begins or ends with a blank"),
        (REFCOCO, refcoco(b"0.1,0.1,0.9,1"), "box: all of it is within 0 ... 1"),
        (RTE, b'0\t"a"\tb\tentailment', ""),
        (GIGAWORD, b'"a ""big"" b"\t"c"', "text: stands in quotation marks"),
        (GIGAWORD, b"None\tc", "text: 'None' is what"),
    ],
)
def test_a_line_that_looks_like_a_mistake_is_a_warning_and_with_strict_an_error(
    lines: TaskLines, line: bytes, doubt: str, tmp_path: Path
) -> None:
    folder = built(tmp_path, lines, [line])
    log = folder / "warnings/rows.log"
    assert (doubt in log.read_text()) if doubt else not log.exists()
    if doubt:
        (tmp_path / "strict").mkdir()
        with pytest.raises(ValueError, match=r"rows.tsv:1: .*\(--strict\)"):
            built(tmp_path / "strict", lines, [line], strict=True)


def test_the_width_of_a_file_is_that_of_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"a\tb\tc\nd\n")
    assert width_of(str(tmp_path / "a.tsv")) == 3


def test_every_kind_of_column_is_read_before_what_needs_it() -> None:
    assert list(READERS).index("image") < list(READERS).index("box")

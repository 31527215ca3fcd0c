"""Lists of answers: text, JSON and the original's pickle, of which nothing is run."""

from __future__ import annotations

import json
import pickle
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.cli import main
from ofa_ds.data.answer_list import read_answer_list, read_answers_file, write_answer_list
from ofa_ds.data.answer_pickle import read_answer_pickle

ANSWER = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text and text == text.strip())
ANSWERS = st.lists(ANSWER, min_size=1, max_size=30, unique=True)


@settings(max_examples=50)
@given(answers=ANSWERS)
def test_what_is_written_is_read_back_and_is_a_list_a_user_may_give(answers: list[str], tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("answers")
    checksum = write_answer_list(folder / "answers.json", answers)
    assert read_answer_list(folder, checksum) == tuple(answers) == read_answers_file(folder / "answers.json")


@settings(max_examples=50)
@given(answers=ANSWERS, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL), seed=st.integers(0, 99))
def test_a_pickled_dictionary_is_read_in_the_order_of_its_numbers(
    answers: list[str], protocol: int, seed: int, tmp_path_factory
) -> None:
    path = tmp_path_factory.mktemp("answers") / "ans2label.pkl"
    shuffled = np.random.default_rng(seed).permutation(len(answers)).tolist()
    path.write_bytes(pickle.dumps({answers[k]: k for k in shuffled}, protocol))
    assert read_answer_pickle(path) == tuple(answers)
    path.write_bytes(pickle.dumps(answers, protocol))
    assert read_answer_pickle(path) == tuple(answers)


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ans2label.pkl"
    path.write_bytes(b"(dp0\nS'net'\np1\nI0\nsVcaf\\u00e9\np2\nI1\ns.")
    assert read_answer_pickle(path) == ("net", "café")
    path.write_bytes(b"\x80\x02}q\x00(U\x03netq\x01K\x00U\x05caf\xc3\xa9q\x02K\x01u.")
    assert read_answer_pickle(path) == ("net", "café")


@pytest.mark.parametrize("name, content", [("a.json", b"[]"), ("a.json", b"{}"), ("a.txt", b""), ("a.pkl", b"].")])
def test_a_list_without_an_answer_is_refused_as_it_would_leave_the_task_open(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    read = read_answer_pickle if name.endswith(".pkl") else read_answers_file
    with pytest.raises(ValueError, match=rf"{name}.*(the list has no answer|1: the answer is empty)"):
        read(tmp_path / name)


class Runs:
    """Unpickled, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


REFUSED = {
    "a program": (lambda path: Runs(path / "ran"), "instruction .* has no place"),
    "a program as a number": (lambda path: {"red": Runs(path / "ran")}, "instruction .* has no place"),
    "a class": (lambda path: OrderedDict(red=0), "instruction .* has no place"),
    "an array": (lambda path: np.arange(3), "instruction .* has no place"),
    "a number as answer": (lambda path: {1: 0}, "got the key 1"),
    "an answer as number": (lambda path: {"red": "blue"}, "want {answer: whole number}, got 'blue'"),
    "one number twice": (lambda path: {"red": 1, "blue": 1}, "'red' and 'blue' have one number, 1"),
    "an empty answer": (lambda path: {" ": 0}, "answer 1: the answer is empty"),
    "an answer twice": (
        lambda path: ["red", "blue", "red"],
        "answer 3: the answer 'red' is there already",
    ),
    "a list of lists": (lambda path: [["red"]], "answer 1: want text"),
    "a blank": (lambda path: {"red": 0, "blue ": 1}, "answer 2: the answer 'blue ' begins or ends with a blank"),
    "text alone": (lambda path: "red", "holds str, want"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_any_other_pickle_is_refused_and_nothing_is_run(make, message: str, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps(make(tmp_path), protocol))
    with pytest.raises(ValueError, match=message) as error:
        read_answer_pickle(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_pickle_is_a_value_error_or_a_list_of_answers(data: st.DataObject, tmp_path_factory) -> None:
    whole = bytearray(pickle.dumps({f"answer {k}": k for k in range(12)}, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("answers") / "bad.pkl"
    path.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    try:
        found = read_answer_pickle(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert all(isinstance(answer, str) and answer and answer == answer.strip() for answer in found)


BAD_FILES = {
    "twice": ("a.txt", "red\nblue\nred\n", r"a.txt:3: the answer 'red' is there already, as number 1"),
    "empty": ("a.txt", "red\n\nblue\n", r"a.txt:2: the answer is empty"),
    "empty file": ("a.txt", "", r"a.txt:1: the answer is empty"),
    "blank before": ("a.txt", "red\n blue\n", r"a.txt:2: the answer ' blue' begins or ends with a blank; take it away"),
    "blank behind": ("a.txt", "red\u3000\nblue\n", r"a.txt:1: the answer 'red.*' begins or ends with a blank"),
    "json blank": ("a.json", '[\n"red",\n"dark blue "\n]', r"a.json:3: the answer 'dark blue ' begins or ends"),
    "json key with a blank": ("a.json", '{"red ": 0}', r"a.json: answer 1: the answer 'red ' begins or ends"),
    "carriage returns": ("a.txt", "red\r\nblue\r\n", r"a.txt:1: a carriage return"),
    "json twice": ("a.json", '[\n "red", "x,[",\n "blue",\n "red"\n]', r"a.json:4: the answer 'red' is there already"),
    "json empty": ("a.json", '["red",\n""]', r"a.json:2: the answer is empty"),
    "json number": ("a.json", "[1]", r"a.json:1: want text, got 1"),
    "json half a pair": ("a.json", '["\\ud800"]', r"a.json:1: want text"),
    "json no list": ("a.json", '"red"', r"a.json: want a list"),
    "not json": ("a.json", '["red"\n"blue"]', r"a.json:2: want JSON"),
    "json key twice": ("a.json", '{"red": 0, "red": 1}', r"a.json: want JSON: the key 'red' is there twice"),
    "json places": ("a.json", '{"red": 0, "blue": 0}', r"have one number, 0"),
    "a pickle": ("a.pkl", "x", r"is a pickle, .* ofa-ds shards answers .*a.pkl --out a.json"),
}


@pytest.mark.parametrize("name, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_wrong_file_is_one_line_with_its_place(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_answers_file(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_json_dictionary_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"blue": 7, "red": 3, "green": 12}')
    assert read_answers_file(tmp_path / "a.json") == ("red", "blue", "green")


def test_a_hundred_thousand_answers_take_a_second_at_most(tmp_path: Path) -> None:
    answers = [f"answer number {k}" for k in range(100_000)]
    (tmp_path / "a.txt").write_text("\n".join(answers))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({answer: k for k, answer in enumerate(answers)}))
    (tmp_path / "a.json").write_text(json.dumps(answers))
    for read, name, seconds in (
        (read_answers_file, "a.txt", 1),
        (read_answers_file, "a.json", 1),
        (read_answer_pickle, "a.pkl", 6),
    ):
        start = time.process_time()
        assert len(read(tmp_path / name)) == 100_000
        assert time.process_time() - start < seconds, name


def test_the_command_converts_a_pickle_and_refuses_a_program(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blue": 1, "red": 0}))
    assert main(["shards", "answers", str(tmp_path / "a.pkl"), "--out", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == ["red", "blue"]
    assert "answers: 2 in" in capsys.readouterr().out
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    assert main(["shards", "answers", str(tmp_path / "b.pkl"), "--out", str(tmp_path / "b.json")]) == 1
    assert not (tmp_path / "b.json").exists() and not (tmp_path / "ran").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["shards", "answers", str(tmp_path / "a.pkl"), "--out", str(tmp_path / "a.txt")]) == 2

"""`shards build --task`: what the task and the user say of a file, and every wrong use of it, one line each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.cli import main
from ofa_ds.data.answer_list import best_answer
from ofa_ds.data.scenes_tasks import ANSWERS, write_task_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.data.task_rows import READERS, TaskLines, parse
from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.tasks.task_shards import build_task_shards, task_shown, tasks_of
from ofa_ds.terms import DOWNSTREAM_TASKS


def lines_of(name: str, **options: bool) -> TaskLines:
    task = DOWNSTREAM[name]
    return TaskLines(type=task.row_types[0], columns=task.columns, width=task.width, labels=task.labels, **options)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows of each task, and the lists of answers as NAME.txt."""
    folder = tmp_path_factory.mktemp("scenes")
    for name in DOWNSTREAM_TASKS:
        write_task_scenes(folder, name, 8, seed=1)
        if name in ANSWERS:
            (folder / "answers.txt").rename(folder / f"{name}.txt")
    return folder


@pytest.mark.parametrize("name", DOWNSTREAM_TASKS)
def test_a_task_says_of_each_column_what_a_reader_knows(name: str) -> None:
    task = DOWNSTREAM[name]
    assert set(task.columns) <= set(READERS) and max(task.columns.values()) < task.width
    assert ("label" in task.columns) == bool(task.labels)
    assert not task.needs_picture or "image" in task.columns


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_line_of_any_bytes_is_a_row_or_an_error_of_one_line_with_its_column(
    scenes: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(DOWNSTREAM_TASKS))
    line = bytearray((scenes / f"{name}.tsv").read_bytes().split(b"\n")[data.draw(st.integers(0, 7))])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(line) - 1))
        line[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    line = bytes(line).replace(b"\n", b"")
    lines = lines_of(name)
    try:
        row = parse(lines, line, 5)
    except ValueError as error:
        column = str(error).partition(":")[0]
        assert "\n" not in str(error) and column in ("columns", *lines.names), error
    else:
        assert row["type"] == lines.type and (row["answers"] or row["box"])
        assert all(0 <= confidence <= 1 and text.strip() for text, confidence in row["answers"])
        assert row["box"] is None or 0 <= row["box"][0] < row["box"][2] <= row["width"]


def test_tasks_that_share_rows_share_shards(scenes: Path, tmp_path: Path) -> None:
    build_task_shards(tmp_path / "out", "refcocog", [scenes / "refcocog.tsv"], workers=1)
    shards = Shards(tmp_path / "out")
    assert tasks_of(shards) == ["refcoco", "refcocoplus", "refcocog"] and task_shown(shards, "refcocoplus")
    with pytest.raises(ValueError, match="has no rows of vqa, but of refcoco, refcocoplus, refcocog"):
        task_shown(shards, "vqa")


def test_columns_say_where_everything_is_in_a_file_that_is_laid_out_otherwise(scenes: Path, tmp_path: Path) -> None:
    lines = [line.split("\t") for line in (scenes / "refcoco.tsv").read_text().splitlines()]
    path = tmp_path / "chinese.tsv"  # as the original's Chinese files are
    path.write_text("".join("\t".join((a, text, box, image)) + "\n" for a, _, text, box, image in lines))
    for name, options in (("a", []), ("b", ["--columns", "id=0,text=1,box=2,image=3"])):
        arguments = ["shards", "build", "--task", "refcoco", "--out", str(tmp_path / name), *options, str(path)]
        assert main(arguments) == (0 if options else 1)
    row = Shards(tmp_path / "b").row("downstream", 0)
    assert [row["id"], row["text"]] == [lines[0][0], lines[0][2]] and row["box"] and not row["image_id"]


def test_a_list_without_the_answers_of_training_stops_the_build_and_is_counted_where_rows_are_to_be_judged(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "few.txt").write_text("red\nyes\n")
    rows = [parse(lines_of("vqa"), line, 1) for line in (scenes / "vqa.tsv").read_bytes().splitlines()]
    missing = sum(best_answer(row["answers"]) not in ("red", "yes") for row in rows)
    build = ["shards", "build", "--task", "vqa", "--answers", str(tmp_path / "few.txt"), str(scenes / "vqa.tsv")]
    assert missing and main([*build, "--out", str(tmp_path / "a")]) == 1 and not (tmp_path / "a").exists()
    error = capsys.readouterr().err
    assert "vqa.tsv:" in error and "is not among the 2 of --answers" in error and len(error.splitlines()) == 1
    assert main([*build, "--held-out", "--out", str(tmp_path / "b")]) == 0
    assert f"{missing} answered outside --answers" in capsys.readouterr().out
    assert Shards(tmp_path / "b").manifest.families["downstream"].unlisted == missing
    assert main([*build, "--no-references", "--out", str(tmp_path / "c")]) == 0
    part = Shards(tmp_path / "c").manifest.families["downstream"]
    assert (part.unanswered, part.unlisted) == (8, 0) and "8 without an answer" in capsys.readouterr().out


def test_workers_change_no_byte_and_cutting_into_files_changes_no_fingerprint(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("red\nyes\nsquare\n")
    given = {"answers": tmp_path / "few.txt", "on_error": "quarantine"}
    for name, options in (("a", {"workers": 1}), ("b", {"workers": 2}), ("c", {"workers": 1, "rows_per_shard": 100})):
        options = {"rows_per_shard": 3} | options | given
        build_task_shards(tmp_path / name, "vqa", [scenes / "vqa.tsv"], **options)
    a, b = ({file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.*")}
            for name in "ab")  # fmt: skip
    assert a == b and Shards(tmp_path / "a").fingerprint == Shards(tmp_path / "c").fingerprint
    part = Shards(tmp_path / "a").manifest.families["downstream"]
    assert part.rows + part.quarantined == 8 and part.quarantined


WRONG = {
    "an unknown task": (["--task", "vqq"], 2, "invalid choice: 'vqq'"),
    "no file": (["--task", "sst2"], 1, "--task sst2: give at least one TSV file"),
    "a file that is not there": (["--task", "sst2", "nowhere.tsv"], 1, "nowhere.tsv: no such file"),
    "a list for labels": (["--task", "sst2", "sst2.tsv", "--answers", "vqa.txt"], 1, "sst2 takes no list .* labels"),
    "a list for captions": (["--task", "caption", "caption.tsv", "--answers", "vqa.txt"], 1, "its answers are free"),
    "another task's file": (["--task", "rte", "sst2.tsv"], 1, "sst2.tsv:1: columns: want 4 .* got 2"),
    "a column that nothing reads": (["--task", "sst2", "sst2.tsv", "--columns", "txt=0"], 2, "got 'txt=0'"),
    "a column twice": (["--task", "sst2", "sst2.tsv", "--columns", "text=0,label=0"], 1, "two names stand for one"),
    "a column too far": (["--task", "sst2", "sst2.tsv", "--columns", "text=0,label=2"], 1, "the file has 2 columns"),
    "nothing that is right": (["--task", "sst2", "sst2.tsv", "--columns", "text=0"], 1, "none holds what is right"),
    "files without a task": (["sst2.tsv"], 2, "want --task"),
    "a list without a task": (["--text", "sst2.tsv", "--answers", "vqa.txt"], 2, "want --task"),
    "a family with a task": (["--task", "sst2", "--text", "sst2.tsv"], 2, "its TSV files come alone"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, code, message", WRONG.values(), ids=WRONG)
def test_wrong_use_is_named_and_leaves_nothing(
    arguments: list[str], code: int, message: str, scenes: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(scenes)
    out = tmp_path / "out"
    try:
        found = main(["shards", "build", "--out", str(out), *arguments])
    except SystemExit as end:
        found = end.code
    assert found == code and not out.exists()
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])

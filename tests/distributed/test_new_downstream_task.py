"""A downstream task of one's own is a file, an entry and a name: then every command deals with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TOY = '''
"""Is the number of words odd or even?"""
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import asked_row, best_answer, downstream_frame
from ofa_ds.tasks.kind import Decoding, Task

PROMPT = ' is the number of words in " {} " odd or even?'

def build(row, seen, rng, ctx):
    best = best_answer(row)
    if best is None:
        return downstream_frame(row, ctx, PROMPT.format(row["text"]), "", answer=())
    return downstream_frame(row, ctx, PROMPT.format(row["text"]), f" {best[0]}", rng=rng)

def ask(ctx, picture, text):
    return downstream_frame(asked_row(None, text), ctx, PROMPT.format(text), "", answer=())

def texts(row):
    return [PROMPT.format(row["text"]), *(f" {answer}" for answer, _ in row["answers"])]

def hand_in(ctx, asked, answers):
    return [{"row": example.row_id, "is": ctx.vocab.decode(answer).strip()}
            for example, answer in zip(asked, answers, strict=True)]

TOY = Task(
    name="toy", family="downstream", row_types=("toy",), build=build, texts=texts, ask=ask, needs_picture=False,
    text_is="the words", columns={"text": 0, "label": 1}, width=2, labels={"0": "odd", "1": "even"},
    candidates="labels", settings={"max_source_words": 20}, decoding=Decoding(candidates=True, max_len=8),
    metric=scoring.ACCURACY, judge=scoring.judge_label, constant=scoring.constant_label, hand_in=hand_in,
)
'''

RECIPE = """
extends = "pretrain-nano"
run_dir = "runs/toy"

[data]
shards = "train"
vocab = "vocab"
max_source_words = 20

[data.task]
name = "toy"

[batch]
global_rows = 4
micro_rows = 4

[train]
num_steps = 3
log_every = 1
sample_every = 3
save_every = 3
"""

ROWS = [("a red square", 0), ("one circle", 1), ("the big blue shape", 1), ("five words are here now", 0)]


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file}: {old!r}"
    file.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program with the three edits, beside the rows of the new task."""
    folder = tmp_path_factory.mktemp("toy")
    for name in ("ofa_ds", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ofa_ds/tasks/downstream/toy.py").write_text(TOY)
    edit(folder / "ofa_ds/terms.py", '"gigaword": "other",', '"gigaword": "other", "toy": "other",')
    table = folder / "ofa_ds/tasks/task.py"
    edit(table, "from ofa_ds.tasks.kind", "from ofa_ds.tasks.downstream.toy import TOY\nfrom ofa_ds.tasks.kind")
    edit(table, "gigaword.GIGAWORD,", "gigaword.GIGAWORD, TOY,")
    for name in ("train", "heldout"):
        (folder / f"{name}.tsv").write_text("".join(f"{text} {name}\t{1 - label}\n" for text, label in ROWS))
    (folder / "toy.toml").write_text(RECIPE)
    return folder


def run(program: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{program}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ofa_ds.cli", *arguments], cwd=program, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_a_new_downstream_task_goes_through_every_command(program: Path) -> None:
    for name in ("train", "heldout"):
        assert "4 rows" in run(program, "shards", "build", "--task", "toy", "--out", name, f"{name}.tsv")
    assert "every checksum" in run(program, "shards", "verify", "train")
    sizes = ("--size", "300", "--codes", "64", "--bins", "16")
    assert "vocabulary: 3" in run(program, "vocab", "train", "--shards", "train", *sizes, "--out", "vocab")
    shown = run(program, "shards", "show", "train", "--vocab", "vocab", "--row", "2", "--png", "toy.png")
    assert 'the number of words in " the big blue shape train " odd or even?' in shown and "target | odd" in shown
    assert (program / "toy.png").is_file()
    run(program, "finetune", "toy.toml")
    losses = [json.loads(line) for line in (program / "runs/toy/metrics.jsonl").read_text().splitlines()]
    assert "toy" in json.dumps(losses)
    found = json.loads(run(program, "evaluate", "runs/toy", "--task", "toy", "--shards", "heldout", "--json"))
    assert found["tasks"]["toy"]["examples"] == 4 and 0 <= found["tasks"]["toy"]["scores"]["accuracy"]["own"] <= 1
    answer = run(program, "generate", "runs/toy", "--task", "toy", "--text", "three words here")
    assert answer.strip() in ("odd", "even")
    run(program, "predict", "runs/toy", "--task", "toy", "--shards", "heldout", "--out", "out.json")
    handed_in = json.loads((program / "out.json").read_text())
    assert [record["row"] for record in handed_in] == ["1", "2", "3", "4"]
    assert {record["is"] for record in handed_in} <= {"odd", "even"}

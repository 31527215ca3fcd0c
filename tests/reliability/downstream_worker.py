"""Each task of the command line through every command, in one process: prints what `evaluate --json` said, a line each.

`python downstream_worker.py FOLDER`
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from ofa_ds.cli import main
from ofa_ds.terms import DOWNSTREAM_TASKS

ROWS = 12
SMALL = (
    "train.num_steps=2", "batch.global_rows=4", "batch.micro_rows=4", "train.evaluate_every=2", "train.evaluate_rows=4",
    "train.save_in_background=false", "data.workers=0",
)  # fmt: skip


RECIPES = {"text_to_image": "finetune-image-gen-stage1-nano"}
"""Where they are not called by the task."""


def run(*arguments: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([str(each) for each in arguments])
    assert code == 0, (code, arguments)
    return out.getvalue()


def chain(folder: Path, task: str) -> dict:
    run("scenes", "--task", task, "--rows", ROWS, "--out", folder / "tsv")
    file, listed = folder / f"tsv/{task}.tsv", folder / "tsv/answers.txt"
    answers = ["--answers", listed] if listed.exists() else []
    shards, vocab, rundir = folder / "shards", folder / "vocab", folder / "run"
    recipe = RECIPES.get(task, f"finetune-{task}-nano")
    run("shards", "build", "--task", task, *answers, "--workers", 1, "--out", shards, file)
    run("vocab", "train", "--shards", shards, "--size", 400, "--codes", 128, "--bins", 64, "--out", vocab)
    run("shards", "show", shards, "--vocab", vocab, "--recipe", recipe, "--png", folder / "show.png")
    data = [f"data.shards={shards}", f"data.heldout={shards}", f"data.vocab={vocab}", f"run_dir={rundir}"]
    run("finetune", recipe, *data, *SMALL)
    told = run("evaluate", rundir, "--task", task, "--shards", shards, "--rows", 4, "--json", "--png", folder / "e.png")
    run("predict", rundir, "--task", task, "--shards", shards, "--out", folder / "predictions")
    return json.loads(told)["tasks"][task]


if __name__ == "__main__":
    for name in DOWNSTREAM_TASKS:
        print(json.dumps({"task": name, **chain(Path(sys.argv[1]) / name, name)}), flush=True)

"""Real rows of every downstream task go from OFA's TSV files to a hand-in: build, fine-tune, evaluate, predict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from downstream_chain import MARK

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.recast import FORMS, write_recast
from ofa_ds.data.shards import Shards
from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.tasks.texts import train_from_shards

pytestmark = pytest.mark.long

ROWS = Path(__file__).parents[1] / "fixtures/real_rows"
WORKER = Path(__file__).with_name("downstream_chain.py")
STEPS = 3
LIKE_ANOTHER = ("refcocoplus", "refcocog", "mrpc", "qnli", "qqp", "rte", "sst2")
"""Differ from a task before them in their columns and words alone."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of pretraining, and a vocabulary."""
    folder = tmp_path_factory.mktemp("chain")
    sources = {name: [ROWS / f"{name}_examples.tsv"] for name in ("vision_language", "text", "detection")}
    build_shards(folder / "shards", workers=1, **sources)
    train_from_shards(folder / "shards", size=400, out=folder / "vocab", num_codes=16, num_bins=64)
    return folder


def run(folder: Path, commands: list[list[str]]) -> list[str]:
    """What each command prints."""
    done = subprocess.run(
        [sys.executable, str(WORKER)], input=json.dumps(commands), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout.split(f"{MARK}\n")[1:]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_ANOTHER else []) for name in FORMS],
)
def test_real_rows_go_from_tsv_files_to_a_hand_in(name: str, given: Path, tmp_path: Path) -> None:
    task = DOWNSTREAM[name]
    write_recast(given / "shards", tmp_path, name, rows=6)
    answers = ["--answers", "answers.txt"] if task.candidates == "file" else []
    suffix = {"json": "json", "tsv": "tsv", "lines": "txt"}[task.hand_in_format]
    out = tmp_path / f"out.{suffix}"
    built, trained, judged, predicted = run(
        tmp_path,
        [
            ["shards", "build", "--task", name, "--out", "rows", *answers, f"{name}.tsv"],
            ["finetune", f"finetune-{name}-nano", "data.shards=rows", "data.heldout=rows",
             f"data.vocab={given / 'vocab'}", "run_dir=run", "batch.global_rows=6", "batch.micro_rows=3",
             *(f"train.{key}={STEPS}" for key in ("num_steps", "evaluate_every", "save_every"))],
            ["evaluate", "run", "--task", name, "--shards", "rows", "--json", "--png", "sheet.png"],
            ["predict", "run", "--task", name, "--shards", "rows", "--out", out.name],
        ],
    )  # fmt: skip
    rows = Shards(tmp_path / "rows").families["downstream"]
    assert f"{rows} rows" in built and f"done: {STEPS} steps" in trained and f"{out.name}: written" in predicted
    found = json.loads(judged.splitlines()[-1])["tasks"][name]
    assert found["examples"] == rows and task.metric in found["scores"], found
    assert {"own", "constant"} <= set(found["scores"][task.metric])
    assert list(tmp_path.glob("sheet*.png"))
    lines = out.read_text().splitlines()
    records = json.loads(out.read_text()) if suffix == "json" else lines[suffix == "tsv" :]
    assert len(records) == rows

"""The README's first command, cut short: from an empty folder to a picture of answers; a second time for nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ofa_ds.terms import TASKS

ROOT = Path(__file__).parents[2]


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OFA_DS_VENV": sys.prefix, "QUICKSTART_DIR": str(folder)}
    command = ["bash", str(ROOT / "launchers/quickstart.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_quick_start_ends_with_a_picture_and_scores_and_does_nothing_twice(tmp_path: Path) -> None:
    few_steps = ("train.num_steps=12", "train.save_every=6", "train.sample_every=12")
    first = quickstart(tmp_path, *few_steps)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    run = tmp_path / "runs/nano"
    assert str(run) in first.stdout.splitlines()[-1]
    assert Image.open(run / "tasks.png").size > (0, 0)
    scores = json.dumps(json.loads((run / "evaluation.json").read_text()))
    assert all(task in scores for task in TASKS)
    assert (run / "step_00000012/manifest.json").exists()
    made = (run / "step_00000012/manifest.json").stat().st_mtime_ns
    second = quickstart(tmp_path, *few_steps)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "already trained" in second.stdout and (run / "step_00000012/manifest.json").stat().st_mtime_ns == made
    other = quickstart(tmp_path, "train.num_steps=13")
    assert other.returncode == 2 and "--fresh" in other.stderr

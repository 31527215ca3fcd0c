"""Every downstream task from its embedded rows to its hand-in, by the commands of the page on fine-tuning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.terms import DOWNSTREAM_TASKS

pytestmark = pytest.mark.long

WORKER = Path(__file__).parent / "downstream_worker.py"


def test_every_task_goes_from_rows_to_a_hand_in(tmp_path: Path) -> None:
    """In one process, which has imported everything once."""
    done = subprocess.run([sys.executable, str(WORKER), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    judged = {each["task"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert tuple(judged) == DOWNSTREAM_TASKS
    for name, task in DOWNSTREAM.items():
        score = judged[name]["scores"][task.metric]
        assert judged[name]["examples"] == 4 and score["own"] is not None and score["constant"] is not None
        assert judged[name]["loss"]["own"] > 0
        folder = tmp_path / name
        assert (folder / "show.png").stat().st_size and (folder / "e.png").stat().st_size
        text = (folder / "predictions").read_text(encoding="utf-8")
        is_json, has_head = task.hand_in_format == "json", task.hand_in_format == "tsv"
        assert (len(json.loads(text)) if is_json else text.count("\n") - has_head) == 12

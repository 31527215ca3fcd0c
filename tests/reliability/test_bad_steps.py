"""A run whose loss is not finite ends with exit 1, names rows and the last good checkpoint, and destroys none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import old_checkpoint
import pytest

TIMEOUT_S = 240


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(old_checkpoint.FIXTURE, tmp_path, dirs_exist_ok=True)
    return tmp_path


def pretrain(folder: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "ofa_ds.pretrain", "run/recipe.toml", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_after_max_bad_steps_in_a_row_the_run_stops_and_keeps_what_was_good(old):
    """A confidence that fp32 cannot hold: the loss of every text row is infinite, on both ranks or on one."""
    before = sorted(path.name for path in Path(old, "run/step_00000004").iterdir())
    result = pretrain(
        old, "data.extra_confidence=1e39", "train.num_steps=20", "train.save_every=1", "train.keep=1",
        "train.max_bad_steps=3", 'train.accept_changed=["data.extra_confidence"]', ranks=2,
    )  # fmt: skip
    lines = result.stderr.splitlines()
    assert result.returncode == 1, result.stderr
    skipped = [line for line in lines if "nothing is learnt from it" in line]
    assert [line.split()[1] for line in skipped] == ["5", "6", "7"]
    assert all("the loss of micro-batch" in line and "rows: " in line and len(line) < 900 for line in skipped)
    assert any("3 steps in a row" in line and "step_00000004" in line for line in lines), result.stderr
    assert [path.name for path in sorted(Path(old, "run").glob("step_*"))] == ["step_00000004"]
    assert sorted(path.name for path in Path(old, "run/step_00000004").iterdir()) == before
    text = Path(old, "run/metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [json.loads(line)["loss"] for line in text.splitlines()][4:] == [None, None]


def test_what_one_rank_cannot_do_before_the_first_step_ends_all_at_once(old):
    """Rank 0 alone opens the metrics and the recipe: a file stands where run_dir should be."""
    Path(old, "file").write_text("")
    result = pretrain(old, "run_dir=file/run", ranks=2)
    assert result.returncode == 1
    told = [line for line in result.stderr.splitlines() if "file/run" in line and line.startswith("ofa-ds")]
    assert len(told) == 2 and any("rank 0: " in line for line in told), result.stderr

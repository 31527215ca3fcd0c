"""launchers/slurm/pretrain.sbatch says what it lacks; tests/multihost runs it under a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers/slurm/pretrain.sbatch"


def test_the_batch_script_asks_slurm_for_the_warning_that_it_waits_for() -> None:
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=B:USR1@" in text and "#SBATCH --requeue" in text
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.parametrize(
    ("variables", "arguments", "said"),
    [
        ({}, ["pretrain-nano"], "start it with sbatch"),
        ({"SLURM_JOB_ID": "1"}, [], "want RECIPE [KEY=VALUE ...], finetune RECIPE ..., or predict CHECKPOINT ..."),
        ({"SLURM_JOB_ID": "1", "OFA_DS_ROOT": "/nowhere"}, ["pretrain-nano"], "/nowhere is no checkout of ofa-ds"),
        ({"SLURM_JOB_ID": "1", "PYTHON": "no-python"}, ["pretrain-nano"], "PYTHON=no-python: no such program"),
    ],
)
def test_the_batch_script_says_what_it_lacks(
    tmp_path: Path, variables: dict[str, str], arguments: list[str], said: str
) -> None:
    env = {"PATH": os.environ["PATH"], "OFA_DS_ROOT": str(ROOT), "PYTHON": sys.executable, **variables}
    done = subprocess.run(["bash", SCRIPT, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pretrain.sbatch: {said}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", [
    "pretrain-nano train.num_steps=4", "pretrain pretrain-nano", "finetune finetune-vqa-nano run_dir=a",
    "predict runs/vqa --task vqa --shards vqa --out out.json",
])  # fmt: skip
def test_the_batch_script_hands_on_what_is_to_run_and_pretrains_where_that_is_not_said(
    tmp_path: Path, given: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\n')
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "OFA_DS_ROOT": str(ROOT), "PYTHON": str(python), "SLURM_JOB_ID": "1",
           "SLURM_JOB_NODELIST": "a"}  # fmt: skip
    subprocess.run(["bash", SCRIPT, *given.split()], cwd=tmp_path, env=env, check=True, capture_output=True)
    program = f"pretrain {given}" if given.startswith("pretrain-") else given
    assert (tmp_path / "words").read_text() == f"-m ofa_ds.cli launch --runner slurm --retries 3 -- {program}\n"

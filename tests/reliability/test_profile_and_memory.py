"""Two ranks: a traced window changes no bit and outlives Ctrl-C; one rank without memory ends both, in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import old_checkpoint
import pytest

from ofa_ds import beat

pytestmark = pytest.mark.long

TIMEOUT_S = 240


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(old_checkpoint.FIXTURE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "beats").mkdir()
    return tmp_path


def start(folder: Path, *program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", beat.DIRECTORY: str(folder / "beats")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_ctrl_c_within_a_traced_window_keeps_the_trace_and_no_bit_of_the_run_is_another(old):
    window = ["train.profile_steps=5:9000", "train.profile_ranks=[1]", "train.num_steps=6"]
    process = start(old, "-m", "ofa_ds.pretrain", "run/recipe.toml", *window)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert "profile: rank 0: of train.profile_steps 5:9000, steps 5 to 6 are this run's" in output
    assert "profile: rank 1: steps 6 to 6; run/profile/steps_6-6.rank_00001.json.gz" in output
    if old_checkpoint.arithmetic() == old_checkpoint.recorded()["arithmetic"]:
        for record, then in zip(records(old)[4:], old_checkpoint.recorded()["steps"], strict=True):
            assert {key: record[key] for key in then} == then, "as without a trace"
    process = start(
        old,
        "-m",
        "ofa_ds.pretrain",
        "run/recipe.toml",
        "train.profile_steps=8:9000",
        "train.num_steps=9000",
        "train.profile_ranks=[0]",
    )
    deadline = time.monotonic() + TIMEOUT_S
    while records(old)[-1]["step"] < 9:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    output, _ = process.communicate(timeout=TIMEOUT_S)
    (told,) = [line for line in output.splitlines() if "not to 9000: the run ended; run/profile/steps_8-" in line]
    last = int(told.partition("steps 8 to ")[2].partition(",")[0])
    assert last >= 9 and (old / f"run/step_{last:08d}").is_dir() and f"stopped at step {last}" in output
    assert (old / f"run/profile/steps_8-{last}.rank_00000.json.gz").is_file()


def test_one_rank_without_memory_says_what_filled_it_and_the_other_does_not_wait(old):
    worker = str(Path(__file__).parent / "out_of_memory_worker.py")
    process = start(old, worker, "1", "2", "run/recipe.toml", "train.num_steps=500")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    (told,) = [line for line in output.splitlines() if line.startswith("ofa-ds: ") and "out of memory" in line]
    for part in ("ofa-ds: rank 1 on ", " in step 6: ", "RLIMIT_AS (ulimit -v)", "; planned: ", " tokens, planned are "):
        assert part in told, part
    (report,) = (old / "run/out_of_memory").iterdir()
    assert report.name.startswith("step_00000006.rank_00001.") and str(report.relative_to(old)) in told
    text = report.read_text()
    assert "DeepSpeed's ipg buckets" in text and "saved for the backward by " in text
    assert "MiB  weights" in text and "moments of the optimizer" in text
    kept = json.loads((old / "beats/rank-1.error").read_text())
    assert f"ofa-ds: {kept['message']}" == told, "whoever watches the ranks tells the same line"
    assert [record["step"] for record in records(old)][-1] == 5

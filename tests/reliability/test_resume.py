"""A run that is killed goes on as if it had not been: same records, same bytes. Real ranks and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import scenes_shards
from safetensors.numpy import load_file

from ofa_ds.tasks.texts import train_from_shards

RANKS = 2
STEPS = 8
TIMEOUT_S = 240
TIMES = ("tokens_per_s", "examples_per_s", "step_ms", "data_wait_fraction", "peak_memory_MiB")
PACES = ("slowest_rank", "slowest_rank_excess")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes_shards.build(tmp_path_factory.mktemp("scenes"), rows=64)


def start(data: Path, run_dir: Path, *overrides: str) -> subprocess.Popen:
    """`RANKS` ranks of the nano recipe; an override replaces what is set here."""
    settings = [
        f"run_dir={run_dir}", f"data.shards={data / 'shards'}", f"data.vocab={data / 'vocab'}", "data.workers=0",
        "model.dropout=0.1", f"train.num_steps={STEPS}", "train.log_every=1", "train.save_every=4", *overrides,
    ]  # fmt: skip
    by_key = {setting.partition("=")[0]: setting for setting in settings}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--master-port", "0",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "ofa_ds.pretrain", "pretrain-nano",
        *by_key.values(),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def send(process: subprocess.Popen, number: signal.Signals) -> None:
    """To every rank and its workers, then to the launcher: it starts each rank in a session of its own."""
    launcher = psutil.Process(process.pid)
    for each in [*launcher.children(recursive=True), launcher]:
        each.send_signal(number)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    return output


def records(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in (*TIMES, *PACES)} for line in lines]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) == RANKS
    return {f"{file.name}:{name}": array.tobytes() for file in files for name, array in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("whole")
    finish(start(data, run_dir))
    return run_dir


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear in {TIMEOUT_S} s"
        time.sleep(0.01)


def test_every_record_has_all_promised_keys(whole):
    record = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    tasks = "caption vqa itm visual_grounding grounded_caption detection image_infilling text_infilling".split()
    promised = {"step", "loss", "lr", "grad_norm", *TIMES, *(f"loss/{task}" for task in tasks)}
    assert promised <= set(record)
    assert record["step"] == STEPS


def test_kill_9_after_a_checkpoint_then_the_same_command_gives_the_same_bytes(data, whole, tmp_path):
    process = start(data, tmp_path)
    wait_for(tmp_path / "step_00000004" / "manifest.json", process)
    send(process, signal.SIGKILL)
    process.communicate()
    output = finish(start(data, tmp_path))
    assert "step 5/8" in output
    assert records(tmp_path) == records(whole)
    assert tensors(tmp_path / "step_00000008") == tensors(whole / "step_00000008")


def test_sigterm_saves_at_the_next_step_and_the_same_command_goes_on_to_the_same_bytes(data, whole, tmp_path):
    process = start(data, tmp_path, "train.save_every=1000")
    while "step 2/8" not in (process.stdout.readline() or "step 2/8"):
        pass
    send(process, signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_S)
    assert list(tmp_path.glob("step_0000000[2-7]")), "SIGTERM left no checkpoint"
    finish(start(data, tmp_path))
    assert tensors(tmp_path / "step_00000008") == tensors(whole / "step_00000008")


def test_another_vocabulary_refuses_to_resume_and_says_so(data, whole, tmp_path):
    train_from_shards(data / "shards", size=310, out=tmp_path / "vocab", num_codes=118, num_bins=64)
    other = (f"data.vocab={tmp_path / 'vocab'}", "train.num_steps=9")
    process = start(data, whole, *other)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert "was trained with vocab" in output and "train.accept_changed" in output
    assert "done: 9 steps" in finish(start(data, whole, *other, 'train.accept_changed=["vocab"]'))

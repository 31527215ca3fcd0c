"""A run that is killed goes on as if it had not been: same records, same bytes. Real ranks and signals."""

import json
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import scenes_shards
from two_ranks import TIMEOUT_S, TIMES, finish, kill, records, send, start, tensors, wait_for

from ofa_ds.tasks.texts import train_from_shards
from ofa_ds.train.report_attempt import read_attempts

pytestmark = pytest.mark.long

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes_shards.build(tmp_path_factory.mktemp("scenes"), rows=64)


def begin(data: Path, run_dir: Path, *overrides: str) -> subprocess.Popen:
    """Two ranks of the nano recipe; an override replaces what is set here."""
    return start("pretrain", "pretrain-nano", [
        f"run_dir={run_dir}", f"data.shards={data / 'shards'}", f"data.vocab={data / 'vocab'}", "data.workers=0",
        "model.dropout=0.1", f"train.num_steps={STEPS}", "train.log_every=1", "train.save_every=4", *overrides,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("whole")
    finish(begin(data, run_dir))
    return run_dir


def test_every_record_has_all_promised_keys(whole):
    record = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    tasks = "caption vqa itm visual_grounding grounded_caption detection image_infilling text_infilling".split()
    promised = {"step", "loss", "lr", "grad_norm", "padding_fraction", "skipped_steps", *TIMES}
    promised |= {f"{kind}/{task}" for task in tasks for kind in ("loss", "examples_per_s")}
    assert promised <= set(record)
    assert "mfu" not in record, "nobody knows the peak of this CPU"
    assert record["step"] == STEPS


def test_kill_9_after_a_checkpoint_then_the_same_command_gives_the_same_bytes(data, whole, tmp_path):
    process = begin(data, tmp_path)
    wait_for(tmp_path / "step_00000004" / "manifest.json", process)
    kill(process)
    output = finish(begin(data, tmp_path))
    assert "step 5/8" in output
    assert [(each.first_step, each.problems) for each in read_attempts(tmp_path)] == [(0, ()), (4, ())]
    assert records(tmp_path) == records(whole)
    assert tensors(tmp_path / "step_00000008") == tensors(whole / "step_00000008")
    assert len(list(whole.glob("step_00000008/*.safetensors"))) == 2


def test_sigterm_saves_at_the_next_step_and_the_same_command_goes_on_to_the_same_bytes(data, whole, tmp_path):
    process = begin(data, tmp_path, "train.save_every=1000")
    while "step 2/8" not in (process.stdout.readline() or "step 2/8"):
        pass
    send(process, signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_S)
    assert list(tmp_path.glob("step_0000000[2-7]")), "SIGTERM left no checkpoint"
    finish(begin(data, tmp_path))
    assert tensors(tmp_path / "step_00000008") == tensors(whole / "step_00000008")


def fork_servers_and_workers(process: subprocess.Popen) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Of all ranks. Workers are the fork servers' children, by the same name."""
    servers, workers = [], []
    with suppress(psutil.NoSuchProcess):
        for each in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "multiprocessing.forkserver" in " ".join(each.cmdline()):
                    own = "multiprocessing.forkserver" in " ".join(each.parent().cmdline())
                    (workers if own else servers).append(each)
    return servers, workers


def test_workers_that_are_killed_in_the_middle_of_it_change_no_byte(data, whole, tmp_path):
    process, chance, killed = begin(data, tmp_path, "data.workers=2"), random.Random(3), 0
    while process.poll() is None and killed < 6:  # more in a row could strike one batch too often
        time.sleep(chance.random() * 0.3)
        _, workers = fork_servers_and_workers(process)
        if len(workers) == 4:
            with suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
                killed += 1
    output = finish(process)
    assert killed >= 2 and "was ended by SIGKILL" in output and "makes the same batch" in output
    assert records(tmp_path) == records(whole)
    assert tensors(tmp_path / "step_00000008") == tensors(whole / "step_00000008")


def test_a_sigterm_to_ranks_workers_and_fork_servers_saves_and_leaves_no_process(data, whole, tmp_path):
    process = begin(data, tmp_path, "data.workers=1", "train.save_every=1000")
    while "step 2/8" not in (process.stdout.readline() or "step 2/8"):
        pass
    servers, workers = fork_servers_and_workers(process)
    assert len(servers) == len(workers) == 2
    send(process, signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_S)
    assert list(tmp_path.glob("step_0000000[2-7]")), "SIGTERM left no checkpoint"
    assert not psutil.wait_procs([*servers, *workers], timeout=10)[1]
    finish(begin(data, tmp_path, "data.workers=1"))
    assert tensors(tmp_path / "step_00000008") == tensors(whole / "step_00000008")


def test_another_vocabulary_refuses_to_resume_and_says_so(data, whole, tmp_path):
    train_from_shards(data / "shards", size=310, out=tmp_path / "vocab", num_codes=118, num_bins=64)
    other = (f"data.vocab={tmp_path / 'vocab'}", "train.num_steps=9")
    process = begin(data, whole, *other)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert "was trained with vocab" in output and "train.accept_changed" in output
    assert "done: 9 steps" in finish(begin(data, whole, *other, 'train.accept_changed=["vocab"]'))

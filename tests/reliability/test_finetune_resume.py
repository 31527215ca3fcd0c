"""A fine-tuning run that is killed goes on as if it had not been, best checkpoint and moving average included; also on
another number of ranks and at another ZeRO stage. Real ranks and signals."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from two_ranks import finish, kill, start, tensors, wait_for

from ofa_ds.checkpoint import load_model_weights
from ofa_ds.checkpoint.runs import find
from ofa_ds.data.scenes_tasks import write_task_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import train_vocab
from ofa_ds.tasks.task import row_texts
from ofa_ds.tasks.task_shards import build_task_shards

pytestmark = pytest.mark.long

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with a list of answers: 40 to learn from, 12 to judge by, and a vocabulary."""
    folder, texts = tmp_path_factory.mktemp("vqa"), []
    for split, rows in (("train", 40), ("heldout", 12)):
        file = write_task_scenes(folder / split, "vqa", rows, seed=1, split=split)
        answers = folder / "train" / "answers.txt"
        build_task_shards(folder / f"{split}_shards", "vqa", [file], answers=answers, held_out=split == "heldout",
                          workers=1)  # fmt: skip
        shards = Shards(folder / f"{split}_shards")
        texts += [text for i in range(rows) for text in row_texts("downstream", shards.row("downstream", i))]
        texts += [f" {answer}" for answer in shards.answers]
    train_vocab(texts * 2, 400, folder / "vocab", num_codes=16, num_bins=65)
    return folder


def begin(data: Path, run_dir: Path, *overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
    return start("finetune", "finetune-vqa-nano", [
        f"run_dir={run_dir}", f"data.shards={data / 'train_shards'}", f"data.heldout={data / 'heldout_shards'}",
        f"data.vocab={data / 'vocab'}", "data.workers=0", "optim.eps=1e-6",
        "batch.global_rows=8", "batch.micro_rows=2", "train.num_epochs=1.5", "train.evaluate_every=3",
        "train.evaluate_rows=12", "train.log_every=1", "train.save_every=4", "train.keep=1", "optim.ema_decay=0.5",
        "criterion.drop_worst_ratio=0.2", "criterion.rdrop_alpha=0.5", 'optim.freeze=["token_embedding"]', *overrides,
    ], ranks=ranks)  # fmt: skip


def records(run_dir: Path, kind: str) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    keys = {"loss": ("step", "loss", "loss/vqa", "lr", "grad_norm"), "heldout": ("step", "heldout/soft accuracy")}[kind]
    return [{key: line[key] for key in keys} for line in lines if keys[1] in line]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    finish(begin(data, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed once its first best checkpoint was there."""
    run_dir = tmp_path_factory.mktemp("killed")
    process = begin(data, run_dir)
    wait_for(run_dir / "best", process)
    kill(process)
    return run_dir


def best_of(run_dir: Path) -> int:
    """The first step of the highest score."""
    scores = records(run_dir, "heldout")
    return int(max(scores, key=lambda each: (each["heldout/soft accuracy"], -each["step"]))["step"])


def test_rows_are_judged_on_time_and_the_best_checkpoint_stays_beside_the_newest(whole):
    assert [each["step"] for each in records(whole, "heldout")] == [3, 6, 8]
    assert find(whole / "best").name == f"step_{best_of(whole):08d}" and find(whole).name == "step_00000008"
    assert {path.name for path in whole.glob("step_*")} == {f"step_{best_of(whole):08d}", "step_00000008"}
    assert len(records(whole, "loss")) == STEPS


def test_kill_9_then_the_same_command_gives_the_same_bytes_scores_and_best(data, whole, killed, tmp_path):
    run_dir = shutil.copytree(killed, tmp_path / "run")
    finish(begin(data, run_dir))
    assert records(run_dir, "loss") == records(whole, "loss")
    assert records(run_dir, "heldout") == records(whole, "heldout")
    assert (run_dir / "best").read_text() == (whole / "best").read_text()
    assert tensors(run_dir / "step_00000008") == tensors(whole / "step_00000008")


def test_a_run_goes_on_on_one_rank_at_another_stage(data, whole, killed, tmp_path):
    run_dir = shutil.copytree(killed, tmp_path / "run")
    finish(begin(data, run_dir, "deepspeed=zero1", ranks=1))
    assert [each["step"] for each in records(run_dir, "heldout")] == [3, 6, 8]
    for average in (False, True):
        ours, theirs = (load_model_weights(each, average=average) for each in (run_dir, whole))
        begun = load_model_weights(killed, average=average)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5, msg=name)
        moved = max((tensor - begun[name]).abs().max().item() for name, tensor in theirs.items())
        assert moved > 30 * 2e-5

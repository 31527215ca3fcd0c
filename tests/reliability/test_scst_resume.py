"""Self-critical training that is killed goes on as if it had not been: searches, rewards and weights alike."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from two_ranks import finish, kill, records, start, tensors, wait_for

from ofa_ds.checkpoint import load_model_weights
from ofa_ds.data.scenes_tasks import write_task_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import train_vocab
from ofa_ds.tasks.task import row_texts
from ofa_ds.tasks.task_shards import build_task_shards

pytestmark = pytest.mark.long

STEPS = 6


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions, a vocabulary, and a model that has begun to say them, so that there is a reward."""
    folder = tmp_path_factory.mktemp("captions")
    for task in ("caption", "caption_scst"):
        build_task_shards(folder / task, task, [write_task_scenes(folder, task, 24, seed=1)], workers=1)
    shards = Shards(folder / "caption")
    texts = [text for i in range(24) for text in row_texts("downstream", shards.row("downstream", i))]
    train_vocab(texts * 2, 300, folder / "vocab", num_codes=16, num_bins=65)
    finish(start("finetune", "finetune-caption-nano", [
        f"run_dir={folder / 'stage1'}", f"data.shards={folder / 'caption'}", f"data.vocab={folder / 'vocab'}",
        "data.workers=0", "batch.global_rows=12", "batch.micro_rows=6", "optim.peak_lr=3e-3", "train.num_steps=60",
        "train.evaluate_every=0",
    ]))  # fmt: skip
    return folder


def begin(stage1: Path, run_dir: Path, *overrides: str, ranks: int = 2) -> subprocess.Popen[str]:
    return start("finetune", "finetune-caption_scst-nano", [
        f"run_dir={run_dir}", f"data.shards={stage1 / 'caption_scst'}", f"data.vocab={stage1 / 'vocab'}",
        f"train.init_from={stage1 / 'stage1'}", "data.workers=0", "batch.global_rows=8", "batch.micro_rows=2",
        "criterion.scst_max_tokens=12", f"train.num_steps={STEPS}", "train.save_every=2", "train.log_every=1",
        "train.evaluate_every=0", "optim.peak_lr=1e-3", "model.dropout=0.1", *overrides,
    ], ranks=ranks)  # fmt: skip


@pytest.fixture(scope="module")
def whole(stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("whole")
    finish(begin(stage1, run_dir))
    return run_dir


def test_there_is_something_to_learn_from(stage1: Path, whole: Path) -> None:
    assert min(record["reward"] for record in records(whole)) > 0.1
    before, after = load_model_weights(stage1 / "stage1"), load_model_weights(whole)
    assert max((after[name] - tensor).abs().max() for name, tensor in before.items()) > 1e-3


def test_kill_9_then_the_same_command_gives_the_same_rewards_and_bytes(stage1: Path, whole: Path, tmp_path: Path):
    process = begin(stage1, tmp_path)
    wait_for(tmp_path / "step_00000002" / "manifest.json", process)
    kill(process)
    assert not (tmp_path / f"step_{STEPS:08d}").exists(), "killed in time"
    assert "done: 6 steps" in finish(begin(stage1, tmp_path))
    assert records(tmp_path) == records(whole) and len(records(whole)) == STEPS
    assert tensors(tmp_path / f"step_{STEPS:08d}") == tensors(whole / f"step_{STEPS:08d}")

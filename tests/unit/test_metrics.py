"""metrics.jsonl holds each step once, also after a crash and a resume; window means are over steps and tokens."""

import json
import math
import re
import resource
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ofa_ds.terms import TASKS
from ofa_ds.train import trainer
from ofa_ds.train.metrics import Window
from ofa_ds.train.report import MetricsWriter

VALUES = {"loss": 1.0, "lr": 1e-3, "grad_norm": 2.0, "examples_per_s": 3.0, "step_ms": 4.0, "data_wait_fraction": 0.0}


def test_a_resumed_run_rewrites_the_records_after_its_checkpoint_and_drops_a_torn_line(tmp_path):
    writer = MetricsWriter(tmp_path, num_steps=8, first_step=0)
    for step in (2, 4, 6):
        writer.write(step, VALUES)
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    writer = MetricsWriter(tmp_path, num_steps=8, first_step=4)
    writer.write(6, VALUES)
    writer.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]


def test_a_task_without_tokens_is_null_not_zero(tmp_path):
    writer = MetricsWriter(tmp_path, num_steps=1, first_step=0)
    writer.write(1, {**VALUES, "loss/vqa": math.nan})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss/vqa"] is None


def test_window_means_are_per_step_for_the_loss_and_per_token_for_tasks():
    window = Window(torch.device("cpu"))
    for _ in range(2):
        sums = torch.zeros(len(TASKS), 4)
        sums[1] = torch.tensor([9.0, 6.0, 1.0, 4.0])
        window.add_micro_batch(sums, torch.tensor(3.0), num_tokens=10, num_examples=2)
        window.end_step()
    values = window.close(lambda tensor: None)
    assert values["loss"] == 3.0
    assert values["loss/vqa"] == 1.5
    assert math.isnan(values["loss/caption"])
    assert window.num_steps == 0


def test_a_skipped_step_is_in_no_mean_and_a_window_of_skipped_steps_has_no_loss():
    window = Window(torch.device("cpu"))

    def step(loss: float, *, counted: bool) -> None:
        sums = torch.full((len(TASKS), 4), loss)
        window.add_micro_batch(sums, torch.tensor(loss), num_tokens=10, num_examples=2)
        window.end_step(counted=counted)

    step(math.nan, counted=False)
    step(3.0, counted=True)
    step(math.inf, counted=False)
    values = window.close(lambda tensor: None)
    assert values["loss"] == 3.0 and values["loss/vqa"] == 1.0
    step(math.nan, counted=False)
    assert math.isnan(window.close(lambda tensor: None)["loss"])


def test_no_record_holds_what_json_has_no_word_for(tmp_path):
    writer = MetricsWriter(tmp_path, num_steps=1, first_step=0)
    writer.write(1, {**VALUES, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    writer.close()

    def refused(text):
        raise AssertionError(text)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refused)
    assert record["loss"] is record["grad_norm"] is record["lr"] is None


def events(folder):
    """(step, tag, value or size of the picture) of each event as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = [(e.step, tag, e.value) for tag in found.Tags()["scalars"] for e in found.Scalars(tag)]
    images = [(e.step, tag, (e.height, e.width)) for tag in found.Tags()["images"] for e in found.Images(tag)]
    return scalars + images


def test_tensorboard_reads_what_was_written_and_a_resumed_run_replaces_its_steps(tmp_path):
    for first, last in ((0, 4), (2, 5)):
        writer = MetricsWriter(tmp_path, num_steps=5, first_step=first)
        for step in range(first + 1, last + 1):
            writer.write(step, {**VALUES, "loss": float(first), "loss/vqa": math.nan})
        writer.picture(last, "sample/vqa", np.zeros((3, 5, 3), np.uint8))
        writer.close()
        (file,) = (tmp_path / "tensorboard").glob("events*.0")
        file.rename(file.with_name(f"events.tfevents.of_{first}"))  # as one of another second
    found = events(tmp_path / "tensorboard")
    assert [(step, value) for step, tag, value in found if tag == "loss"] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]
    assert [value for step, tag, value in found if tag == "sample/vqa"] == [(3, 5)]
    assert not [tag for _, tag, _ in found if tag == "loss/vqa"]


def block(path, how):
    """Make it impossible to write at `path`."""
    if how == "directory":
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/full" if how == "full" else path.parent / "no" / "such" / "place")


@pytest.mark.parametrize("how", ["directory", "full", "nowhere"])
def test_metrics_that_cannot_be_written_are_told_once_with_the_path_and_counted(tmp_path, capsys, how):
    block(tmp_path / "metrics.jsonl", how)
    writer = MetricsWriter(tmp_path, num_steps=3, first_step=0)
    for step in (1, 2, 3):
        writer.write(step, VALUES)
    writer.close()
    first, last = [line for line in capsys.readouterr().err.splitlines() if "metrics" in line]
    assert str(tmp_path / "metrics.jsonl") in first and "training goes on" in first
    assert str(tmp_path / "metrics.jsonl") in last and re.search("not written [34] times", last)
    assert len(events(tmp_path / "tensorboard")) == 3 * len(VALUES), "the other place is none the worse"


def test_a_tensorboard_that_cannot_be_written_is_told_once_with_the_path(tmp_path, capsys):
    before = {*threading.enumerate()}
    (tmp_path / "tensorboard").write_text("a file where the directory should be")
    writer = MetricsWriter(tmp_path, num_steps=2, first_step=0)
    for step in (1, 2):
        writer.write(step, VALUES)
        writer.picture(step, "sample/vqa", np.zeros((3, 5, 3), np.uint8))
    writer.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "tensorboard" in line]
    assert len(lines) == 2 and "not written 5 times" in lines[1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert {*threading.enumerate()} <= before


def test_a_disk_that_is_full_for_a_while_leaves_no_half_record(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, num_steps=4, first_step=0)
    writer.write(1, VALUES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 40, limits[1]))
    writer.write(2, VALUES)  # half of it would fit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)
    writer.write(3, VALUES)
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 3]
    assert {step for step, _, _ in events(tmp_path / "tensorboard")} == {1, 3}
    assert capsys.readouterr().err.count("cannot be written") == 2, "once for each place"


def test_further_means_of_an_objective_are_in_the_log_over_all_ranks_and_only_of_steps_that_count():
    window = Window(torch.device("cpu"), logged=("score",))
    sums = torch.zeros(len(TASKS), 4)
    for total, counted in ((6.0, True), (100.0, False)):
        logged = torch.tensor([[total, 3.0]])
        window.add_micro_batch(sums, torch.tensor(1.0), num_tokens=1, num_examples=1, logged=logged)
        window.end_step(counted=counted)
    assert window.close(lambda tensor: tensor.mul_(2))["score"] == 2.0
    assert math.isnan(window.close(lambda tensor: tensor)["score"])


def test_norm_and_sums_are_read_once_a_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    class Engine:
        device, lr = torch.device("cpu"), 0.1

        @property
        def grad_norm(self) -> float:
            reads.append("norm")
            return 1.0

        def all_reduce(self, sums: Tensor) -> Tensor:
            reads.append("sums")
            return sums

    parts = SimpleNamespace(
        recipe=SimpleNamespace(train=SimpleNamespace(log_every=4, num_steps=9, sample_every=0, histograms_every=0)),
        engine=Engine(),
        window=Window(Engine.device), loader=SimpleNamespace(wait_seconds=0.0), slow=SimpleNamespace(slowest=None),
        corrupt=SimpleNamespace(taken=lambda: 0), writer=None,
    )  # fmt: skip
    monkeypatch.setattr(Tensor, "item", lambda x: reads.append("item"))
    for step in range(1, 10):
        parts.window.add_micro_batch(torch.ones(len(TASKS), 4), torch.tensor(2.0), num_tokens=3, num_examples=1)
        parts.window.end_step()
        trainer._report(parts, step)
    assert sorted(reads) == ["norm"] * 3 + ["sums"] * 3

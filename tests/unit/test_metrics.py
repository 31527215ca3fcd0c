"""metrics.jsonl holds each step once, also after a crash and a resume; window means are over steps and tokens."""

import json
import math

import torch

from ofa_ds.train.metrics import MetricsWriter, Window

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
        sums = torch.zeros(8, 4)
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
        sums = torch.full((8, 4), loss)
        window.add_micro_batch(sums, torch.tensor(loss), num_tokens=10, num_examples=2)
        window.end_step(counted=counted)

    step(math.nan, counted=False)
    step(3.0, counted=True)
    step(math.inf, counted=False)
    values = window.close(lambda tensor: None)
    assert values["loss"] == 3.0 and values["loss/vqa"] == 1.0
    step(math.nan, counted=False)
    assert math.isnan(window.close(lambda tensor: None)["loss"])

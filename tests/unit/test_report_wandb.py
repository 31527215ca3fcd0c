"""Weights & Biases gets the records where it is installed; absent, broken or hanging it ends and delays no run."""

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ofa_ds.train.report import MetricsWriter
from ofa_ds.train.report_wandb import ID, Wandb

VALUES = {"loss": 1.0, "lr": 1e-3, "grad_norm": 2.0, "examples_per_s": 3.0, "step_ms": 4.0, "data_wait_fraction": 0.0}


class Fake(ModuleType):
    """The calls of wandb that we make."""

    def __init__(self, log: Any = None, init: Any = None) -> None:
        super().__init__("wandb")
        self.records: list[dict[str, Any]] = []
        self.begun: list[dict[str, Any]] = []
        self.finished = 0
        self._log, self._init = log or self.records.append, init
        self.Image = lambda array: array.shape

    def init(self, **options: Any) -> SimpleNamespace:
        if self._init is not None:
            self._init()
        self.begun.append(options)
        return SimpleNamespace(log=self._log, finish=self._finish, define_metric=lambda *_, **options: None, url=None)

    def _finish(self) -> None:
        self.finished += 1


def written(run_dir: Path, steps: int = 3, *, end_s: float = 5.0) -> float:
    """A run of some records with W&B beside; seconds that it took until its last record."""
    writer = MetricsWriter(
        run_dir, num_steps=9, first_step=0, wandb=Wandb("ofa", run_dir, {"recipe": {"a": 1}}, end_s=end_s)
    )
    began = time.perf_counter()
    for step in range(1, steps + 1):
        writer.write(step, {**VALUES, "loss/vqa": math.nan})
    seconds = time.perf_counter() - began
    writer.close()
    return seconds


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    module = Fake()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_records_scores_and_pictures_arrive_in_order_with_their_step_and_without_nan(
    fake: Fake, tmp_path: Path
) -> None:
    writer = MetricsWriter(tmp_path, num_steps=9, first_step=0, wandb=Wandb("ofa", tmp_path, {"recipe": {"a": 1}}))
    writer.write(1, {**VALUES, "loss/vqa": math.nan})
    writer.scores(1, {"heldout/accuracy": 0.5})
    writer.picture(2, "sample/vqa", np.zeros((3, 5, 3), np.uint8))
    writer.close()
    assert fake.records == [
        {"step": 1, **VALUES}, {"step": 1, "heldout/accuracy": 0.5}, {"step": 2, "sample/vqa": (3, 5, 3)},
    ]  # fmt: skip
    (options,) = fake.begun
    assert options["project"] == "ofa" and options["config"] == {"recipe": {"a": 1}} and fake.finished == 1


def test_a_run_that_is_gone_on_with_is_the_same_one_there_and_another_run_is_another(
    fake: Fake, tmp_path: Path
) -> None:
    for run_dir in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        run_dir.mkdir(exist_ok=True)
        written(run_dir)
    first, again, other = (options["id"] for options in fake.begun)
    assert first == again != other and (tmp_path / "a" / ID).read_text().strip() == first
    assert all(options["resume"] == "allow" for options in fake.begun)


def test_where_it_is_not_installed_that_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    written(tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert "is not installed; pip install wandb" in lines[0] and len(lines) <= 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("where", ["init", "log"])
def test_where_it_fails_that_is_told_once_counted_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def fail(*_: Any) -> None:
        raise (SystemExit if where == "init" else OSError)("no\nnetwork")

    monkeypatch.setitem(sys.modules, "wandb", Fake(**{where: fail}))
    written(tmp_path)
    first, *rest = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert "no network" in first and "training goes on" in first
    assert rest == ["metrics: W&B project ofa: 3 records were not taken: they are in metrics.jsonl alone"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_where_it_hangs_no_step_waits_and_the_end_waits_as_long_as_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    going_on = threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", Fake(init=lambda: going_on.wait(20)))
    began = time.perf_counter()
    written(tmp_path, steps=1200, end_s=0.2)
    assert time.perf_counter() - began < 15
    going_on.set()
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(10)
            assert not thread.is_alive(), "what was given up ends when it can"
    lines = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert "1000 records behind" in lines[0] and "does not answer within 0 s; 1000 records are not sent" in lines[-1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1200

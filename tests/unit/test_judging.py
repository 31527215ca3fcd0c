"""Held-out rows are judged while a run trains: every task by its own score, the same on any number of ranks."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import task_models
import torch

from ofa_ds.data.shards import Shards
from ofa_ds.inference.evaluate import judge_tasks
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.terms import DOWNSTREAM_TASKS
from ofa_ds.train.judging import HeldOut

ROWS = 7


class Ranks(NamedTuple):
    rank: int
    world_size: int


class Engine:
    """A whole model on each of some threads: what a judgement asks of an engine."""

    has_average = False

    def __init__(self, loaded: LoadedModel, rank: int, meeting: threading.Barrier, table: dict[int, Any]) -> None:
        self._model, self._meeting, self._table = loaded.model, meeting, table
        self.ranks = Ranks(rank, meeting.parties)

    @contextmanager
    def gathered(self, *, average: bool) -> Iterator[torch.nn.Module]:
        yield self._model

    def gather(self, value: Any) -> list[Any]:
        self._table[self.ranks.rank] = value
        self._meeting.wait()
        found = [self._table[rank] for rank in range(self.ranks.world_size)]
        self._meeting.wait()
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tasks")
    task_models.build(found, ROWS)
    return found


def judges_of(folder: Path, task: str, ranks: int, metric: str = "") -> list[HeldOut]:
    loaded = task_models.model_of(folder, task)
    train = dataclasses.replace(loaded.recipe.train, evaluate_rows=ROWS, best_metric=metric)
    recipe = dataclasses.replace(loaded.recipe, train=train)
    shards = Shards(folder / task)
    meeting, table = threading.Barrier(ranks), {}
    return [
        HeldOut(Engine(loaded, rank, meeting, table), recipe, loaded.model.config, loaded.vocab, held_out=shards,
                trained=shards)
        for rank in range(ranks)
    ]  # fmt: skip


def judged(judges: list[HeldOut]) -> list[dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    threads = [threading.Thread(target=lambda k=k, each=each: found.update({k: each.judge(1)}))
               for k, each in enumerate(judges)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[k] for k in range(len(judges))]


@pytest.mark.parametrize("task", DOWNSTREAM_TASKS)
def test_every_task_has_the_score_by_which_its_best_checkpoint_is_chosen(folder, task):
    (judge,) = judges_of(folder, task, 1)
    assert judge.metric == DOWNSTREAM[task].metric and judge.metric


@pytest.mark.parametrize("task", ["vqa", "refcoco", "sst2"])
def test_a_judgement_is_that_of_evaluate_on_any_number_of_ranks(folder, task):
    loaded = task_models.model_of(folder, task)
    scores = judge_tasks(loaded, Shards(folder / task), tasks=[task], rows=ROWS, blind=False)[task]["scores"]
    want = {name: score["own"] for name, score in scores.items() if score["own"] is not None}
    for ranks in (1, 3, ROWS + 1):
        for found in judged(judges_of(folder, task, ranks)):
            assert found == pytest.approx(want), ranks


def test_a_metric_that_the_task_has_not_is_refused_with_those_that_it_has(folder):
    with pytest.raises(ValueError, match="train.best_metric 'CIDEr': want one of accuracy"):
        judges_of(folder, "sst2", 1, "CIDEr")

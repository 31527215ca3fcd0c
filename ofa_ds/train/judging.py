"""Judgements of held-out rows while a run trains, and which checkpoint was the best by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ofa_ds.config import Recipe
from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab
from ofa_ds.engine.engine import Engine
from ofa_ds.inference.answering import answer
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.model.config import ModelConfig
from ofa_ds.tasks.task import DOWNSTREAM, DOWNSTREAM_FAMILY, candidates_of, context_of, examples_of

ROWS_AT_ONCE = 64
"""Whose pictures a rank holds together."""


class HeldOut:
    """The first rows of data.heldout, as the task asks them; all ranks share the work.

    Where a moving average of the weights is kept, it is judged.
    """

    def __init__(
        self, engine: Engine, recipe: Recipe, model: ModelConfig, vocab: Vocab, *, held_out: Shards, trained: Shards
    ) -> None:
        """trained: the shards of training, whose list of answers counts where the held-out ones have none.

        Raises ValueError: train.best_metric is none of the task's scores, or there is no row.
        """
        self._engine, self._recipe, self._vocab, self._shards = engine, recipe, vocab, held_out
        self._task = task = DOWNSTREAM[recipe.data.task.name]
        sizes = {"patch_size": model.patch_size, "max_positions": model.max_positions}
        ctx = context_of(held_out, vocab, recipe.data, split="heldout", **sizes)
        answers = held_out.answers or trained.answers
        self._ctx = dataclasses.replace(ctx, candidates=candidates_of(task.name, answers, vocab))
        numbers = held_out.rows_of_types(DOWNSTREAM_FAMILY, task.row_types)
        self._rows = [row for _, row in zip(range(recipe.train.evaluate_rows), numbers, strict=False)]
        self.metric = recipe.train.best_metric or task.metric
        if not self._rows:
            raise ValueError(f"data.heldout {held_out.path}: has no row of {task.name}")
        names = task.judge(self._ctx, self._examples(self._rows[0]), [[]]) if task.judge else {}
        if self.metric not in names:
            raise ValueError(f"train.best_metric {self.metric!r}: want one of {', '.join(names)}")

    def judge(self, step: int) -> dict[str, float]:
        """The scores of the model as it is after step `step`; the same on all ranks, which call it together."""
        engine, ranks = self._engine, self._engine.ranks
        found: list[tuple[Example, list[int]]] = []
        with engine.gathered(average=engine.has_average) as model:
            loaded = LoadedModel(model=model, vocab=self._vocab, recipe=self._recipe, step=step)
            mine = self._rows[ranks.rank :: ranks.world_size]
            candidates = self._ctx.candidates if self._recipe.data.task.constrained else None
            for start in range(0, len(mine), ROWS_AT_ONCE):
                asked = [example for row in mine[start : start + ROWS_AT_ONCE] for example in self._examples(row)]
                answers = answer(loaded, asked, self._task, candidates=candidates)
                seen = (dataclasses.replace(example, image=None) for example in asked)
                found += zip(seen, answers, strict=True)
        everyone = [pair for part in engine.gather(found) for pair in part]
        scores: Mapping[str, float | None] = {}
        if ranks.rank == 0 and self._task.judge is not None:
            scores = self._task.judge(self._ctx, [pair[0] for pair in everyone], [pair[1] for pair in everyone])
        return {name: float(value) for name, value in engine.gather(scores)[0].items() if value is not None}

    def _examples(self, row: int) -> list[Example]:
        return examples_of(self._shards, [self._task.name], DOWNSTREAM_FAMILY, row, self._ctx)


class Best:
    """Which judged step was the best so far; the checkpoints know, and so what resumes."""

    def __init__(self, known: object = None) -> None:
        """known: what the checkpoint that is gone on from says of it."""
        self.record: dict[str, Any] | None = known if _is_record(known) else None
        """{"step", "metric", "value"}."""
        self._kept = self.record
        """The best one that is known to be a checkpoint."""
        self._unsettled: dict[int, dict[str, Any]] = {}

    def is_better(self, step: int, metric: str, value: float | None) -> bool:
        """Whether step `step` is the best by this metric so far, which it then is; a higher value is better."""
        if value is None or value != value:
            return False
        same = self.record is not None and self.record["metric"] == metric
        if same and value <= self.record["value"]:
            return False
        self.record = self._unsettled[step] = {"step": step, "metric": metric, "value": value}
        return True

    def settle(self, saved: Mapping[int, bool]) -> None:
        """saved: whether the save of a step became a checkpoint. Where the best one's did not, the one before is it:
        the newest of the best ones that did."""
        for step, is_checkpoint in saved.items():
            record = self._unsettled.pop(step, None)
            if record is not None and is_checkpoint:
                self._kept = record
            elif record is not None and record is self.record:
                self.record = self._kept


def _is_record(known: object) -> bool:
    return (
        isinstance(known, dict)
        and isinstance(known.get("step"), int)
        and isinstance(known.get("metric"), str)
        and isinstance(known.get("value"), (int, float))
    )

"""What a step learns from: one object for a recipe, which `train_step` asks and which no step need know more of.

A step has three parts, so that its gradient is that of one process on the whole global batch:

    prepare   each micro-batch: what it is to be divided by is known before any backward
    (train_step sums these counts over micro-batches and ranks)
    loss      of one micro-batch: its share of the step's loss, already divided by the global counts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ofa_ds.batch import Batch, repeated
from ofa_ds.config import Recipe
from ofa_ds.engine.engine import Engine
from ofa_ds.model.allowed_ids import allowed_ids, allowed_mask
from ofa_ds.terms import GROUPS
from ofa_ds.train.criteria import Criterion, kept_tokens, selected_loss
from ofa_ds.train.loss import group_counts, group_sums, task_sums


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A micro-batch before its forward."""

    batch: Batch
    counts: Tensor
    """float64 [C] on the CPU, the same C in every step: what divides, such as the number of tokens with a loss."""
    more: Any = None
    """What the objective keeps for its own `loss`."""


class MicroLoss(NamedTuple):
    """Of one micro-batch."""

    loss: Tensor
    """Scalar: its share of the step's loss, divided by global counts."""
    task_sums: Tensor
    """[K, 4] as `train.loss.task_sums` has it; for the log."""
    logged: Tensor | None = None
    """[L, 2] (sum, count) of each of `Objective.logged`, for the log; None where there are none."""


class Objective(Protocol):
    logged: tuple[str, ...]
    """Names of further means in the log; `MicroLoss.logged` has their sums."""
    copies: int
    """How often a step computes each example; 0 where it does more than that (it searches), which nobody counts."""

    def prepare(self, engine: Engine, batches: Sequence[Batch]) -> list[Prepared]:
        """The step's micro-batches of this rank. All ranks call it together, with as many micro-batches each."""
        ...

    def loss(self, engine: Engine, prepared: Prepared, counts: Tensor) -> MicroLoss:
        """One forward. counts: float64 [C] on the device, summed over micro-batches and ranks, at least 1 each."""
        ...

    def replay(self, engine: Engine, batch: Batch) -> int:
        """`Engine.replay` of a forward on this batch, which leaves no trace."""
        ...


class TokenLoss:
    """Pretraining: sum(confidence * token loss) / global token count of each loss group, summed over the groups.

    The original's L1/n1 + L2/n2 made independent of ranks and accumulation (docs/ofa.md, Training: loss).
    """

    logged = ()
    copies = 1

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self._label_smoothing = label_smoothing

    def prepare(self, engine: Engine, batches: Sequence[Batch]) -> list[Prepared]:
        return [Prepared(batch=batch, counts=group_counts(batch).double()) for batch in batches]

    def loss(self, engine: Engine, prepared: Prepared, counts: Tensor) -> MicroLoss:
        batch = prepared.batch.to(engine.device)
        loss_M, nll_M, correct_M = engine(batch, label_smoothing=self._label_smoothing)
        loss = (group_sums(loss_M, batch) / counts[: len(GROUPS)].to(loss_M.dtype)).sum()
        with torch.no_grad():
            return MicroLoss(loss, task_sums(loss_M, nll_M, correct_M, batch))

    def replay(self, engine: Engine, batch: Batch) -> int:
        return engine.replay(batch.to(engine.device), label_smoothing=self._label_smoothing)


class TaskLoss:
    """Fine-tuning: the sum of a criterion over the tokens it keeps / their global number.

    docs/ofa.md, Training: criteria.

    What is dropped is chosen within each micro-batch. How much that is follows from the number of its tokens, so what
    divides is known before any loss is, and ranks and accumulation change nothing.
    """

    logged = ()

    def __init__(self, criterion: Criterion) -> None:
        self._criterion = criterion
        self.copies = criterion.copies

    def prepare(self, engine: Engine, batches: Sequence[Batch]) -> list[Prepared]:
        criterion = self._criterion

        def count(batch: Batch) -> Tensor:
            _, kept = criterion.kept(len(batch.places.counted), engine.num_updates)
            return torch.tensor([kept * criterion.copies], dtype=torch.float64)

        seen = [repeated(batch, criterion.copies) if criterion.copies > 1 else batch for batch in batches]
        pairs = zip(batches, seen, strict=True)
        return [Prepared(batch=batch, counts=count(batch), more=more) for batch, more in pairs]

    def loss(self, engine: Engine, prepared: Prepared, counts: Tensor) -> MicroLoss:
        batch = prepared.batch.to(engine.device)
        if self._criterion.needs_logits:
            seen = batch if prepared.more is prepared.batch else prepared.more.to(engine.device)
            total, per_token = self._of_logits(engine, batch, seen)
        else:
            total, per_token = self._of_losses(engine, batch)
        return MicroLoss(total / counts[0].to(total.dtype), task_sums(*per_token, batch))

    def replay(self, engine: Engine, batch: Batch) -> int:
        return engine.replay(batch.to(engine.device), **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"label_smoothing": self._criterion.label_smoothing, "id_range": self._criterion.constraint_range}

    def _of_losses(self, engine: Engine, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(sum, loss, nll and correct [M]): the vocabulary is gone through in pieces, no logits are kept."""
        loss_M, nll_M, correct_M = engine(batch, **self._options)
        weighted_N = (loss_M * batch.loss_weight).index_select(0, batch.places.counted)
        kept = self._criterion.kept(len(weighted_N), engine.num_updates)
        if kept != (len(weighted_N),) * 2:
            weighted_N = weighted_N[kept_tokens(weighted_N, self._criterion, engine.num_updates)]
        return weighted_N.sum(), (loss_M, nll_M, correct_M)

    def _of_logits(self, engine: Engine, batch: Batch, seen: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The same where whole distributions count. seen: the batch, twice for R-Drop."""
        criterion = self._criterion
        logits_NV, counted_N = engine(seen, logits=True)
        allowed_NV = None
        if len(seen.allowed_ids):
            allowed_NV = allowed_mask(seen.allowed_ids, seen.allowed_offsets, counted_N, logits_NV.shape[1])
        elif criterion.constraint_range is not None:
            allowed_V = allowed_ids(logits_NV.shape[1], criterion.constraint_range, logits_NV.device)
            allowed_NV = allowed_V.expand_as(logits_NV)
        conf_N = seen.loss_weight[counted_N]
        found = selected_loss(
            logits_NV, seen.targets[counted_N], criterion, update_num=engine.num_updates, conf_N=conf_N,
            allowed_NV=allowed_NV,
        )  # fmt: skip
        one = len(counted_N) // criterion.copies
        empty = len(batch.targets)
        per_token = (each.new_zeros(empty).index_copy(0, counted_N[:one], each[:one]) for each in found.tokens)
        return found.loss, tuple(per_token)


def criterion_of(recipe: Recipe) -> Criterion:
    """The options of a fine-tuning recipe."""
    chosen, kind = recipe.criterion, recipe.criterion.kind
    return Criterion(
        label_smoothing=recipe.optim.label_smoothing,
        constraint_range=chosen.constraint_range or None,
        drop_worst_ratio=chosen.drop_worst_ratio,
        drop_worst_after=chosen.drop_worst_after,
        rdrop_alpha=chosen.rdrop_alpha,
        encouraging=kind == "encouraging",
        log_end=chosen.log_end,
        drop_best_ratio=chosen.drop_best_ratio or None,
        drop_best_after=chosen.drop_best_after,
    )


def objective_of(recipe: Recipe) -> Objective:
    """What this recipe learns from."""
    if not recipe.data.task.name:
        return TokenLoss(recipe.optim.label_smoothing)
    return TaskLoss(criterion_of(recipe))

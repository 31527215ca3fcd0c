"""One optimizer step, whatever it learns from (`ofa_ds.train.objective`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.engine.copying import later, to_device
from ofa_ds.engine.engine import Engine
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import Objective
from ofa_ds.train.spikes import LossWindow


class StepResult(NamedTuple):
    voted: list[bool]
    """For each vote, whether any rank gave it."""
    losses: list[Tensor]
    """Of each of this rank's micro-batches, its share of the step's loss; scalars on the device."""
    spike: str | None
    """Why the step was left out for its loss alone, in words; equal on all ranks."""
    paces: list[float]
    """Of each rank, its own time per work in the step before; 0 where it is not known."""


def train_step(
    engine: Engine,
    micro_batches: list[Batch],
    window: Window,
    objective: Objective,
    *,
    votes: Sequence[bool] = (),
    before: LossWindow | None = None,
) -> StepResult:
    """One optimizer step, equal to one process on all ranks' micro-batches; `engine.skipped` says if it was left out.

    votes: what this rank wants all to know, in the same order on each. before: the losses of the steps before, where
    one far above them is to be left out; it then takes this one's.
    """
    device, ranks = engine.device, engine.ranks
    engine.own_time.begin()
    prepared = objective.prepare(engine, micro_batches)
    shared = torch.stack([each.counts for each in prepared]).sum(0)
    num_counts, counts = len(shared), [window.counts(each.batch) for each in prepared]
    paces = [engine.own_time.pace if rank == ranks.rank else 0.0 for rank in range(ranks.world_size)]
    said = torch.tensor([*paces, *(float(vote) for vote in votes)], dtype=torch.float64)
    shared = to_device(torch.cat([shared, said]), device)
    engine.all_reduce(shared)  # all in one: what each rank puts into its own place, all read there
    read_said = later(shared[num_counts:])
    global_counts = shared[:num_counts].clamp(min=1)  # where nothing is counted the sum is 0: it adds nothing
    losses, whole = [], None
    for each, known in zip(prepared, counts, strict=True):
        micro = objective.loss(engine, each, global_counts)
        losses.append(micro.loss.detach())
        if before is not None and len(losses) == len(micro_batches):
            whole = engine.all_reduce(torch.stack(losses).double().sum())
            engine.discard(before.is_spike(whole))  # not read yet: the host goes on
        engine.backward(micro.loss)
        engine.step()  # updates the weights at the last micro-batch of the step
        sizes = {"num_tokens": each.batch.num_tokens, "num_examples": each.batch.num_examples}
        window.add_micro_batch(micro.task_sums, losses[-1], logged=micro.logged, counts=known, **sizes)
    window.end_step(counted=not engine.skipped)
    spike = None
    if whole is not None:
        spike = before.spike(whole.item())
        if not engine.skipped:
            before.add(whole.item())
    engine.own_time.end(sum(batch.num_tokens for batch in micro_batches))
    said = read_said()
    return StepResult([count > 0 for count in said[ranks.world_size :]], losses, spike, said[: ranks.world_size])

"""One optimizer step.

Its loss is, per group g (vision-language; everything else), sum(confidence * token loss) / global token count of g,
summed over groups: the original's L1/n1 + L2/n2 made independent of ranks and accumulation (docs/ofa.md, Training:
loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.engine.engine import Engine
from ofa_ds.train.loss import group_counts, group_sums, task_sums
from ofa_ds.train.metrics import Window
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
    *,
    label_smoothing: float,
    votes: Sequence[bool] = (),
    before: LossWindow | None = None,
) -> StepResult:
    """One optimizer step, equal to one process on all ranks' micro-batches; `engine.skipped` says if it was left out.

    votes: what this rank wants all to know, in the same order on each. before: the losses of the steps before, where
    one far above them is to be left out; it then takes this one's.
    """
    device, ranks = engine.device, engine.ranks
    engine.own_time.begin()
    shared = torch.stack([group_counts(batch) for batch in micro_batches]).sum(0).double()
    num_groups = len(shared)
    paces = [engine.own_time.pace if rank == ranks.rank else 0.0 for rank in range(ranks.world_size)]
    said = torch.tensor([*paces, *(float(vote) for vote in votes)], dtype=torch.float64)
    shared = torch.cat([shared, said]).to(device)
    engine.all_reduce(shared)  # all in one: what each rank puts into its own place, all read there
    global_counts = shared[:num_groups].clamp(min=1)  # a group without tokens has sum 0: it adds nothing
    losses, spike, whole = [], None, 0.0
    for batch in micro_batches:
        batch = batch.to(device)
        loss_M, nll_M, correct_M = engine(batch, label_smoothing=label_smoothing)
        loss = (group_sums(loss_M, batch) / global_counts.to(loss_M.dtype)).sum()
        losses.append(loss.detach())
        if before is not None and len(losses) == len(micro_batches):
            whole = engine.all_reduce(torch.stack(losses).double().sum()).item()
            if spike := before.spike(whole):
                engine.discard()
        engine.backward(loss)
        engine.step()  # updates the weights at the last micro-batch of the step
        with torch.no_grad():
            sums = task_sums(loss_M, nll_M, correct_M, batch)
            window.add_micro_batch(sums, losses[-1], num_tokens=batch.num_tokens, num_examples=batch.num_examples)
    window.end_step(counted=not engine.skipped)
    if before is not None and not engine.skipped:
        before.add(whole)
    engine.own_time.end(sum(batch.num_tokens for batch in micro_batches))
    said = shared[num_groups:].tolist()
    return StepResult([count > 0 for count in said[ranks.world_size :]], losses, spike, said[: ranks.world_size])

"""Sums of the steps since the last log line, over all ranks: what a run's records are made of."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.engine.copying import to_device
from ofa_ds.engine.host_memory import peak_resident_bytes
from ofa_ds.terms import TASKS

MEBI = 2**20
_FIXED = 1 + 2 * len(TASKS)
"""Sums on the device that every window has: loss; nll and tokens of each task."""
_HOST = 4 + len(TASKS)
"""Sums on the host: tokens, examples, useful FLOPs, those of stand-ins, examples of each task."""
_PAGE = resource.getpagesize()


class Flops(NamedTuple):
    """Of micro-batches, forward and backward, no recomputation."""

    useful: float = 0.0
    """Of the rows' own tokens and pictures."""
    padding: float = 0.0
    """Of what stands in for pictures that no row has."""


class Usage(NamedTuple):
    """Memory of a rank, in MiB; NaN where there is no such."""

    peak: float
    """Largest so far: of the accelerator where there is one, else of this process."""
    allocated: float
    """Of the accelerator, in tensors, the most since the last line."""
    reserved: float
    """Of the accelerator, held by torch's allocator, likewise."""
    host: float
    """Of this process, now."""


def memory_usage(device: torch.device) -> Usage:
    """Now. The accelerator's peaks since the last call begin anew; asks the driver for nothing."""
    if device.type != "cuda":
        return Usage(peak_resident_bytes() / MEBI, math.nan, math.nan, _resident())
    found = torch.cuda.memory_stats(device)
    allocated = found["allocated_bytes.all.peak"] / MEBI
    reserved = found["reserved_bytes.all.peak"] / MEBI
    torch.cuda.reset_peak_memory_stats(device)
    return Usage(allocated, allocated, reserved, _resident())


def _resident() -> float:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE / MEBI
    except (OSError, ValueError, IndexError):
        return math.nan


class Window:
    """Sums since the last log line; those of the device are kept there, so that a step never waits for them."""

    def __init__(
        self,
        device: torch.device,
        tasks: Collection[str] = TASKS,
        logged: Sequence[str] = (),
        *,
        rank: int = 0,
        world_size: int = 1,
        flops: Callable[[Batch], Flops] | None = None,
        peak_flops: float = 0.0,
    ) -> None:
        """tasks: those that are told apart. logged: `Objective.logged`.

        flops: of a micro-batch, on the host; None where they are not counted. peak_flops: FLOP/s of all ranks' devices
        together, 0 where that is not known.
        """
        self.device, self._tasks, self._logged = device, tasks, tuple(logged)
        self._rank, self._world_size = rank, world_size
        self._flops, self._peak_flops = flops, peak_flops
        self._waited_s = self._peak = 0.0
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.num_steps = 0
        self.num_counted = self.num_passed_over = 0
        self.checkpoint_s = 0.0
        """Seconds that training has waited for checkpoints."""
        self.report_s = 0.0
        """Seconds that went into reporting itself."""
        self._sums = torch.zeros(_FIXED + 2 * len(self._logged), device=self.device, dtype=torch.float64)
        self._step = torch.zeros_like(self._sums)
        self._host, self._host_step = np.zeros(_HOST), np.zeros(_HOST)

    def add_micro_batch(
        self,
        task_sums: Tensor,
        loss: Tensor,
        *,
        num_tokens: int,
        num_examples: int,
        logged: Tensor | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        """task_sums: [K, 4] of `loss.task_sums`; loss: this micro-batch's share of the step's loss.

        logged: `MicroLoss.logged`. counts: of the micro-batch.
        """
        with self.reporting():
            self._step[0] += loss.double()
            self._step[1:_FIXED] += task_sums[:, 1::2].double().flatten()  # nll, tokens
            if logged is not None:
                self._step[_FIXED:] += logged.double().flatten()
            self._host_step[:2] += num_tokens, num_examples
            if counts is not None:
                self._host_step[2:] += counts

    def counts(self, batch: Batch) -> np.ndarray | None:
        """Useful FLOPs, those of stand-ins, examples of each task, for `add_micro_batch`; before the batch is moved.

        None where it is on a device already: nobody waits for that.
        """
        if batch.task.device.type != "cpu":
            return None
        with self.reporting():
            found = Flops() if self._flops is None else self._flops(batch)
            return np.concatenate([found, np.bincount(batch.task.numpy(), minlength=len(TASKS))])

    def end_step(self, *, counted: bool = True) -> None:
        """counted: false for a step that was skipped; its sums, which may not be finite, are left out."""
        self.num_steps += 1
        if counted:
            self.num_counted += 1
            self._sums += self._step
            self._host += self._host_step
        self._step.zero_()
        self._host_step[:] = 0

    def leave_out(self, seconds: float) -> None:
        """Time that went by with something else than steps."""
        self.start += seconds

    def pass_over(self) -> None:
        """A step that was not taken."""
        self.num_passed_over += 1

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Time inside is that of reporting itself."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.report_s += time.perf_counter() - began

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Time inside is waited for a checkpoint."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.checkpoint_s += time.perf_counter() - began

    def close(self, sum_over_ranks: Any, *, waited_s: float = 0.0, usage: Usage | None = None) -> dict[str, float]:
        """Means over the window and all ranks, then a new window. `sum_over_ranks` reduces one flat tensor in place.

        waited_s: what this rank has waited for data from the start on. Times and memory are of the rank that has most.
        """
        seconds, report_s = time.perf_counter() - self.start, self.report_s
        self._peak = max(self._peak, usage.peak) if usage else self._peak
        mine = [
            (waited_s - self._waited_s) / seconds, self.checkpoint_s, report_s / seconds,
            *(usage._replace(peak=self._peak) if usage else ()),
        ]  # fmt: skip
        ranks = torch.zeros(self._world_size, len(mine), dtype=torch.float64)
        ranks[self._rank] = torch.tensor(mine, dtype=torch.float64)
        host = torch.cat([torch.from_numpy(self._host), ranks.flatten()])  # each rank's own place in one sum
        sums = torch.cat([self._sums, to_device(host, self.device)])
        sum_over_ranks(sums)
        sums = np.asarray(sums.tolist())  # the one wait of a line
        with self.reporting():
            device, host, ranks = np.split(sums, [len(self._sums), len(self._sums) + _HOST])
            values = self._means(device, host, seconds)
            values |= self._of_ranks(ranks.reshape(self._world_size, -1), has_usage=usage is not None)
        self._waited_s = waited_s
        report_s = self.report_s - report_s
        self.reset()
        self.report_s = report_s  # of this line, in the next one
        return values

    def _means(self, device: np.ndarray, host: np.ndarray, seconds: float) -> dict[str, float]:
        loss, *tasks = device[:_FIXED].tolist()
        num_tokens, num_examples, useful, padding, *examples = host.tolist()
        values = {"loss": loss / self.num_counted if self.num_counted else math.nan}
        for task, nll, count in zip(TASKS, tasks[::2], tasks[1::2], strict=True):
            if task in self._tasks:
                values[f"loss/{task}"] = nll / count if count else math.nan
        for name, (total, count) in zip(self._logged, device[_FIXED:].reshape(-1, 2).tolist(), strict=True):
            values[name] = total / count if count else math.nan
        values["tokens_per_s"] = num_tokens / seconds
        values["examples_per_s"] = num_examples / seconds
        if sum(examples):
            for task, count in zip(TASKS, examples, strict=True):
                if task in self._tasks:
                    values[f"examples_per_s/{task}"] = count / seconds
        values["skipped_steps"] = float(self.num_steps - self.num_counted + self.num_passed_over)
        values["step_ms"] = 1000 * seconds / max(self.num_steps, 1)
        if self._flops is not None:
            values["tflops_per_rank"] = useful / seconds / self._world_size / 1e12
            values["padding_fraction"] = padding / (useful + padding) if useful + padding else 0.0
            if self._peak_flops:
                values["mfu"] = useful / seconds / self._peak_flops
        return values

    def _of_ranks(self, ranks: np.ndarray, *, has_usage: bool) -> dict[str, float]:
        """ranks: [R, 3 or 7]."""
        names = ["data_wait_fraction", "checkpoint_s", "report_fraction"]
        if has_usage:
            names += ["peak_memory_MiB", "memory_allocated_MiB", "memory_reserved_MiB", "host_memory_MiB"]
        return {name: value for name, value in zip(names, ranks.max(0).tolist(), strict=True) if not math.isnan(value)}

"""Packed micro-batches for one rank, prepared by worker processes.

Which rows a micro-batch holds and what becomes of them is a function of (seed, step, micro-batch number) alone, so
ranks, workers and restarts cannot change it. Workers only run that function ahead of time. They come from a fork
server, not by forking the trainer, whose RDMA buffers and threads do not survive a fork.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ofa_ds.batch import Batch
from ofa_ds.config import BatchConfig, DataConfig
from ofa_ds.data.order import Mixture
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab
from ofa_ds.model.config import ModelConfig
from ofa_ds.storage.sizes import size_text
from ofa_ds.tasks.task import context_of
from ofa_ds.train.micro_batches import MicroBatches
from ofa_ds.train.packed_buffer import Layout, from_buffer, to_buffer

PREFETCH = 2
"""Micro-batches that each worker keeps ready."""

STOP_GRACE_S = 120
"""How long a worker lives on after SIGTERM, which schedulers send to all: the trainer saves after one more step."""

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Prepared(Dataset):
    """What the workers run."""

    micro_batches: MicroBatches

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Layout, list[str]] | ValueError | RuntimeError:
        """For the workers: one tensor travels faster than twenty, and an error as it is better than two tracebacks."""
        try:
            batch, cut = self.micro_batches.prepare(*key)
            buffer, layout = to_buffer(batch)
            _need_shared_memory(buffer.numel())
            return buffer, layout, cut
        except (ValueError, RuntimeError) as error:
            return error
        except MemoryError:
            return RuntimeError(f"step {key[0]}, micro-batch {key[1]}: no memory left; use smaller micro_rows")


@dataclass(kw_only=True)
class Loader:
    """`for batches in loader.steps(start_step)`: this rank's micro-batches of each optimizer step, without end."""

    shards: Shards
    vocab: Vocab
    config: DataConfig
    batch: BatchConfig
    model: ModelConfig
    """Says the size of patches and how many positions there are."""
    seed: int
    rank: int = 0
    world_size: int = 1
    references: bool = False
    """Pack the references of downstream examples too, for rewards."""
    wait_seconds: float = field(default=0.0, init=False)
    """Time that the consumer has spent waiting, from the start on."""
    num_cut: int = field(default=0, init=False)
    """Examples whose text was longer than the model's positions, from the start on."""

    def __post_init__(self) -> None:
        self.batch.accumulation_steps(self.world_size)  # raises where the numbers do not divide
        ctx = context_of(
            self.shards, self.vocab, self.config, patch_size=self.model.patch_size,
            max_positions=self.model.max_positions, readable=False,
        )  # fmt: skip
        mixture = Mixture(self.shards.families, self.config.weights(), self.seed)
        self.micro_batches = MicroBatches(
            shards=self.shards, ctx=ctx, mixture=mixture, batch=self.batch, seed=self.seed,
            image_bucket_size=self.model.image_bucket_size, references=self.references,
        )  # fmt: skip

    def steps(self, start_step: int = 0, *, without: Container[int] = ()) -> Iterator[list[Batch]]:
        """From 0-based step `start_step` on, except those in `without`, whose rows are not read.

        Closing the generator ends the workers.
        """
        accumulation = self.batch.accumulation_steps(self.world_size)
        keys = self._keys(start_step, without)
        source = self._prepared(keys) if self.config.workers else self._in_process(keys)
        try:
            while True:
                began = time.perf_counter()
                batches = [next(source) for _ in range(accumulation)]
                self.wait_seconds += time.perf_counter() - began
                yield batches
        finally:
            if self.num_cut > 1 and self.rank == 0:
                print(f"{self.shards.path}: cut {self.num_cut} examples in all, on the first rank", file=sys.stderr)

    def _count_cut(self, cut: list[str]) -> None:
        """The first is told at once, by one rank."""
        if cut and not self.num_cut and self.rank == 0:
            print(
                f"{self.shards.path}: {cut[0]} is cut to the model's {self.model.max_positions} positions; further "
                "examples are counted",
                file=sys.stderr,
            )
        self.num_cut += len(cut)

    def _keys(self, first: int, without: Container[int]) -> Iterator[tuple[int, int]]:
        """(step, micro-batch number) for this rank, in order, without end: number j of a step is rank j % world's."""
        for step in itertools.count(first):
            if step not in without:
                for number in range(self.rank, self.batch.global_rows // self.batch.micro_rows, self.world_size):
                    yield step, number

    def _in_process(self, keys: Iterator[tuple[int, int]]) -> Iterator[Batch]:
        for key in keys:
            batch, cut = self.micro_batches.prepare(*key)
            self._count_cut(cut)
            yield batch

    def _prepared(self, keys: Iterator[tuple[int, int]]) -> Iterator[Batch]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        loader = DataLoader(
            Prepared(self.micro_batches),
            sampler=keys,
            batch_size=None,
            num_workers=self.config.workers,
            prefetch_factor=PREFETCH,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the DataLoader draws from the generator that dropout uses
        )
        for item in loader:
            if isinstance(item, Exception):
                raise item
            buffer, layout, cut = item
            self._count_cut(cut)
            yield from_buffer(buffer, layout)


def _need_shared_memory(size: int) -> None:
    """Workers hand batches over in /dev/shm, and the kernel kills who writes where it is full."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else size
    if free < size:
        raise RuntimeError(
            f"a batch needs {size_text(size)} of shared memory, {SHARED_MEMORY} has {size_text(free)} left; make it "
            "larger (docker run --shm-size, or mount -o remount,size=), or set data.workers=0"
        )


def _start_worker(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # the trainer's business; it ends its workers
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(STOP_GRACE_S))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A trainer that is killed cannot end its workers; torch's own watch looks at the fork server, which lives on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

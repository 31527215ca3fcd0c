"""Packed micro-batches for one rank, prepared by worker processes.

Which rows a micro-batch holds and what becomes of them is a function of (seed, step, micro-batch number) alone, so
ranks, workers and restarts cannot change it. Workers only run that function ahead of time (`ofa_ds.train.ring`).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch

from ofa_ds.batch import Batch
from ofa_ds.config import BatchConfig, DataConfig
from ofa_ds.data.sets import mixture_of
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab
from ofa_ds.model.config import ModelConfig
from ofa_ds.tasks.task import context_of
from ofa_ds.train.micro_batches import MicroBatches, Notes, Substituted
from ofa_ds.train.pinned_copies import PinnedCopies
from ofa_ds.train.ring import MAX_ORDERS, PREFETCH, Parcel, Ring
from ofa_ds.train.ring_worker import Key, Prepare


class Source(Protocol):
    """Micro-batches in order; `ofa_ds.train.ring.Ring` says what each does."""

    num_restarts: int

    def take(self) -> Parcel | MadeHere: ...

    def release(self) -> None: ...

    def close(self) -> None: ...


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
    substituted: list[Substituted] = field(default_factory=list, init=False)
    """Damaged rows of the batches that were handed over, and what stands in for them; whoever reads it empties it."""
    num_restarts: int = field(default=0, init=False)
    """Workers that were started in place of one that had ended."""

    def __post_init__(self) -> None:
        self.batch.accumulation_steps(self.world_size)  # raises where the numbers do not divide
        ctx = context_of(
            self.shards, self.vocab, self.config, patch_size=self.model.patch_size,
            max_positions=self.model.max_positions, readable=False,
        )  # fmt: skip
        mixture = mixture_of(self.shards, self.config, global_rows=self.batch.global_rows, seed=self.seed)
        self.micro_batches = MicroBatches(
            shards=self.shards, ctx=ctx, mixture=mixture, batch=self.batch, seed=self.seed,
            image_bucket_size=self.model.image_bucket_size, references=self.references,
        )  # fmt: skip

    def steps(self, start_step: int = 0, *, without: Container[int] = ()) -> Iterator[list[Batch]]:
        """From 0-based step `start_step` on, except those in `without`, whose rows are not read.

        What a step yields is valid until the next one is asked for, whose batches take its memory. Closing the
        generator ends the workers.
        """
        accumulation = self.batch.accumulation_steps(self.world_size)
        source = self._source(self._keys(start_step, without), accumulation)
        try:
            while True:
                began = time.perf_counter()
                source.release()
                parcels = [source.take() for _ in range(accumulation)]
                batches = [parcel.batch() for parcel in parcels]
                self.wait_seconds += time.perf_counter() - began
                self.num_restarts = source.num_restarts
                for parcel in parcels:
                    self._take_notes(parcel.notes)
                del parcels
                yield batches
        finally:
            source.close()
            if self.num_cut > 1 and self.rank == 0:
                print(f"{self.shards.path}: cut {self.num_cut} examples in all, on the first rank", file=sys.stderr)

    def _take_notes(self, notes: Notes) -> None:
        """The first text that is cut is told at once, by one rank."""
        cut = notes.cut
        self.substituted += notes.substituted
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

    def _source(self, keys: Iterator[Key], accumulation: int) -> Source:
        workers = self.config.workers
        if not workers:
            return InProcess(self.micro_batches.prepare, keys)
        name = "data worker" if self.world_size == 1 else f"data worker of rank {self.rank}"
        on_gpu = torch.cuda.is_available()
        held = 1 if on_gpu else accumulation
        ring = Ring(
            self.micro_batches.prepare, keys, workers=workers, held=held, name=name, preload=__name__,
            announce=partial(_announce, self.micro_batches),
        )  # fmt: skip
        return PinnedCopies(ring, ahead=min(max(accumulation, PREFETCH), MAX_ORDERS)) if on_gpu else ring


def _announce(micro_batches: MicroBatches, step: int, number: int) -> None:
    micro_batches.shards.announce(micro_batches.rows(step, [number]))


class InProcess:
    """Without workers."""

    num_restarts = 0

    def __init__(self, prepare: Prepare, keys: Iterator[Key]) -> None:
        self._prepare, self._keys = prepare, keys

    def take(self) -> MadeHere:
        return MadeHere(*self._prepare(*next(self._keys)))

    def release(self) -> None:
        """Nothing to do: what was taken is the consumer's alone."""

    def close(self) -> None:
        """Likewise."""


class MadeHere(NamedTuple):
    """A batch that travels nowhere."""

    made: Batch
    notes: Notes

    def batch(self) -> Batch:
        return self.made

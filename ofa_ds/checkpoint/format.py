"""The files of a checkpoint, version 2.

    RUN_DIR/latest                            name of the newest checkpoint, for people and scripts
    RUN_DIR/step_00000500/manifest.json       who holds what, checksums, counters, recipe; written last
    RUN_DIR/step_00000500/rank_00000.safetensors ...     one file per rank

A rank's file holds its flat pieces of the parameters in the manifest's order, for each one its kinds in order:
`weight|NAME`, `exp_avg|NAME`, `exp_avg_sq|NAME`, and `ema|NAME` where there is one (fp32); empty pieces are left out.
Then come `rng|torch` and `rng|cuda` (uint8), and in rank 0's `buffer|NAME` and `ema_buffer|NAME` whole. So the manifest
alone says at which byte an element is: no header is read to load one.

In the manifest, a tensor's `parts` is "even" (ceil(n / world_size) elements a rank, in order; the last ones fewer or
none) or the sorted list [rank, start, numel]. Its first line carries the xxh3-128 of all bytes after it; it holds that
of each file's header, a header holds the xxh3-64 of each of its tensors: every byte is covered, and each tensor can be
checked alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ofa_ds.engine.partition import AVERAGE, MOMENTS, even_range, flat_parts
from ofa_ds.storage.direct import BLOCK_BYTES
from ofa_ds.storage.tensor_writer import TensorSpec

FORMAT = "ofa-ds checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
RUN, COUNTS = "run", "counts"
"""Keys of `extra` for the run that saved it: which one, and whether `keep` counts it (false: of a bad stretch)."""
BEST = "best"
"""Name of the pointer beside `latest`, and key of `extra`: {"step", "metric", "value"} of the best one so far."""
KINDS = ("weight", *MOMENTS, AVERAGE)
"""What there may be of a parameter, all fp32; the weight is always there."""

MAX_RANKS = 65_536
"""Of a checkpoint; more is a mistake, or meant to exhaust who reads it."""

HEADER_BYTES_A_TENSOR = 300
"""About what a tensor takes in a header; never less."""

_MAX_RNG_BYTES = 16_384


class Part(NamedTuple):
    """Elements of a tensor in one rank's file."""

    rank: int
    start: int
    """First of the tensor's elements in this file."""
    numel: int


Cut = Literal["even"] | tuple[Part, ...]
"""Who holds what of a tensor: the same share each, in order, or these parts, in the tensor's order."""
Parts = Mapping[str, Cut]
"""The cut of each tensor, by name."""

NO_STEPS: dict[str, Any] = {
    "adam_step": 0, "global_steps": 0, "skipped_steps": 0, "global_samples": 0, "loss_scaler": {},
}  # fmt: skip
"""The counters of a model that has not been trained here."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A parameter."""

    shape: tuple[int, ...]
    trainable: bool = True
    kinds: tuple[str, ...] = ("weight",)
    """What there is of it, of format.KINDS in that order."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All of a training state that is no tensor; the same names as in the manifest."""

    step: int = 0
    state: dict[str, Any] = field(default_factory=lambda: dict(NO_STEPS))
    """What `Engine.counters` gives: Adam's step, DeepSpeed's counters, the loss scale."""
    rng_ranks: int | None = None
    """Ranks of the run whose generator states there are; None: as many as there are files."""
    extra: dict[str, Any] = field(default_factory=dict)
    """`recipe`, `identity` (fingerprints of data and vocabulary), `origin` of what was imported."""


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def directory_name(step: int) -> str:
    return f"step_{step:08d}"


def parts_of(tensors: Mapping[str, TensorInfo], ranks: int, stage: int) -> Parts:
    """What a manifest says of each tensor: who holds what. Stages 1 and 2 cut the trainable ones as one flat buffer."""
    parts: dict[str, Cut] = dict.fromkeys(tensors, "even")
    if stage in (1, 2):
        listed = flat_parts({name: info.numel for name, info in tensors.items() if info.trainable}, ranks)
        parts |= {name: tuple(Part(*each) for each in cut) for name, cut in listed.items()}
    return parts


def payload_specs(tensors: Mapping[str, TensorInfo], parts: Parts, rank: int, ranks: int) -> list[TensorSpec]:
    """What a rank's file holds of the parameters, in its order."""
    specs = []
    for name, info in tensors.items():
        _, numel = piece_of(parts[name], info, rank, ranks)
        if numel:
            specs += [TensorSpec(f"{kind}|{name}", "F32", (numel,), 4 * numel) for kind in info.kinds]
    return specs


def piece_of(cut: Cut, info: TensorInfo, rank: int, ranks: int) -> tuple[int, int]:
    """(start, numel) of what a rank holds of a parameter."""
    if cut == "even":
        return even_range(info.numel, rank, ranks)
    return next(((part.start, part.numel) for part in cut if part.rank == rank), (0, 0))


def rng_prefix(rank: int, world_size: int) -> str:
    """Names of generator states begin so; those of ranks that a smaller world has no file for say whose they are."""
    return "rng|" if rank < world_size else f"rng_{rank}|"


def num_bytes_of(tensors: Mapping[str, TensorInfo], ranks: int) -> int:
    """About what a checkpoint takes on the disk; never less."""
    payload = sum(4 * info.numel * len(info.kinds) for info in tensors.values())
    headers = ranks * sum(len(info.kinds) for info in tensors.values()) * HEADER_BYTES_A_TENSOR
    return payload + headers + ranks * (_MAX_RNG_BYTES + BLOCK_BYTES)

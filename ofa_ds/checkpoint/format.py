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

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ofa_ds.checkpoint.tensor_file import DamagedError, check_size, whole_numbers
from ofa_ds.engine_state import AVERAGE, MOMENTS

FORMAT = "ofa-ds checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
KINDS = ("weight", *MOMENTS, AVERAGE)
"""What there may be of a parameter, all fp32; the weight is always there."""

Manifest = dict[str, Any]

_FIRST_LINE = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')
_MAX_ELEMENTS = 2**48
_MAX_MANIFEST_BYTES = 1 << 28


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def directory_name(step: int) -> str:
    return f"step_{step:08d}"


def write_manifest(path: Path, manifest: Manifest) -> None:
    body = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items()).encode() + b"}\n"
    with open(path, "xb") as file:
        file.write(b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128_hexdigest(body).encode() + body)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, checked. Raises DamagedError, one line, where it or a file's size is wrong."""
    path = directory / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise DamagedError(f"{directory}: has no {MANIFEST}: not a checkpoint, or one that was never finished")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise DamagedError(f"{path}: {path.stat().st_size} bytes are too many for a manifest")
    raw = path.read_bytes()
    first = _FIRST_LINE.match(raw)
    if not first or xxhash.xxh3_128_hexdigest(raw[first.end() :]).encode() != first[1]:
        raise DamagedError(f"{path}: its checksum is wrong: changed after it was written")
    manifest = json.loads(raw)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        raise DamagedError(f"{path}: want {FORMAT!r} version {VERSION}, got {found}")
    try:
        _check_manifest(manifest)
        layout = Layout(manifest)
        for rank, entry in enumerate(manifest["files"]):
            if layout.begin(rank) + layout.num_bytes(rank) > entry["bytes"]:
                raise ValueError(f"{entry['name']} of {entry['bytes']} bytes is too small for its tensors")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise DamagedError(f"{path}: {error!r} is wrong with it") from error
    for entry in manifest["files"]:
        check_size(directory / entry["name"], entry["bytes"])
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    world_size, _ = whole_numbers([manifest["world_size"], manifest["step"]])
    files = manifest["files"]
    if not world_size or len(files) != world_size:
        raise ValueError(f"{len(files)} files for {world_size} ranks")
    for rank, entry in enumerate(files):
        if entry["name"] != file_name(rank):  # so no name can lead out of the directory
            raise ValueError(f"file {entry['name']!r} of rank {rank}, want {file_name(rank)}")
        whole_numbers([entry["bytes"], entry["header_bytes"]])
    elements = 0
    for name, tensor in manifest["tensors"].items():
        total = math.prod(whole_numbers(tensor["shape"]))
        elements += total
        if elements > _MAX_ELEMENTS:
            raise ValueError(f"{name} of {total} elements")
        kinds = tuple(tensor["kinds"])
        if kinds[:1] != KINDS[:1] or kinds != tuple(kind for kind in KINDS if kind in kinds):
            raise ValueError(f"{name} has {kinds}, want some of {KINDS} in this order")
        if tensor["parts"] != "even":
            _check_parts(name, tensor["parts"], total, world_size)
    for name in ("buffers", "ema_buffers"):
        for shape in manifest[name].values():
            if math.prod(whole_numbers(shape)) > _MAX_ELEMENTS:
                raise ValueError(f"a buffer of {shape}")


def _check_parts(name: str, parts: list[list[int]], total: int, world_size: int) -> None:
    end, seen = 0, set()
    for rank, start, numel in parts:
        whole_numbers([rank, start, numel])
        if rank >= world_size or start != end or rank in seen:
            raise ValueError(f"{name}: part {[rank, start, numel]} after element {end}, {world_size} ranks")
        end += numel
        seen.add(rank)
    if end != total:
        raise ValueError(f"{name}: parts hold {end} of {total} elements")


@dataclass(frozen=True)
class Overlap:
    """Elements of a tensor in one rank's file."""

    rank: int
    start: int
    """First of the tensor's elements in this file."""
    numel: int


class Layout:
    """Where the manifest puts each element: file and byte. Arithmetic only; reads nothing."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self.world_size: int = manifest["world_size"]
        self._files = manifest["files"]
        tensors = manifest["tensors"].values()
        self._index = {name: k for k, name in enumerate(manifest["tensors"])}
        self._kinds = {name: tuple(tensor["kinds"]) for name, tensor in manifest["tensors"].items()}
        self._totals = np.array([math.prod(tensor["shape"]) for tensor in tensors], dtype=np.int64)
        self._bytes = np.array([4 * len(tensor["kinds"]) for tensor in tensors], dtype=np.int64)
        self._even = np.array([tensor["parts"] == "even" for tensor in tensors], dtype=bool)
        self._parts = {
            name: [Overlap(*part) for part in tensor["parts"]]
            for name, tensor in manifest["tensors"].items()
            if tensor["parts"] != "even"
        }
        self._listed: list[list[tuple[int, int]]] = [[] for _ in range(self.world_size)]
        for name, parts in self._parts.items():
            for part in parts:
                self._listed[part.rank].append((self._index[name], part.numel))
        self._ends: dict[int, np.ndarray] = {}

    def begin(self, rank: int) -> int:
        """First byte after the header of a rank's file."""
        return 8 + self._files[rank]["header_bytes"]

    def num_bytes(self, rank: int) -> int:
        """Bytes of a rank's pieces of all parameters."""
        ends = self._ends_of(rank)
        return int(ends[-1]) if len(ends) else 0

    def overlaps(self, name: str, start: int, numel: int) -> list[Overlap]:
        """The parts that hold elements start : start + numel of a tensor."""
        if not numel:
            return []
        end = start + numel
        if name in self._parts:
            return [part for part in self._parts[name] if part.start < end and part.start + part.numel > start]
        total = int(self._totals[self._index[name]])
        part = -(-total // self.world_size)
        ranks = range(start // part, -(-end // part))
        return [Overlap(rank, rank * part, min(part, total - rank * part)) for rank in ranks]

    def byte(self, name: str, kind: str, part: Overlap) -> int:
        """The byte of that rank's file at which its part of `kind` starts. Raises ValueError: there is no such kind."""
        kinds = self._kinds[name]
        if kind not in kinds:
            raise ValueError(f"the checkpoint has no {kind} of {name}")
        index = self._index[name]
        end = int(self._ends_of(part.rank)[index])
        return self.begin(part.rank) + end - 4 * part.numel * (len(kinds) - kinds.index(kind))

    def _ends_of(self, rank: int) -> np.ndarray:
        """[tensors] byte after each one's pieces in a rank's file, counted from the end of the header."""
        if rank not in self._ends:
            part = -(-self._totals // self.world_size)
            numel = np.where(self._even, np.clip(self._totals - rank * part, 0, part), 0)
            for index, count in self._listed[rank]:
                numel[index] = count
            self._ends[rank] = np.cumsum(numel * self._bytes)
        return self._ends[rank]


def flat_parts(numels: Mapping[str, int], world_size: int) -> dict[str, list[list[int]]]:
    """How ZeRO stages 1 and 2 share trainable parameters out: one flat buffer, padded to 2 x ranks, cut evenly.

    Returns [rank, start, numel] per tensor, as a manifest lists them.
    """
    share = -(-sum(numels.values()) // (2 * world_size)) * 2
    result: dict[str, list[list[int]]] = {}
    at = 0
    for name, numel in numels.items():
        parts, start = [], 0
        while start < numel:
            rank = (at + start) // share
            count = min(numel - start, (rank + 1) * share - at - start)
            parts.append([rank, start, count])
            start += count
        result[name] = parts
        at += numel
    return result

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
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

import ofa_ds
from ofa_ds.checkpoint.layout import Layout
from ofa_ds.engine.partition import AVERAGE, MOMENTS, even_range, flat_parts
from ofa_ds.storage.direct_file import BLOCK_BYTES
from ofa_ds.storage.safetensors_file import DamagedError, check_size, whole_numbers
from ofa_ds.storage.tensor_writer import TensorSpec

FORMAT = "ofa-ds checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
KINDS = ("weight", *MOMENTS, AVERAGE)
"""What there may be of a parameter, all fp32; the weight is always there."""

Manifest = dict[str, Any]
Parts = Mapping[str, "str | list[list[int]]"]
"""Who holds what of each tensor: "even", or [rank, start, numel] of each part."""

HEADER_BYTES_A_TENSOR = 300
"""About what a tensor takes in a header; never less."""

_MAX_RNG_BYTES = 16_384
_FIRST_LINE = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')
_MAX_ELEMENTS = 2**48
_MAX_MANIFEST_BYTES = 1 << 28


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
    state: dict[str, Any] = field(default_factory=dict)
    """What `Engine.counters` gives: Adam's step, DeepSpeed's counters, the loss scale."""
    rng_ranks: int | None = None
    """Ranks of the run whose generator states there are; None: as many as there are files."""
    extra: dict[str, Any] = field(default_factory=dict)
    """`recipe`, `identity` (fingerprints of data and vocabulary), `origin` of what was imported."""


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def directory_name(step: int) -> str:
    return f"step_{step:08d}"


def infos_of(manifest: Manifest) -> dict[str, TensorInfo]:
    """What a manifest says of each parameter."""
    return {
        name: TensorInfo(shape=tuple(entry["shape"]), trainable=entry["trainable"], kinds=tuple(entry["kinds"]))
        for name, entry in manifest["tensors"].items()
    }


def facts_of(manifest: Manifest) -> Facts:
    return Facts(
        step=manifest["step"], state=manifest["state"], rng_ranks=manifest["rng_ranks"], extra=manifest["extra"]
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    body = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items()).encode() + b"}\n"
    with open(path, "xb") as file:
        file.write(b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128_hexdigest(body).encode() + body)
        file.flush()
        os.fsync(file.fileno())


def parts_of(tensors: Mapping[str, TensorInfo], ranks: int, stage: int) -> Parts:
    """What a manifest says of each tensor: who holds what. Stages 1 and 2 cut the trainable ones as one flat buffer."""
    parts: dict[str, str | list[list[int]]] = dict.fromkeys(tensors, "even")
    if stage in (1, 2):
        parts |= flat_parts({name: info.numel for name, info in tensors.items() if info.trainable}, ranks)
    return parts


def payload_specs(tensors: Mapping[str, TensorInfo], parts: Parts, rank: int, ranks: int) -> list[TensorSpec]:
    """What a rank's file holds of the parameters, in its order."""
    specs = []
    for name, info in tensors.items():
        _, numel = piece_of(parts[name], info, rank, ranks)
        if numel:
            specs += [TensorSpec(f"{kind}|{name}", "F32", (numel,), 4 * numel) for kind in info.kinds]
    return specs


def piece_of(parts: str | list[list[int]], info: TensorInfo, rank: int, ranks: int) -> tuple[int, int]:
    """(start, numel) of what a rank holds of a parameter."""
    if parts == "even":
        return even_range(info.numel, rank, ranks)
    return next(((start, numel) for holder, start, numel in parts if holder == rank), (0, 0))


def rng_prefix(rank: int, world_size: int) -> str:
    """Names of generator states begin so; those of ranks that a smaller world has no file for say whose they are."""
    return "rng|" if rank < world_size else f"rng_{rank}|"


def num_bytes_of(tensors: Mapping[str, TensorInfo], ranks: int) -> int:
    """About what a checkpoint takes on the disk; never less."""
    payload = sum(4 * info.numel * len(info.kinds) for info in tensors.values())
    headers = ranks * sum(len(info.kinds) for info in tensors.values()) * HEADER_BYTES_A_TENSOR
    return payload + headers + ranks * (_MAX_RNG_BYTES + BLOCK_BYTES)


def manifest_of(
    tensors: Mapping[str, TensorInfo],
    parts: Parts,
    *,
    files: list[dict[str, Any]],
    stage: int,
    facts: Facts,
    buffers: Mapping[str, tuple[int, ...]],
    ema_buffers: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Manifest:
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": facts.step,
        "world_size": len(files),
        "zero_stage": stage,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "code": _code_version(),
        "state": facts.state,
        "extra": facts.extra,
        "rng_ranks": len(files) if facts.rng_ranks is None else facts.rng_ranks,
        "files": files,
        "buffers": {name: list(shape) for name, shape in buffers.items()},
        "ema_buffers": {name: list(shape) for name, shape in ema_buffers.items()},
        "tensors": {
            name: {
                "shape": list(info.shape), "trainable": info.trainable, "kinds": list(info.kinds), "parts": parts[name],
            }
            for name, info in tensors.items()
        },
    }  # fmt: skip


def _code_version() -> dict[str, str]:
    return {
        "ofa_ds": ofa_ds.__version__,
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


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

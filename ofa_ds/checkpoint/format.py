"""The files of a checkpoint, version 1.

    RUN_DIR/latest                            name of the newest checkpoint, for people and scripts
    RUN_DIR/step_00000500/manifest.json       who holds what, checksums, counters, recipe; written last
    RUN_DIR/step_00000500/rank_00000.safetensors ...     one file per rank

A rank's file holds its flat pieces: `weight|NAME`, `exp_avg|NAME`, `exp_avg_sq|NAME` (fp32), `rng|torch`, `rng|cuda`
(uint8); rank 0's also `buffer|NAME` whole. Its `__metadata__` has one xxh3-64 per tensor. In the manifest, a tensor's
`parts` is "even" (ceil(n / world_size) elements a rank, in order; the last ones fewer or none) or the sorted list
[rank, start, numel]. The manifest's first line carries the xxh3-128 of all bytes after it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

FORMAT = "ofa-ds checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"

Manifest = dict[str, Any]

_FIRST_LINE = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')
_STEP_DIR = re.compile(r"step_(\d{8,})(\.old)?")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MAX_ELEMENTS = 2**48
_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


class DamagedError(ValueError):
    """A checkpoint is not what was written, or was never finished; the message names the file."""


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def directory_name(step: int) -> str:
    return f"step_{step:08d}"


def step_directories(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of all that looks like a checkpoint, newest first; a replaced one after its successor."""
    if not run_dir.is_dir():
        return []
    found = [(match, path) for path in run_dir.iterdir() if (match := _STEP_DIR.fullmatch(path.name)) and path.is_dir()]
    found.sort(key=lambda item: (-int(item[0][1]), item[0][2] is not None))
    return [(int(match[1]), path) for match, path in found]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and make it durable. Returns its manifest entry: name, bytes, xxh3_128."""
    header: dict[str, Any] = {}
    sums: dict[str, str] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        sums[name] = xxhash.xxh3_64_hexdigest(_bytes_of(tensor))
    text = json.dumps({"__metadata__": sums, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = xxhash.xxh3_128()
    with open(path, "xb", buffering=1 << 22) as file:
        for block in _blocks(text, tensors.values()):
            whole.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": 8 + len(text) + end, "xxh3_128": whole.hexdigest()}


def _blocks(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield _bytes_of(tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """A safetensors file, mapped into memory; nothing but the header is read before it is asked for.

    Raises DamagedError where the header does not describe exactly the bytes of the file.
    """

    def __init__(self, path: Path, *, num_bytes: int) -> None:
        self.path = path
        check_size(path, num_bytes)
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        length = int.from_bytes(self._data[:8].tobytes(), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise DamagedError(f"{path}: a header of {length} bytes in a file of {num_bytes}")
        try:
            header = json.loads(self._data[8 : 8 + length].tobytes())
            self._sums: dict[str, str] = header.pop("__metadata__")
            self._entries = {name: _entry(**fields) for name, fields in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(f"{path}: the header is not a safetensors header of ours: {error}") from error
        self._begin = 8 + length
        end = 0
        for name, entry in self._entries.items():
            if entry.start != end:
                raise DamagedError(f"{path}: {name} starts at byte {entry.start}, want {end}")
            end = entry.end
        if self._begin + end != num_bytes:
            raise DamagedError(f"{path}: tensors end at byte {self._begin + end} of {num_bytes}")

    def names(self) -> list[str]:
        return list(self._entries)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements start : start + numel of the flat tensor, or the whole tensor in its shape. Always a copy."""
        entry = self._entries.get(name)
        if entry is None:
            raise DamagedError(f"{self.path}: holds no {name}")
        size, total = entry.dtype.itemsize, math.prod(entry.shape)
        count = total if numel is None else numel
        if start < 0 or start + count > total:
            raise DamagedError(f"{self.path}: {name} has {total} elements, want {start} to {start + count}")
        first = self._begin + entry.start + start * size
        raw = torch.from_numpy(self._data[first : first + count * size].copy())
        flat = raw.view(entry.dtype) if count else torch.empty(0, dtype=entry.dtype)
        return flat.reshape(entry.shape) if numel is None else flat

    def check(self, name: str) -> str | None:
        """None, or what is wrong with the bytes of one tensor."""
        entry = self._entries[name]
        got = xxhash.xxh3_64_hexdigest(self._data[self._begin + entry.start : self._begin + entry.end])
        want = self._sums.get(name)
        return None if got == want else f"{self.path}: {name} has checksum {got}, was written with {want}"


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _entry(dtype: str, shape: list[int], data_offsets: list[int]) -> _Entry:
    start, end = data_offsets
    want = math.prod(_whole_numbers(shape)) * _TORCH_DTYPES[dtype].itemsize
    if end - start != want:
        raise ValueError(f"{shape} of {dtype} takes {want} bytes, offsets say {end - start}")
    return _Entry(_TORCH_DTYPES[dtype], tuple(shape), start, end)


def check_size(path: Path, num_bytes: int) -> None:
    """Raises DamagedError where `path` is no plain file of that size; a link is refused."""
    if path.is_symlink() or not path.is_file():
        raise DamagedError(f"{path}: missing, or not a plain file")
    found = path.stat().st_size
    if found != num_bytes:
        raise DamagedError(f"{path}: has {found} bytes, was written with {num_bytes}")


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Raises DamagedError where size or checksum differ from the manifest's entry."""
    check_size(path, entry["bytes"])
    whole = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            whole.update(block)
    if whole.hexdigest() != entry["xxh3_128"]:
        raise DamagedError(f"{path}: checksum {whole.hexdigest()}, was written with {entry['xxh3_128']}")


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
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path}: {error!r} is wrong with it") from error
    for entry in manifest["files"]:
        check_size(directory / entry["name"], entry["bytes"])
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    world_size, _ = _whole_numbers([manifest["world_size"], manifest["step"]])
    files = manifest["files"]
    if len(files) != world_size:
        raise ValueError(f"{len(files)} files for {world_size} ranks")
    for rank, entry in enumerate(files):
        if entry["name"] != file_name(rank):  # so no name can lead out of the directory
            raise ValueError(f"file {entry['name']!r} of rank {rank}, want {file_name(rank)}")
        _whole_numbers([entry["bytes"]])
    for name, tensor in manifest["tensors"].items():
        total = math.prod(_whole_numbers(tensor["shape"]))
        if total > _MAX_ELEMENTS:
            raise ValueError(f"{name} of {total} elements")
        if tensor["parts"] != "even":
            _check_parts(name, tensor["parts"], total, world_size)


def _check_parts(name: str, parts: list[list[int]], total: int, world_size: int) -> None:
    end = 0
    for rank, start, numel in parts:
        _whole_numbers([rank, start, numel])
        if rank >= world_size or start != end:
            raise ValueError(f"{name}: part {[rank, start, numel]} after element {end}, {world_size} ranks")
        end += numel
    if end != total:
        raise ValueError(f"{name}: parts hold {end} of {total} elements")


def _whole_numbers(values: list[Any]) -> list[int]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"want whole numbers, got {values}")
    return values


def overlaps(tensor: Mapping[str, Any], world_size: int, start: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """(rank, its first element, its number of elements) of the parts that hold elements start : start + numel."""
    if not numel:
        return
    end = start + numel
    if tensor["parts"] != "even":
        yield from ((rank, at, size) for rank, at, size in tensor["parts"] if at < end and at + size > start)
        return
    total = math.prod(tensor["shape"])
    part = -(-total // world_size)
    for rank in range(start // part, -(-end // part)):
        yield rank, rank * part, min(part, total - rank * part)

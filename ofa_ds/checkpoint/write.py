"""Writing a whole checkpoint from any training state, for any number of ranks, a few megabytes at a time."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import ofa_ds
from ofa_ds.checkpoint.format import FORMAT, MANIFEST, VERSION, Manifest, file_name, flat_parts, write_manifest
from ofa_ds.checkpoint.state import Facts, TensorInfo, TrainingState, rng_prefix
from ofa_ds.checkpoint.tensor_file import CHUNK_BYTES, bytes_of, spec_of, sync
from ofa_ds.direct_file import BLOCK_BYTES
from ofa_ds.engine_state import even_range
from ofa_ds.progress import Progress
from ofa_ds.tensor_writer import TensorWriter

PARTIAL = ".partial_"
_MIB = 1 << 20
HEADER_BYTES_A_TENSOR = 300
"""About what a tensor takes in a header; never less."""
_MAX_RNG_BYTES = 16_384

Parts = Mapping[str, "str | list[list[int]]"]


def write_checkpoint(destination: Path, state: TrainingState, *, ranks: int, stage: int) -> Path:
    """A checkpoint as `ranks` ranks at ZeRO `stage` would save it, in the new directory `destination`.

    Atomic: the directory appears when all of it is durable. Memory: a few chunks, whatever the size of the model.
    Raises ValueError (it exists), OSError (the disk is full, noticed before writing where the system tells).
    """
    parts = parts_of(state.tensors, ranks, stage)
    with new_directory(destination) as partial:
        check_space(partial, _num_bytes(state, ranks), ranks + 2)
        meter = Progress(_num_bytes(state, ranks) // _MIB, "writing", "MiB")
        with ThreadPoolExecutor(min(ranks, os.cpu_count() or 1, 8)) as pool:
            try:
                each = pool.map(lambda rank: _write_rank(partial, state, parts, rank, ranks, meter), range(ranks))
                files = list(each)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                meter.close()
        write_manifest(
            partial / MANIFEST,
            manifest_of(
                state.tensors, parts, files=files, stage=stage, facts=state.facts,
                buffers=state.buffers, ema_buffers=state.ema_buffers,
            ),
        )  # fmt: skip
    return destination


def parts_of(tensors: Mapping[str, TensorInfo], ranks: int, stage: int) -> Parts:
    """What a manifest says of each tensor: who holds what. Stages 1 and 2 cut the trainable ones as one flat buffer."""
    parts: dict[str, str | list[list[int]]] = dict.fromkeys(tensors, "even")
    if stage in (1, 2):
        parts |= flat_parts({name: info.numel for name, info in tensors.items() if info.trainable}, ranks)
    return parts


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
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


def _write_rank(
    directory: Path, state: TrainingState, parts: Parts, rank: int, ranks: int, meter: Progress
) -> dict[str, Any]:
    """Write one rank's file; returns its manifest entry."""
    state = state.again()
    pieces = [(name, *_piece(parts[name], info, rank, ranks)) for name, info in state.tensors.items()]
    pieces = [piece for piece in pieces if piece[2]]
    specs = [
        spec_of(f"{kind}|{name}", torch.float32, (numel,))
        for name, _, numel in pieces
        for kind in state.tensors[name].kinds
    ]
    extra = _extra_tensors(state, rank, ranks)
    specs += [spec_of(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()]
    with TensorWriter(directory / file_name(rank), specs) as file:
        for name, start, numel in pieces:
            for kind in state.tensors[name].kinds:
                for chunk in fp32_chunks(state, name, kind, start, numel):
                    file.write(bytes_of(chunk))
            meter.add(_whole_mib(numel, state.tensors[name]))
        for tensor in extra.values():
            file.write(bytes_of(tensor))
    return file.entry


def fp32_chunks(state: TrainingState, name: str, kind: str, start: int, numel: int) -> Iterator[Tensor]:
    """Elements start : start + numel of one tensor, CHUNK_BYTES at a time."""
    step = CHUNK_BYTES // 4
    for at in range(start, start + numel, step):
        yield state.read(name, kind, at, min(step, start + numel - at))


def _whole_mib(numel: int, info: TensorInfo) -> int:
    return 4 * numel * len(info.kinds) // _MIB


def _piece(parts: str | list[list[int]], info: TensorInfo, rank: int, ranks: int) -> tuple[int, int]:
    if parts == "even":
        return even_range(info.numel, rank, ranks)
    return next(((start, numel) for holder, start, numel in parts if holder == rank), (0, 0))


def _extra_tensors(state: TrainingState, rank: int, ranks: int) -> dict[str, Tensor]:
    """Generator states of this rank and of those that no longer have a file; rank 0 also the buffers."""
    extra: dict[str, Tensor] = {}
    for origin in range(rank, state.facts.rng_ranks or 0, ranks):
        extra |= {f"{rng_prefix(origin, ranks)}{name}": value for name, value in state.rng(origin).items()}
    if rank == 0:
        extra |= {f"buffer|{name}": state.buffer(name) for name in state.buffers}
        extra |= {f"ema_buffer|{name}": state.ema_buffer(name) for name in state.ema_buffers}
    return extra


def _num_bytes(state: TrainingState, ranks: int) -> int:
    """About what a checkpoint takes on the disk; never less."""
    payload = sum(4 * info.numel * len(info.kinds) for info in state.tensors.values())
    headers = ranks * sum(len(info.kinds) for info in state.tensors.values()) * HEADER_BYTES_A_TENSOR
    return payload + headers + ranks * (_MAX_RNG_BYTES + BLOCK_BYTES)


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A hidden directory beside `destination` that takes its name when the block ends, or is removed where it fails."""
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination}: is there already; remove it, or give another name")
    partial = destination.with_name(f"{PARTIAL}{destination.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync(partial)
        os.rename(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(destination.parent)


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A hidden path beside `destination`; its file takes that name when the block ends, or is removed if it fails."""
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination}: is there already; remove it, or give another name")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f"{PARTIAL}{destination.name}")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        os.rename(partial, destination)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(destination.parent)


def check_space(directory: Path, num_bytes: int, num_files: int) -> None:
    """Raises OSError where a file system has not that much room, in bytes or in names."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < num_bytes:
        text = f"{free / 1e9:.1f} GB are free, {num_bytes / 1e9:.1f} GB are needed"
        raise OSError(errno.ENOSPC, text, str(directory))
    if found.f_files and found.f_favail < num_files:  # 0 where a file system does not count them
        raise OSError(errno.ENOSPC, f"{found.f_favail} more files fit, {num_files} are needed", str(directory))

"""Writing a whole checkpoint from any training state, for any number of ranks, a few megabytes at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from ofa_ds.checkpoint.format import (
    MANIFEST,
    Parts,
    file_name,
    num_bytes_of,
    parts_of,
    payload_specs,
    piece_of,
    rng_prefix,
)
from ofa_ds.checkpoint.manifest import manifest_of, write_manifest
from ofa_ds.checkpoint.state import TrainingState
from ofa_ds.checkpoint.tensor_file import bytes_of, spec_of
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import check_space, new_directory
from ofa_ds.storage.safetensors_file import CHUNK_BYTES
from ofa_ds.storage.tensor_writer import FileEntry, TensorWriter

_MIB = 1 << 20


def write_checkpoint(destination: Path, state: TrainingState, *, ranks: int, stage: int) -> Path:
    """A checkpoint as `ranks` ranks at ZeRO `stage` would save it, in the new directory `destination`.

    Atomic: the directory appears when all of it is durable. Memory: a few chunks, whatever the size of the model.
    Raises ValueError (it exists), OSError (the disk is full, noticed before writing where the system tells).
    """
    parts = parts_of(state.tensors, ranks, stage)
    with new_directory(destination) as partial:
        check_space(partial, num_bytes_of(state.tensors, ranks), ranks + 2)
        meter = Progress(num_bytes_of(state.tensors, ranks) // _MIB, "writing", "MiB")
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


def _write_rank(
    directory: Path, state: TrainingState, parts: Parts, rank: int, ranks: int, meter: Progress
) -> FileEntry:
    """Write one rank's file; returns its manifest entry."""
    state = state.again()
    extra = _extra_tensors(state, rank, ranks)
    specs = payload_specs(state.tensors, parts, rank, ranks)
    specs += [spec_of(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()]
    with TensorWriter(directory / file_name(rank), specs) as file:
        for name, info in state.tensors.items():
            start, numel = piece_of(parts[name], info, rank, ranks)
            for kind in info.kinds:
                for chunk in fp32_chunks(state, name, kind, start, numel):
                    file.write(bytes_of(chunk))
            meter.add(4 * numel * len(info.kinds) / _MIB)
        for tensor in extra.values():
            file.write(bytes_of(tensor))
    return file.entry


def fp32_chunks(state: TrainingState, name: str, kind: str, start: int, numel: int) -> Iterator[Tensor]:
    """Elements start : start + numel of one tensor, CHUNK_BYTES at a time."""
    step = CHUNK_BYTES // 4
    for at in range(start, start + numel, step):
        yield state.read(name, kind, at, min(step, start + numel - at))


def _extra_tensors(state: TrainingState, rank: int, ranks: int) -> dict[str, Tensor]:
    """Generator states of this rank and of those that no longer have a file; rank 0 also the buffers."""
    extra: dict[str, Tensor] = {}
    for origin in range(rank, state.facts.rng_ranks or 0, ranks):
        extra |= {f"{rng_prefix(origin, ranks)}{name}": value for name, value in state.rng(origin).items()}
    if rank == 0:
        extra |= {f"buffer|{name}": state.buffer(name) for name in state.buffers}
        extra |= {f"ema_buffer|{name}": state.ema_buffer(name) for name in state.ema_buffers}
    return extra

"""Checking every byte of a checkpoint, on all cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ofa_ds.checkpoint.format import KINDS
from ofa_ds.checkpoint.manifest import read_manifest
from ofa_ds.checkpoint.runs import find
from ofa_ds.progress import Progress
from ofa_ds.storage.safetensors_file import DamagedError, SafetensorsFile
from ofa_ds.storage.tensor_writer import FileEntry

_BYTES_A_TASK = 1 << 27
_MIB = 1 << 20


def verify(path: str | Path) -> list[str]:
    """Every problem of a checkpoint (or of the newest one of a run directory), each with its file and tensor."""
    directory = find(path)
    try:
        manifest = read_manifest(directory)
    except DamagedError as error:
        return [str(error)]
    return check_files(directory, manifest.files, direct=True)


def describe(path: str | Path) -> dict[str, Any]:
    """What `ofa-ds checkpoint show` prints: facts about a checkpoint or the newest one of a run."""
    directory = find(path)
    manifest = read_manifest(directory)
    infos = manifest.tensors.values()
    return {
        "path": str(directory),
        "step": manifest.step,
        "ranks": manifest.world_size,
        "stage": manifest.zero_stage,
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos),
        "trainable": sum(info.numel for info in infos if info.trainable),
        "buffers": len(manifest.buffers),
        "kinds": [kind for kind in KINDS if any(kind in info.kinds for info in infos)],
        "bytes": manifest.num_bytes,
        "preset": manifest.preset,
        "identity": manifest.identity,
        "created": manifest.created,
        "code": manifest.code,
    }


def check_files(
    directory: Path,
    entries: Sequence[FileEntry],
    *,
    progress: bool = True,
    left_out: tuple[str, ...] = (),
    direct: bool = False,
) -> list[str]:
    """What is wrong with the files of these manifest entries. Reads and hashes without Python's lock, in threads.

    left_out: beginnings of names (`exp_avg|`, ...) of tensors that nobody is going to read. direct: ask the disk and
    not the page cache, which then holds nothing of it for a second reading.
    """
    meter = Progress(sum(entry.bytes for entry in entries) // _MIB, "checking", "MiB") if progress else None
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            problems: list[str] = []
            for entry in entries:
                problems += _check_file(pool, directory, entry, left_out, direct)
                if meter is not None:
                    meter.add(entry.bytes / _MIB)
            return problems
    finally:
        if meter is not None:
            meter.close()


def _check_file(
    pool: ThreadPoolExecutor, directory: Path, entry: FileEntry, left_out: tuple[str, ...], direct: bool
) -> list[str]:
    try:
        file = SafetensorsFile(
            directory / entry.name, num_bytes=entry.bytes, header_xxh3_128=entry.header_xxh3_128, direct=direct
        )
    except (DamagedError, OSError) as error:
        return [str(error)]
    return [problem for found in pool.map(file.check, _tasks(file, left_out)) for problem in found]


def _tasks(file: SafetensorsFile, left_out: tuple[str, ...]) -> list[list[str]]:
    """Names of tensors that lie one after the other, about _BYTES_A_TASK a list."""
    tasks: list[list[str]] = []
    size, end = 0, -1
    for name, entry in file.entries.items():
        if name.startswith(left_out):
            continue
        if entry.start != end or size >= _BYTES_A_TASK:
            tasks.append([])
            size = 0
        tasks[-1].append(name)
        size += entry.end - entry.start
        end = entry.end
    return tasks

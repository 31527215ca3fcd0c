"""Checking every byte of a checkpoint, on all cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ofa_ds.checkpoint.format import KINDS
from ofa_ds.checkpoint.manifest import Manifest, read_manifest
from ofa_ds.checkpoint.rank_file import open_rank
from ofa_ds.checkpoint.runs import find
from ofa_ds.progress import Progress
from ofa_ds.storage.safetensors_file import DamagedError, SafetensorsFile

_BYTES_A_TASK = 1 << 27
_MIB = 1 << 20


def verify(path: str | Path) -> list[str]:
    """Every problem of a checkpoint (or of the newest one of a run directory), each with its file and tensor."""
    directory = find(path)
    try:
        manifest = read_manifest(directory)
    except DamagedError as error:
        return [str(error)]
    return [str(problem) for problem in check_files(directory, manifest, direct=True)]


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


Problem = DamagedError | OSError


def check_files(
    directory: Path,
    manifest: Manifest,
    ranks: Sequence[int] | None = None,
    *,
    progress: bool = True,
    direct: bool = False,
) -> list[Problem]:
    """What is wrong with the files of these ranks, or of all. Reads and hashes without Python's lock, in threads.

    An OSError among it says that bytes could not be read, and nothing about what they are.
    direct: ask the disk and not the page cache, which then holds nothing of it for a second reading.
    """
    ranks = range(manifest.world_size) if ranks is None else ranks
    meter = Progress(sum(manifest.files[k].bytes for k in ranks) // _MIB, "checking", "MiB") if progress else None
    try:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            problems: list[Problem] = []
            for rank in ranks:
                try:
                    file = open_rank(directory, manifest, rank, SafetensorsFile, direct=direct)
                    for found in pool.map(partial(_check, file), _tasks(file)):
                        problems += found
                except (DamagedError, OSError) as error:
                    problems.append(error)
                if meter is not None:
                    meter.add(manifest.files[rank].bytes / _MIB)
            return problems
    finally:
        if meter is not None:
            meter.close()


def _check(file: SafetensorsFile, names: list[str]) -> list[Problem]:
    try:
        return [DamagedError(text) for text in file.check(names)]
    except (DamagedError, OSError) as error:
        return [error]


def _tasks(file: SafetensorsFile) -> list[list[str]]:
    """Names of tensors that lie one after the other, about _BYTES_A_TASK a list."""
    tasks: list[list[str]] = []
    size, end = 0, -1
    for name, entry in file.entries.items():
        if entry.start != end or size >= _BYTES_A_TASK:
            tasks.append([])
            size = 0
        tasks[-1].append(name)
        size += entry.end - entry.start
        end = entry.end
    return tasks

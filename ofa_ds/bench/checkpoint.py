"""`bench checkpoint`: saving, reshaping and exporting a training state, beside DeepSpeed's and torch's own ways.

A ZeRO-3 bf16 state on 2 ranks (fp32 weights and moments: 12 bytes a parameter) is made once; every job then runs in
processes of its own, whose peak memory is what the system counted. Cold: the files' pages were dropped from the cache.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofa_ds.bench.checkpoint_worker import VOCAB_SIZE
from ofa_ds.checkpoint.verifying import verify
from ofa_ds.storage.atomic import check_space
from ofa_ds.storage.direct import set_direct

WORKER = Path(__file__).with_name("checkpoint_worker.py")
RANKS, OTHER_RANKS = 2, 3
_FOLDER_BYTES = 25_000_000_000
_READ_BYTES = 1 << 23


@dataclass(frozen=True)
class Job:
    """What one process, or one launch of ranks, took."""

    seconds: float
    peak_MiB: float
    """Resident memory of the largest process, interpreter and libraries included."""


def bench_checkpoint(preset: str, folder: Path | None) -> dict[str, Any]:
    """Seconds and memory of every job, by name; `goal` figures are the issue's, not measured here."""
    root = Path(tempfile.mkdtemp(prefix="ofa-ds-bench-", dir=folder))
    try:
        check_space(root, _FOLDER_BYTES if preset == "base" else 0, 1000)
        return _run(preset, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _run(preset: str, root: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"preset": preset, "vocab_size": VOCAB_SIZE}
    _tell(f"making a state of {preset} on {RANKS} ranks and saving it in each way")
    result |= _launch(root, RANKS, "save", preset)
    for cache in ("cold", "warm"):
        _tell(f"loading it at {OTHER_RANKS} ranks, {cache} cache")
        _sync()
        if cache == "cold":
            _drop_caches(root)
        loaded = _launch(root, OTHER_RANKS, "load", preset)
        result |= {f"{name}_{cache}_s": seconds for name, seconds in loaded.items()}
    _tell("steps on one rank, alone and while a save is written")
    result |= _launch(root, 1, "flush", preset)
    ours, theirs, torchs = root / "ours" / "step_00000001", root / "deepspeed", root / "dcp"
    result["state_bytes"] = sum(file.stat().st_size for file in ours.iterdir())
    _tell("the disk alone, and a check of every byte")
    _sync()
    read_s, check_s = zip(*((_read_s(ours), _check_s(ours)) for _ in range(3)), strict=True)
    result |= {"disk_read_s": min(read_s), "check_s": min(check_s)}
    cli = [sys.executable, "-m", "ofa_ds.cli.main", "checkpoint"]
    jobs: dict[str, Sequence[str]] = {
        "verify": [*cli, "verify", str(ours)],
        "reshard": [*cli, "reshard", str(ours), str(root / "resharded"), "--ranks", str(OTHER_RANKS)],
        "export": [*cli, "export", str(ours), str(root / "exported"), "--format", "huggingface"],
        "ds_to_universal": [
            sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(theirs / "tag"),
            "--output_folder", str(root / "universal"), "--num_extract_workers", "2", "--num_merge_workers", "2",
        ],
        "zero_to_fp32": [
            sys.executable, "-m", "deepspeed.utils.zero_to_fp32", str(theirs), str(root / "consolidated"),
            "--safe_serialization",
        ],
        "dcp_to_torch_save": [
            sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(torchs),
            str(root / "dcp.pt"),
        ],
    }  # fmt: skip
    for name, command in jobs.items():
        for cache in ("cold", "warm"):
            _tell(f"{name}, {cache} cache")
            for made in ("resharded", "exported", "universal", "consolidated"):
                shutil.rmtree(root / made, ignore_errors=True)
            _sync()
            if cache == "cold":
                _drop_caches(root)
            job = _measured(command)
            result[f"{name}_{cache}_s"], result[f"{name}_MiB"] = job.seconds, job.peak_MiB
    return result


def _read_s(directory: Path) -> float:
    """Seconds to read all files past the page cache, on a thread a core, and do nothing with them."""
    num_threads = os.cpu_count() or 1

    def read(file: Path, number: int) -> None:
        descriptor, buffer = os.open(file, os.O_RDONLY), mmap.mmap(-1, _READ_BYTES)
        try:
            set_direct(descriptor, True)
            for start in range(number * _READ_BYTES, file.stat().st_size, num_threads * _READ_BYTES):
                os.preadv(descriptor, [buffer], start)
        finally:
            os.close(descriptor)

    started = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        for file in sorted(directory.glob("*.safetensors")):
            list(pool.map(read, [file] * num_threads, range(num_threads)))
    return time.perf_counter() - started


def _check_s(directory: Path) -> float:
    started = time.perf_counter()
    if verify(directory):
        raise RuntimeError(f"{directory}: is damaged")
    return time.perf_counter() - started


_MEASURE = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
output = process.stdout.read()
_, status, usage = os.wait4(process.pid, 0)
taken = {"seconds": time.perf_counter() - started, "peak_KiB": usage.ru_maxrss}
with open(sys.argv[1], "w") as file:
    json.dump(taken | {"code": os.waitstatus_to_exitcode(status), "output": output.decode()[-2000:]}, file)
"""
"""In a small process of its own: Linux counts the memory of the process that starts another one as the other's too."""


def _measured(command: Sequence[str]) -> Job:
    """Raises RuntimeError with the end of its output where the command fails."""
    with tempfile.NamedTemporaryFile() as report:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, "-c", _MEASURE, report.name, *command], check=True, env=environment)
        taken = json.load(report)
    if taken["code"]:
        raise RuntimeError(f"{' '.join(command)}: {taken['output']}")
    return Job(taken["seconds"], taken["peak_KiB"] / 1024)


def _launch(root: Path, ranks: int, what: str, preset: str) -> dict[str, Any]:
    """Ranks of the worker under torchrun; returns what rank 0 wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    _measured([*command, str(WORKER), what, str(root), preset])
    return json.loads((root / f"{what}.json").read_text())


def _drop_caches(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _sync() -> None:
    """What was written before must not be paid for by the next job."""
    os.sync()


def _tell(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _share(result: dict[str, Any]) -> str:
    speeds = [result["state_bytes"] / result[name] / 1e9 for name in ("check_s", "disk_read_s")]
    return f"{speeds[0]:.2f} GB/s, {speeds[0] / speeds[1]:.0%} of {speeds[1]:.2f} GB/s"


def table(result: dict[str, Any]) -> str:
    """Rows of jobs, columns of programs."""

    def cell(name: str) -> str:
        return f"{both(name)}, {result[f'{name}_MiB']:.0f} MiB"

    def seconds(name: str) -> str:
        return f"{result[name]:.2f} s"

    def both(name: str) -> str:
        return f"{result[f'{name}_cold_s']:.1f} / {result[f'{name}_warm_s']:.1f} s"

    gigabytes = result["state_bytes"] / 1e9
    stall = (
        f"{result['background_stall_s']:.2f} s (first {result['background_first_stall_s']:.2f}), "
        f"{result['background_stall_s'] / result['memcpy_s']:.2f}x memcpy"
    )
    slowdown = f"{100 * result['flush_slowdown']:+.1f} % ({result['flushed_pairs']} pairs of steps)"
    universal, consolidate, dcp_file = (cell(name) for name in ("ds_to_universal", "zero_to_fp32", "dcp_to_torch_save"))
    rows = [
        ("job", "ofa-ds", "DeepSpeed", "torch DCP"),
        ("save, 2 ranks", seconds("save_s"), seconds("deepspeed_save_s"), seconds("dcp_save_s")),
        ("stall of a background save", stall, "-", "-"),
        ("a step while it is written", slowdown, "-", "-"),
        ("load at 3 ranks", both("load"), "not possible", both("dcp_load")),
        ("make it loadable at 3 ranks", f"0; reshard: {cell('reshard')}", f"ds_to_universal: {universal}", "0"),
        ("one fp32 file", f"export: {cell('export')}", f"zero_to_fp32: {consolidate}", f"dcp_to_torch: {dcp_file}"),
        ("verify", f"{cell('verify')}; without start-up {_share(result)} of the disk", "-", "-"),
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{result['preset']}, {result['parameters'] / 1e6:.0f} M parameters, {gigabytes:.2f} GB; cold / warm cache"
    return "\n".join([head, *lines])

"""What the weights of a disturbed run must be: those of a quiet one with the same world size at each step.

A quiet run has one process a host, started by no launcher.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import counting_rank
import hosts
from field import Field, interpreter, write_orders
from plans import NUM_STEPS

Segments = tuple[tuple[int, int], ...]
"""(first step done before it, number of ranks) of each stretch of a run."""

TIMEOUT_S = 300


@dataclass(frozen=True)
class Schedule:
    """All that the weights of a run depend on."""

    segments: Segments
    left_out: tuple[int, ...]
    """`train.skip_steps`."""
    nan: tuple[int, ...]
    """Steps whose gradient is not finite on rank 0 or another."""

    def world_sizes(self) -> dict[int, int]:
        """Of each step."""
        return {step: size for start, size in self.segments for step in range(start + 1, NUM_STEPS + 1)}


def schedule_of(run_dir: Path, nan: tuple[int, ...]) -> Schedule:
    """From what the launches wrote down: an attempt's steps count up to where a later one began."""
    lines = (run_dir / "launch" / "attempts.jsonl").read_text().splitlines()
    starts = [event for event in map(json.loads, lines) if event["event"] == "start"]
    segments: list[tuple[int, int]] = []
    for event in starts:
        segments = [segment for segment in segments if segment[0] < event["from_step"]]
        segments.append((event["from_step"], event["world_size"]))
    joined = [each for i, each in enumerate(segments) if not i or segments[i - 1][1] != each[1]]
    return Schedule(tuple(joined), tuple(starts[-1].get("skip_steps", ())), nan)


def fingerprint(checkpoint: Path) -> str:
    """Of every byte of the weights and moments of all ranks."""
    digest = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def last_checkpoint(run_dir: Path) -> Path:
    return run_dir / f"step_{NUM_STEPS:08d}"


def stand_in_weights(schedule: Schedule) -> str:
    return counting_rank.weights_after(schedule.world_sizes(), {*schedule.left_out, *schedule.nan})


class References:
    """Quiet runs, each made once."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._made: dict[Schedule, Path] = {}

    def weights(self, schedule: Schedule) -> str:
        """The fingerprint of the last checkpoint. Raises RuntimeError where the quiet run fails."""
        return fingerprint(last_checkpoint(self._run_dir(schedule)))

    def _run_dir(self, schedule: Schedule) -> Path:
        if schedule not in self._made:
            *before, (start, world_size) = schedule.segments
            past = self._run_dir(Schedule(tuple(before), schedule.left_out, schedule.nan)) if before else None
            run_dir = self._field.work / f"reference_{len(self._made)}"
            if past is not None:
                shutil.copytree(past / f"step_{start:08d}", run_dir / f"step_{start:08d}")
            self._train(schedule, world_size, run_dir)
            self._made[schedule] = run_dir
        return self._made[schedule]

    def _train(self, schedule: Schedule, world_size: int, run_dir: Path) -> None:
        """One process a host, without any launcher."""
        field, port = self._field, str(hosts.free_port())
        nan = [{"rank": 0, "step": step} for step in schedule.nan]
        environment = field.environment(write_orders(field.desk(f"{run_dir.name}_desk"), nan=nan))
        shape = {"WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": port}
        command = [interpreter(), "-m", "ofa_ds.pretrain", "pretrain-nano", f"run_dir={run_dir}", *field.settings]
        command += ["train.save_in_background=false"]
        if schedule.left_out:
            command += [f"train.skip_steps={list(schedule.left_out)}"]
        run_dir.mkdir(exist_ok=True)
        running = [
            field.cluster.start(
                command, host=rank, log=run_dir / f"rank_{rank}.log", env={**environment, **shape, "RANK": str(rank)}
            )
            for rank in range(world_size)
        ]
        for one in running:
            try:
                code = one.wait(TIMEOUT_S)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                raise RuntimeError(f"the quiet run of {schedule} does not end: {error}") from error
            if code:
                raise RuntimeError(f"the quiet run of {schedule} failed with {code}: {one.output[-2000:]}")

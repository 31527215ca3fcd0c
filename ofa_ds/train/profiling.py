"""A trace of some steps of a run, `train.profile_steps`: for chrome://tracing or Perfetto, and a table beside it.

Nothing here ends or changes a run: what cannot be traced or written is told, and training goes on.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ofa_ds.beat import Pulse
from ofa_ds.config import TrainConfig
from ofa_ds.config.values import step_window
from ofa_ds.engine.ranks import Ranks
from ofa_ds.storage.atomic import check_space, new_file
from ofa_ds.storage.sizes import size_text
from ofa_ds.train.profile_table import table

FOLDER = "profile"
MAX_EVENTS = 1_000_000
"""Of one trace: 280 MB as JSON, 22 MB packed, 1.8 GB of host memory while it is made (each measured, 423,100 events of
torch 2.13 on a CPU). A window of more events ends early, after whole steps."""
_EVENT_BYTES = 400
"""Of disk, while a trace is made; 279 + 22 were measured, and names may be longer."""
_CHUNK = 1 << 20


class Profiling:
    """This rank's part in `train.profile_steps`: `begin` and `end` around each step, `close` after the last.

    The step before the window is traced too and thrown away: the tracer's own start lies there, and it tells how many
    events a step has. Where a run begins with the window, its first step is that one, unless it is the only one.
    """

    def __init__(self, train: TrainConfig, ranks: Ranks, run_dir: str, pulse: Pulse, *, first_step: int) -> None:
        """first_step: steps that are done when the loop begins."""
        window = step_window(train.profile_steps)
        todo = range(max(window.start, first_step + 1), min(window.stop, train.num_steps + 1))
        self._ranks, self._pulse = ranks, pulse
        self._folder = Path(run_dir) / FOLDER
        self._window = range(0)
        self._warm_up = 0
        """Number of the step that is traced and thrown away; 0: none."""
        self._steps: list[int] = []
        """Steps in the trace so far."""
        self._max_steps = 0
        self._tracer: Any = None
        self._mark: Any = None
        self._began_ns, self._wall_ns = 0, 0.0
        if not window:
            return
        if ranks.rank == 0:
            self._tell_what_is_left_out(train, window, todo, first_step)
        if ranks.rank not in train.profile_ranks or not todo:
            return
        if todo.start > first_step + 1:
            self._warm_up = todo.start - 1
        elif len(todo) > 1:
            self._warm_up, todo = todo.start, todo[1:]
        self._window = todo

    def begin(self, step: int) -> None:
        """Before step `step`."""
        if step != self._warm_up and step not in self._window:
            return
        try:
            if self._tracer is None:
                self._start()
            self._mark = torch.profiler.record_function(f"step {step}")
            self._mark.__enter__()
        except Exception as error:  # whatever a tracer does, it is no reason to stop
            self._give_up(error)

    def end(self, step: int) -> float:
        """After step `step`, before its beat; returns the seconds that went by with something else than steps."""
        if self._tracer is None:
            return 0.0
        began = time.perf_counter()
        try:
            self._mark.__exit__(None, None, None)
            if step == self._warm_up:
                events = self._stop()
                self._max_steps = max(1, MAX_EVENTS // max(1, len(events)))
                self._tracer = None
            else:
                self._steps.append(step)
                is_full = self._max_steps and len(self._steps) >= self._max_steps
                if step == self._window[-1] or is_full:
                    self._finish()
        except Exception as error:
            self._give_up(error)
        return time.perf_counter() - began

    def close(self) -> None:
        """The loop is over: what there is of a window is written. Not for a run that failed: a GPU may never answer."""
        if self._tracer is None:
            return
        try:
            if self._steps:
                self._finish()
            else:
                self._stop()
                self._tracer = None
        except Exception as error:
            self._give_up(error)

    def _start(self) -> None:
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU, kinds.CUDA] if self._ranks.device.type == "cuda" else [kinds.CPU]
        tracer = torch.profiler.profile(activities=activities)
        tracer.start()
        self._tracer, self._began_ns = tracer, time.perf_counter_ns()

    def _stop(self) -> Sequence[Any]:
        """The raw events. `key_averages()` of the public interface needs 50 us and 4 kB for each, these 2."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self._wall_ns = time.perf_counter_ns() - self._began_ns
        self._tracer.stop()
        return self._tracer.profiler.kineto_results.events()

    def _finish(self) -> None:
        """Write the trace and its table, and be done."""
        steps, window = self._steps, self._window
        self._window = range(0)
        self._pulse.beat("sample", steps[-1])  # this may take its time
        events, tracer, self._tracer = self._stop(), self._tracer, None
        ranks = self._ranks
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._free_name(f"steps_{steps[0]}-{steps[-1]}.rank_{ranks.rank:05d}")
        device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
        title = (
            f"steps {steps[0]} to {steps[-1]}, rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}, "
            f"{device}, torch {torch.__version__}"
        )
        text = table(events, title=title, num_steps=len(steps), wall_ns=self._wall_ns)
        with new_file(self._folder / f"{name}.txt") as file:
            file.write_text(text, encoding="utf-8")
        num_events = len(events)
        del events
        self._write_trace(tracer, self._folder / f"{name}.json.gz", num_events)
        early = ""
        if steps[-1] != window[-1]:
            early = f", not to {window[-1]}: " + (
                f"a trace has at most {MAX_EVENTS:,} events" if len(steps) == self._max_steps else "the run ended"
            )
        self._tell(f"steps {steps[0]} to {steps[-1]}{early}; {self._folder / name}.json.gz and .txt")

    def _write_trace(self, tracer: Any, path: Path, num_events: int) -> None:
        """Raises OSError where it does not come whole to the disk: torch's writer does not say so."""
        check_space(path.parent, num_events * _EVENT_BYTES, 2)
        with new_file(path) as packed:
            raw = packed.with_name("raw.json")
            tracer.export_chrome_trace(str(raw))
            if not _is_whole(raw):
                size = size_text(raw.stat().st_size) if raw.exists() else "nothing"
                raise OSError(f"{path.parent}: the trace could not be written whole ({size} of it): is there room?")
            with open(raw, "rb") as source, gzip.open(packed, "wb", compresslevel=3) as out:
                shutil.copyfileobj(source, out, _CHUNK)
            raw.unlink()

    def _free_name(self, name: str) -> str:
        """That name, or with a number: an earlier attempt's files stay."""
        taken = {file.partition(".rank_")[0] + ".rank_" + file.partition(".rank_")[2].partition(".")[0]
                 for file in os.listdir(self._folder) if not file.startswith(".")}  # fmt: skip
        return next(each for each in (name, *(f"{name}-{k}" for k in range(2, 10_000))) if each not in taken)

    def _tell_what_is_left_out(self, train: TrainConfig, window: range, todo: range, first_step: int) -> None:
        """What the user asked for that will not be: by rank 0, once."""
        if not todo:
            late = window.start > first_step
            why = f"the run ends at step {train.num_steps}" if late else f"the run goes on from step {first_step}"
            self._tell(f"nothing is traced of train.profile_steps {train.profile_steps}: {why}")
        elif len(todo) < len(window):
            self._tell(f"of train.profile_steps {train.profile_steps}, steps {todo[0]} to {todo[-1]} are this run's")
        missing = [rank for rank in train.profile_ranks if rank >= self._ranks.world_size]
        if missing and todo:
            named = ", ".join(map(str, missing[:5]))
            self._tell(f"train.profile_ranks has {named}: this run has {self._ranks.world_size} ranks, from 0 on")

    def _give_up(self, error: Exception) -> None:
        tracer, self._tracer, self._window, self._warm_up = self._tracer, None, range(0), 0
        if tracer is not None:
            try:
                tracer.stop()
            except Exception:  # noqa: S110 - it had been stopped, or is what failed
                pass
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._tell(f"nothing more is traced, training goes on: {text}")

    def _tell(self, text: str) -> None:
        rank = f"rank {self._ranks.rank}: " if self._ranks.world_size > 1 else ""
        with contextlib.suppress(OSError):  # the disk that is full may be that of the log
            print(f"profile: {rank}{text}", file=sys.stderr, flush=True)


def _is_whole(path: Path) -> bool:
    """Whether a trace of torch's ends as one does."""
    if not path.exists() or not (size := path.stat().st_size):
        return False
    with open(path, "rb") as file:
        file.seek(max(0, size - 4096))
        end = file.read().rstrip()
    return end.endswith(b"}") and b'"traceName"' in end

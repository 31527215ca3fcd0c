"""The same records to Weights & Biases, where it is installed and a recipe asks for it (`train.wandb`).

A thread talks to it, so that no step waits for a network; what it cannot take is counted, told once, and ends no run.
WANDB_MODE=offline and its other variables count as they do anywhere. The run keeps its id in RUN_DIR/wandb_id.txt, so a
run that is gone on with is the same one there; its x axis is `step`, and the last record of a step is the one that
counts.
"""

from __future__ import annotations

import os
import queue
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ofa_ds.storage.atomic import replace_file

ID = "wandb_id.txt"
_WAITING = 1000
"""Records that may wait for a slow network; further ones are lost."""
_END_S = 30.0
"""How long the end of a run waits for what is still to be sent."""


class Wandb:
    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any], *, end_s: float = _END_S) -> None:
        """config: JSON values that the run is told apart by."""
        self._project, self._run_dir, self._config, self._end_s = project, run_dir, dict(config), end_s
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_WAITING)
        self._losses = 0
        self._failed = self._given_up = False
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        record = {"step": step, **values}
        self._put(lambda run: run.log(record))

    def picture(self, step: int, tag: str, image_HWC: Any) -> None:  # noqa: N803
        """image_HWC: uint8 [height, width, 3]."""

        def send(run: Any) -> None:
            import wandb

            run.log({"step": step, tag: wandb.Image(image_HWC)})

        self._put(send)

    def close(self) -> None:
        """Waits for what is still to be sent, but not for ever."""
        try:
            self._queue.put(None, timeout=self._end_s)
            self._thread.join(self._end_s)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._given_up = True
            self._tell(f"does not answer within {self._end_s:.0f} s; {self._queue.qsize()} records are not sent")
        elif self._losses:
            self._tell(f"{self._losses} records were not taken: they are in metrics.jsonl alone")

    def _put(self, job: Callable[[Any], None]) -> None:
        if self._failed:
            self._losses += 1
            return
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self._losses += 1
            if self._losses == 1:
                self._tell(f"is {_WAITING} records behind; further ones are lost until it follows")

    def _run(self) -> None:
        """In the thread."""
        run = None
        try:
            run = self._begin()
            while (job := self._queue.get()) is not None and not self._given_up:
                self._send(job, run)
            run.finish()
        except BaseException as error:  # it may raise anything, SystemExit too
            self._failed = True
            self._tell(f"{_in_words(error)}; training goes on without it")
            self._losses += sum(1 for job in _left(self._queue) if job is not None)

    def _begin(self) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")  # its own lines would mix with the run's
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError("it is not installed; pip install wandb, or leave train.wandb away") from error
        run = wandb.init(
            project=self._project, id=self._id(), resume="allow", dir=str(self._run_dir), name=self._run_dir.name,
            config=self._config,
        )  # fmt: skip
        if where := getattr(run, "url", None) or getattr(run, "dir", None):
            self._tell(f"records go to {where}")
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _id(self) -> str:
        file = self._run_dir / ID
        try:
            known = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            known = ""
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
            return known
        new = secrets.token_hex(8)
        try:
            replace_file(file, f"{new}\n")
        except OSError as error:
            self._tell(f"{file} cannot be written ({error}): a run that goes on will be another one there")
        return new

    def _send(self, job: Callable[[Any], None], run: Any) -> None:
        try:
            job(run)
        except Exception as error:
            self._losses += 1
            if self._losses == 1:
                self._tell(f"{_in_words(error)}; training goes on")

    def _tell(self, text: str) -> None:
        print(f"metrics: W&B project {self._project}: {text}", file=sys.stderr, flush=True)


def _left(jobs: queue.Queue[Any]) -> list[Any]:
    found = []
    while True:
        try:
            found.append(jobs.get_nowait())
        except queue.Empty:
            return found


def _in_words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

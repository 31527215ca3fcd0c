"""What a run says of itself: a console line, `metrics.jsonl`, TensorBoard. Rank 0 writes; sums are over all ranks."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.storage.atomic import replace_file
from ofa_ds.terms import TASKS

KIBI_PER_MEBI = 1024


def peak_memory_MiB(device: torch.device) -> float:  # noqa: N802
    """Largest memory so far: of the accelerator where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KIBI_PER_MEBI


class Window:
    """Sums since the last log line, kept on the device so that a step never waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._waited_s = 0.0
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.num_steps = 0
        self.num_counted = self.num_passed_over = 0
        size = 1 + 2 + 2 * len(TASKS)  # loss; tokens, examples; nll and tokens of each task
        self._sums = torch.zeros(size, device=self.device, dtype=torch.float64)
        self._step = torch.zeros_like(self._sums)

    def add_micro_batch(self, task_sums: Tensor, loss: Tensor, *, num_tokens: int, num_examples: int) -> None:
        """task_sums: [8, 4] of `loss.task_sums`; loss: this micro-batch's share of the step's loss."""
        self._step[0] += loss.double()
        self._step[1:3] += torch.tensor([num_tokens, num_examples], device=self.device, dtype=torch.float64)
        self._step[3:] += task_sums[:, [1, 3]].double().flatten()  # nll, tokens

    def end_step(self, *, counted: bool = True) -> None:
        """counted: false for a step that was skipped; its sums, which may not be finite, are left out."""
        self.num_steps += 1
        if counted:
            self.num_counted += 1
            self._sums += self._step
        self._step.zero_()

    def pass_over(self) -> None:
        """A step that was not taken."""
        self.num_passed_over += 1

    def close(self, sum_over_ranks: Any, *, waited_s: float = 0.0) -> dict[str, float]:
        """Means over the window and all ranks, then a new window. `sum_over_ranks` reduces one flat tensor in place.

        waited_s: what this rank has waited for data from the start on.
        """
        sum_over_ranks(self._sums)
        loss, num_tokens, num_examples, *tasks = self._sums.tolist()
        seconds = time.perf_counter() - self.start
        values = {"loss": loss / self.num_counted if self.num_counted else math.nan}
        for task, nll, count in zip(TASKS, tasks[::2], tasks[1::2], strict=True):
            values[f"loss/{task}"] = nll / count if count else math.nan
        values["tokens_per_s"] = num_tokens / seconds
        values["examples_per_s"] = num_examples / seconds
        values["data_wait_fraction"] = (waited_s - self._waited_s) / seconds
        values["skipped_steps"] = float(self.num_steps - self.num_counted + self.num_passed_over)
        values["step_ms"] = 1000 * seconds / max(self.num_steps, 1)
        self._waited_s = waited_s
        self.reset()
        return values


class MetricsWriter:
    """One line per record on the console (a progress bar on a terminal), in metrics.jsonl and in TensorBoard.

    No run ends because one of them cannot be written: that is told once, with the path, and how often at the end.
    """

    def __init__(self, run_dir: Path, *, num_steps: int, first_step: int) -> None:
        from tqdm import tqdm

        self._lines = _Log(run_dir / "metrics.jsonl", lambda path: _drop_records_from(path, first_step))
        self._board = Board(run_dir / "tensorboard", first_step)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True) if terminal else None
        self._num_steps = num_steps

    def write(self, step: int, values: dict[str, float]) -> None:
        """`values` that are not finite (a task without tokens in this window, an overflow) are null in the file."""
        record = {"step": step, **{key: _rounded(value) for key, value in values.items()}}
        self._lines.append(f"{json.dumps(record, allow_nan=False)}\n".encode())
        self._board.scalars({key: value for key, value in values.items() if math.isfinite(value)}, step)
        line = (
            f"step {step}/{self._num_steps}  loss {values['loss']:.3f}  lr {values['lr']:.2e}  "
            f"grad {values['grad_norm']:.2f}  {values['examples_per_s']:.0f} examples/s  {values['step_ms']:.0f} ms  "
            f"wait {values['data_wait_fraction']:.0%}"
        )
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.n = step
            self._bar.set_description_str(line.split("  ", 1)[1])

    def picture(self, step: int, tag: str, image_HWC: Any) -> None:  # noqa: N803
        """image_HWC: uint8 [height, width, 3]."""
        self._board.picture(step, tag, image_HWC)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._lines.close()


class _Log:
    """A file that grows by whole records. What cannot be written is told when it begins, and counted until the end."""

    def __init__(self, path: Path, head: Callable[[Path], bytes]) -> None:
        """head: makes the file ready, and gives what a run begins with."""
        self._path, self._head = path, head
        self._file: int | None = None
        self._end = self._losses = 0
        self.append(b"")

    def append(self, record: bytes) -> None:
        try:
            if self._file is None:  # it could not be opened; perhaps now
                self._open()
            self._write(record)
        except OSError as error:
            self._losses += 1
            if self._losses == 1:
                self._tell(f"cannot be written: {' '.join(str(error).split())}; training goes on")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._losses:
            self._tell(f"was not written {self._losses} times: those records are lost")

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        head = self._head(self._path)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._file).st_size
        self._write(head)

    def _write(self, record: bytes) -> None:
        assert self._file is not None
        written = 0
        try:
            while written < len(record):
                written += os.write(self._file, record[written:])
        except OSError:
            with contextlib.suppress(OSError):  # a device has no end
                os.ftruncate(self._file, self._end)  # no half record that would spoil the next one
            raise
        self._end += written

    def _tell(self, text: str) -> None:
        print(f"metrics: {self._path}: {text}", file=sys.stderr, flush=True)


class Board:
    """TensorBoard's file: a record is an event. Without torch's writer, whose thread dies of a full disk."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        purge = Event(wall_time=time.time(), step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        head = b"".join(_framed(event.SerializeToString()) for event in (version, purge))
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._log = _Log(folder / name, lambda path: head)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._add(step, [self._summary.Value(tag=key, simple_value=value) for key, value in values.items()])

    def picture(self, step: int, tag: str, image_HWC: Any) -> None:  # noqa: N803
        """image_HWC: uint8 [height, width, 3]."""
        from PIL import Image

        height, width, _ = image_HWC.shape
        png = io.BytesIO()
        Image.fromarray(image_HWC).save(png, format="PNG")
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.getvalue())
        self._add(step, [self._summary.Value(tag=tag, image=image)])

    def _add(self, step: int, values: list[Any]) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._log.append(_framed(event.SerializeToString()))

    def close(self) -> None:
        self._log.close()


def _framed(data: bytes) -> bytes:
    """A record of TensorFlow's: length, data, a checksum of each."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def _rounded(value: float) -> float | None:
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _drop_records_from(path: Path, first_step: int) -> bytes:
    """A resumed run writes the steps after its checkpoint again: the old records of those steps go."""
    if not path.is_file():  # opening what is no file tells more
        return b""
    text = path.read_bytes().decode("utf-8", "replace")
    kept = "".join(f"{line}\n" for line in text.split("\n") if _step_of(line) <= first_step)
    if kept != text:
        replace_file(path, kept)
    return b""


def _step_of(line: str) -> float:
    """The step of a record; a half-written line (the process was killed) counts as one to drop."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

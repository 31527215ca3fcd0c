"""A record of a run, to each place that it is read at: console, `metrics.jsonl`, TensorBoard. Rank 0 writes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofa_ds.storage.atomic import replace_file
from ofa_ds.train.report_files import Board, Log
from ofa_ds.train.report_histograms import Histogram
from ofa_ds.train.report_wandb import Wandb


class MetricsWriter:
    """One line per record on the console (a progress bar on a terminal), in metrics.jsonl and in TensorBoard.

    No run ends because one of them cannot be written: that is told once, with the path, and how often at the end.
    """

    def __init__(self, run_dir: Path, *, num_steps: int, first_step: int, wandb: Wandb | None = None) -> None:
        from tqdm import tqdm

        self._lines = Log(run_dir / "metrics.jsonl", lambda path: _drop_records_from(path, first_step))
        self._board = Board(run_dir / "tensorboard", first_step)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True) if terminal else None
        self._num_steps, self._wandb = num_steps, wandb

    def write(self, step: int, values: dict[str, float]) -> None:
        """`values` that are not finite (a task without tokens in this window, an overflow) are null in the file."""
        self.scores(step, values)
        line = console_line(step, self._num_steps, values)
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.n = step
            self._bar.set_description_str(line.split("  ", 1)[1])

    def scores(self, step: int, values: dict[str, float]) -> None:
        """What a judgement of held-out rows gave, under its own names."""
        record = {"step": step, **{key: _rounded(value) for key, value in values.items()}}
        self._lines.append(f"{json.dumps(record, allow_nan=False)}\n".encode())
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        self._board.scalars(finite, step)
        if self._wandb is not None:
            self._wandb.scalars(finite, step)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """By tag; to TensorBoard alone."""
        self._board.histograms(step, found)

    def picture(self, step: int, tag: str, image_HWC: Any) -> None:  # noqa: N803
        """image_HWC: uint8 [height, width, 3]."""
        self._board.picture(step, tag, image_HWC)
        if self._wandb is not None:
            self._wandb.picture(step, tag, image_HWC)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._lines.close()
        if self._wandb is not None:
            self._wandb.close()


def console_line(step: int, num_steps: int, values: dict[str, float]) -> str:
    """What people look at most; what is not known, or did not happen, is left out."""
    parts = [
        f"step {step}/{num_steps}", f"loss {values['loss']:.3f}", f"lr {values['lr']:.2e}",
        f"grad {values['grad_norm']:.2f}", f"{values['examples_per_s']:.0f} examples/s",
    ]  # fmt: skip
    if "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    parts += [f"{values['step_ms']:.0f} ms", f"wait {values['data_wait_fraction']:.0%}"]
    if "tflops_per_rank" in values:
        parts.append(f"{values['tflops_per_rank']:.3g} TFLOP/s a rank")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if "peak_memory_MiB" in values:
        parts.append(f"{values['peak_memory_MiB'] / 1024:.1f} GiB")
    if values.get("skipped_steps"):
        parts.append(f"skipped {values['skipped_steps']:.0f}")
    if values.get("checkpoint_s", 0.0) >= 0.05:
        parts.append(f"checkpoint {values['checkpoint_s']:.1f} s")
    return "  ".join(parts)


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

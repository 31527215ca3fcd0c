"""What a run says of itself: a console line, `metrics.jsonl`, TensorBoard. Rank 0 writes; sums are over all ranks."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

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
        self.num_counted = 0
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
        values["step_ms"] = 1000 * seconds / max(self.num_steps, 1)
        self._waited_s = waited_s
        self.reset()
        return values


class MetricsWriter:
    """One line per record on the console (a progress bar on a terminal), in metrics.jsonl and in TensorBoard."""

    def __init__(self, run_dir: Path, *, num_steps: int, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_records_from(path, first_step)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True) if terminal else None
        self._num_steps = num_steps

    def write(self, step: int, values: dict[str, float]) -> None:
        """`values` are finite numbers or nan (a task without tokens in this window: written as null)."""
        record = {"step": step, **{key: _rounded(value) for key, value in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for key, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(key, value, step)
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
        self._board.add_image(tag, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._file.close()


def _rounded(value: float) -> float | None:
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _drop_records_from(path: Path, first_step: int) -> None:
    """A resumed run writes the steps after its checkpoint again: the old records of those steps go."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= first_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _step_of(line: str) -> float:
    """The step of a record; a half-written line (the process was killed) counts as one to drop."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf

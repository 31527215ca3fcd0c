"""One training example: what a task makes of a row and a batch is packed from.

Legend: T source tokens, M target tokens, N boxes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One training example. Both examples of a vision-language row hold the same `image` object."""

    task: str
    """One of terms.TASKS."""
    source: np.ndarray
    """int64 [T]: bos ... eos."""
    target: np.ndarray
    """int64 [M]: ends in eos; PAD_ID where there is no loss."""
    prev: np.ndarray
    """int64 [M]: what the decoder reads; bos first."""
    image: np.ndarray | None = None
    """uint8 [h, w, 3]."""
    hole: tuple[int, int, int, int] | None = None
    """y0, x0, y1, x1 of pixels that the model must not see."""
    patches: np.ndarray | None = None
    """int64, ascending: the row-major patches that were sampled; None keeps all."""
    code: bool = False
    """The target is a run of image codes."""
    prompt: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    """int64: what the decoder is given after bos, before the answer, without loss; `prev` and `target` hold it too.
    See docs/downstream.md, Decoder prompt."""
    allowed: tuple[np.ndarray, ...] = ()
    """Per target position the ids that may come, ascending int64; empty where there is no loss, or every id may.
    Without any constraint there is no entry at all."""
    conf: float = 1.0
    """Loss weight."""
    boxes: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 4), np.float32))
    """float32 [N, 4]: the boxes in source or target, in pixels of `image`."""
    labels: tuple[str, ...] = ()
    """One name per box."""
    source_text: str = ""
    target_text: str = ""
    row_id: str = ""
    image_id: str = ""
    references: tuple[tuple[str, float], ...] = ()
    """Downstream: every right answer, as the row has it, with its confidence."""
    picture_size: tuple[int, int] = (0, 0)
    """Downstream: width and height of the stored picture."""
    region: tuple[float, float, float, float] | None = None
    """Downstream: the right box, in pixels of the stored picture."""
    dataset: str = ""
    """The row's dataset column; scenes keep the question type there."""
    row_type: str = ""
    """The row's type column."""
    cut: bool = False
    """Source or target was longer than the model's position table, and its end is left out."""

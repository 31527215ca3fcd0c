"""Files in a run's directory by which a person tells it what to do: `touch RUN_DIR/STOP`, `touch RUN_DIR/SAVE`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

STOP, SAVE = "STOP", "SAVE"
"""Save after the running step and end; save after the running step and go on. Served files are removed."""
LOOK_EVERY_S = 1.0
"""Apart at least: a shared file system has better to do than to answer every step."""

_Mark = tuple[int, int]
"""Which file it was: inode, time of its last change."""


class Switches:
    """Rank 0 looks; the ranks vote on what it saw. On other ranks nothing is ever seen, and nothing is touched."""

    def __init__(self, run_dir: str | Path, rank: int, since_s: float) -> None:
        """since_s: when this job began. A file from before asked another job, is told and removed."""
        self._run_dir, self._looks = Path(run_dir), rank == 0
        self._next_look_s = 0.0
        self._served: dict[str, _Mark] = {}
        """The last of each name that was granted: it asks no more until it changes, even where it cannot be removed."""
        self._wanted: dict[str, _Mark] = {}
        self._saving: tuple[int, _Mark | None] | None = None
        for name in (STOP, SAVE):
            mark = self._mark(name)
            if mark is not None and mark[1] < since_s * 1e9:
                self._served[name] = mark
                self._remove(name, mark, "was there before this run began, and asked another one")

    @property
    def stop(self) -> bool:
        self._look()
        return STOP in self._wanted

    @property
    def save(self) -> bool:
        """False while the save that it asked for is under way."""
        self._look()
        return SAVE in self._wanted and self._saving is None

    def serve_save(self, step: int) -> None:
        """The state of step `step` is being saved because `save` was true on rank 0."""
        self._saving = step, self._granted(SAVE)

    def settle(self, saved: Mapping[int, bool]) -> None:
        """saved: whether the save of a step became a checkpoint; tells whoever asked for it."""
        if self._saving is not None and self._saving[0] in saved:
            (step, mark), self._saving = self._saving, None
            self._remove(SAVE, mark, f"step {step} {'is' if saved[step] else 'could not be'} saved")

    def ended(self, step: int) -> None:
        """The run ends at step `step`, which is saved: all that was asked for is done."""
        self._saving = None
        for name in (STOP, SAVE):
            self._remove(name, self._granted(name), f"the run ends at step {step}, which is saved")

    def _granted(self, name: str) -> _Mark | None:
        mark = self._wanted.pop(name, None)
        if mark is not None:
            self._served[name] = mark
        return mark

    def _look(self) -> None:
        now_s = time.monotonic()
        if not self._looks or now_s < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_EVERY_S
        for name in (STOP, SAVE):
            mark = self._mark(name)
            if mark is not None and mark != self._served.get(name):
                self._wanted[name] = mark

    def _mark(self, name: str) -> _Mark | None:
        """None where it is not there, or cannot be seen now."""
        if not self._looks:
            return None
        try:
            found = os.lstat(self._run_dir / name)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _remove(self, name: str, mark: _Mark | None, why: str) -> None:
        """Say why, in one line; a file that was touched again since is a new request and stays."""
        if not self._looks or mark is None:
            return
        text = f"{self._run_dir / name}: {why}; "
        try:
            if self._mark(name) == mark:
                os.unlink(self._run_dir / name)
            text += "the file is removed"
        except OSError as error:
            text += f"it cannot be removed ({error.strerror}) and asks nothing more until it is touched again"
        print(text, file=sys.stderr, flush=True)

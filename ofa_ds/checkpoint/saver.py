"""When a run saves, in the background or not, and what is said when that fails."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ofa_ds.checkpoint.run_lease import RunLease
from ofa_ds.checkpoint.saving import BackgroundSaver, save
from ofa_ds.config import Recipe
from ofa_ds.storage.lease import LeaseError

if TYPE_CHECKING:
    from ofa_ds.engine.engine import Engine


class Saver:
    """Checkpoints of a run, in the background or not, and what is said when one fails. All ranks call it together."""

    def __init__(self, engine: Engine, recipe: Recipe, extra: dict[str, Any], *, lease: RunLease) -> None:
        """lease: the job's, of its run directory."""
        self._engine, self._recipe, self._extra, self.lease = engine, recipe, extra, lease
        self.saved: dict[int, bool] = {}
        """The newest save that has ended, and whether it became a checkpoint: {step: it did}."""
        self._started = 0
        self._background: BackgroundSaver | None = None
        if recipe.train.save_in_background:
            self._background = BackgroundSaver(engine, recipe.run_dir, keep=recipe.train.keep, lease=lease)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is not on the disk yet."""
        return self._background is not None and self._background.is_pending and not self._background.is_done()

    def save(self, step: int, facts: Mapping[str, Any], *, wait: bool, counts: bool = True) -> None:
        """Save the state as it is now. wait: until it is a checkpoint; RuntimeError where it cannot become one.

        facts: JSON values for the checkpoint, equal on all ranks. counts: False in a bad stretch: `keep` then counts
        this one for nothing. Raises LeaseError on all ranks where the directory is another job's by now.
        """
        train, extra = self._recipe.train, {**self._extra, **facts}
        if self._background is None:
            run_dir = self._recipe.run_dir
            save(self._engine, run_dir, step, extra, keep=train.keep, lease=self.lease, counts=counts)
            self.saved = {step: True}
            return
        self.commit()  # the one before, which is waited for
        self._started = step
        try:
            self._background.start(step, extra, counts=counts)
        except LeaseError:
            raise
        except RuntimeError as error:  # on all ranks: no room on the disk, or no directory
            if wait:
                raise
            self.saved = {step: False}
            self._tell(str(error))
        if wait and (failure := self._finish(self._background)):
            raise RuntimeError(failure)

    def commit(self) -> None:
        """Every rank has written: make it a checkpoint. A failed one is told; training goes on to the next."""
        if self._background is None or not self._background.is_pending:
            return
        if failure := self._finish(self._background):
            self._tell(failure)

    def _finish(self, background: BackgroundSaver) -> str | None:
        """Wait for the pending save; returns why it did not become a checkpoint."""
        background.finish()
        self.saved = {self._started: background.failure is None}
        return background.failure

    def _tell(self, why: str) -> None:
        if self._engine.ranks.rank == 0:
            every = self._recipe.train.save_every
            print(f"CHECKPOINT FAILED: {why}; tried again in {every} steps", file=sys.stderr)

    def close(self) -> None:
        if self._background is not None:
            self._background.close()

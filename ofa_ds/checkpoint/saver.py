"""When a run saves, in the background or not, and what is said when that fails."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ofa_ds.checkpoint.saving import BackgroundSaver, save
from ofa_ds.config import Recipe

if TYPE_CHECKING:
    from ofa_ds.engine.engine import Engine


class Saver:
    """Checkpoints of a run, in the background or not, and what is said when one fails. All ranks call it together."""

    def __init__(self, engine: Engine, recipe: Recipe, extra: dict[str, Any]) -> None:
        self._engine, self._recipe, self._extra = engine, recipe, extra
        self._background: BackgroundSaver | None = None
        if recipe.train.save_in_background:
            self._background = BackgroundSaver(engine, recipe.run_dir, keep=recipe.train.keep)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is not on the disk yet."""
        return self._background is not None and self._background.is_pending and not self._background.is_done()

    def save(self, step: int, *, wait: bool) -> None:
        """Save the state as it is now. wait: until it is a checkpoint; RuntimeError where it cannot become one."""
        train = self._recipe.train
        if self._background is None:
            save(self._engine, self._recipe.run_dir, step, self._extra, keep=train.keep)
            return
        self.commit()  # the one before, which is waited for
        try:
            self._background.start(step, self._extra)
        except RuntimeError as error:  # on all ranks: no room on the disk, or no directory
            if wait:
                raise
            self._tell(str(error))
        if wait:
            self._background.finish()
            if self._background.failure:
                raise RuntimeError(self._background.failure)

    def commit(self) -> None:
        """Every rank has written: make it a checkpoint. A failed one is told; training goes on to the next."""
        if self._background is None or not self._background.is_pending:
            return
        self._background.finish()
        if self._background.failure:
            self._tell(self._background.failure)

    def _tell(self, why: str) -> None:
        if self._engine.ranks.rank == 0:
            every = self._recipe.train.save_every
            print(f"CHECKPOINT FAILED: {why}; tried again in {every} steps", file=sys.stderr)

    def close(self) -> None:
        if self._background is not None:
            self._background.close()

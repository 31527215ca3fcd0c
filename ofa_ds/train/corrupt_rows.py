"""Corrupt rows met in training: each told and written down once, and not endured without end.

What is learnt from in their place is decided where micro-batches are made (`ofa_ds.train.micro_batches`), alike
everywhere. `RUN_DIR/corrupt_rows.jsonl` has a line for each row, over all attempts of a run.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

from ofa_ds.engine.engine import Engine
from ofa_ds.train.loader import Loader
from ofa_ds.train.micro_batches import Substituted

CORRUPT_ROWS = "corrupt_rows.jsonl"
FEWEST_ROWS = 10_000
"""The share that may be corrupt is of so many rows at least: a run's first step is no sample."""
SHOWN_ROWS = 10
"""How many rows the console names, and the error at the end."""


class CorruptRows:
    """Those of a run. All ranks call `settle` together after a step in which any of them was handed one."""

    def __init__(self, engine: Engine, loader: Loader, run_dir: Path, *, max_share: float) -> None:
        """max_share: data.max_corrupt."""
        self._engine, self._loader, self._max_share = engine, loader, max_share
        self.path = run_dir / CORRUPT_ROWS
        self._known = _written(self.path) if engine.ranks.rank == 0 else {}
        self._told = 0
        self._count = 0

    @property
    def is_unsettled(self) -> bool:
        """Whether this rank was handed a row that the others do not know of."""
        return bool(self._loader.substituted)

    def settle(self, step: int) -> None:
        """After step number `step`. Raises RuntimeError, on all ranks, where there are more than may be."""
        mine, self._loader.substituted = self._loader.substituted, []
        everyone = [Substituted(*each) for each in itertools.chain(*self._engine.gather([*map(tuple, mine)]))]
        self._count += len(everyone)
        error = ""
        if self._engine.ranks.rank == 0:
            new = {(each.family, each.row): each for each in everyone if (each.family, each.row) not in self._known}
            self._known |= {key: each.problem for key, each in new.items()}
            self._write(step, list(new.values()))
            error = self._too_many(step)
        if error := next(filter(None, self._engine.gather(error)), ""):
            raise RuntimeError(error)

    def taken(self) -> int:
        """How often a row was replaced since the last call, on all ranks."""
        count, self._count = self._count, 0
        return count

    def _write(self, step: int, new: list[Substituted]) -> None:
        """What cannot be written is told; no run ends for it."""
        lines = "".join(json.dumps({"step": step, **each._asdict()}, ensure_ascii=False) + "\n" for each in new)
        try:
            _append(self.path, lines.encode())
        except OSError as error:
            print(f"{self.path}: cannot be written: {error}; training goes on", file=sys.stderr, flush=True)
        for each in new:
            self._told += 1
            if self._told <= SHOWN_ROWS:
                rest = f"; further ones are in {self.path} alone" if self._told == SHOWN_ROWS else ""
                told = f"{each.problem}; row {each.substitute} is learnt from in its place{rest}"
                print(f"step {step}: {told}", file=sys.stderr, flush=True)

    def _too_many(self, step: int) -> str:
        rows = sum(self._loader.shards.families[family] for family in self._loader.micro_batches.mixture.families)
        seen = min(step * self._loader.batch.global_rows, rows)
        if len(self._known) <= self._max_share * max(seen, FEWEST_ROWS):
            return ""
        first = "; ".join(itertools.islice(self._known.values(), SHOWN_ROWS))
        return (
            f"{len(self._known)} corrupt rows of {seen} that were seen up to step {step}, more than data.max_corrupt "
            f"{self._max_share:g} of {max(seen, FEWEST_ROWS)} allows; all are in {self.path}; copy or build the shards "
            f"again (ofa-ds shards verify lists what is wrong), or raise data.max_corrupt. {first}"
        )


def _written(path: Path) -> dict[tuple[str, int], str]:
    """Of earlier attempts; a line that a killed one left in part is none. What cannot be read is told."""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        print(f"{path}: cannot be read: {error}; training goes on", file=sys.stderr, flush=True)
        return {}
    for line in lines:
        try:
            record = json.loads(line)
            found[str(record["family"]), int(record["row"])] = str(record["problem"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _append(path: Path, data: bytes) -> None:
    """On the disk when it returns; a line that was left in part before ends first."""
    if not data:
        return
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

"""What happens inside a rank, from outside the product: errors and gradients that are not finite, at given steps.

Python imports this by itself where its folder is on PYTHONPATH. OFA_CHAOS names a JSON file:

    {"raise": [{"rank": 1, "step": 5, "once": PATH or null}], "nan": [{"rank": 0, "step": 4}], "stand_in": PATH or null,
     "seen": FOLDER}

once: the error comes while PATH is not there, and makes it. Each that strikes leaves a file in `seen`. stand_in: a
program to run in place of ofa_ds.pretrain.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

PROGRAMS = ("ofa_ds.pretrain", "ofa_ds.cli")
MESSAGE = "chaos: a fault inside of rank {rank} at step {step}"


class Orders:
    """The faults of this rank."""

    def __init__(self, file: str, rank: int) -> None:
        orders = json.loads(Path(file).read_text())
        self.rank, self.step = rank, 1
        self._seen = Path(orders["seen"])
        self._orders = {kind: [each for each in orders[kind] if each["rank"] == rank] for kind in ("raise", "nan")}

    def raise_if_due(self) -> None:
        for order in self._orders["raise"]:
            if order["step"] == self.step and not (order["once"] and os.path.exists(order["once"])):
                if order["once"]:
                    Path(order["once"]).touch()
                self._mark("raise")
                raise ArithmeticError(MESSAGE.format(rank=self.rank, step=self.step))

    def is_nan_due(self) -> bool:
        due = any(order["step"] == self.step for order in self._orders["nan"])
        if due:
            self._mark("nan")
        return due

    def _mark(self, kind: str) -> None:
        (self._seen / f"{kind}_{self.rank}_{self.step}").touch()


class _After(importlib.abc.MetaPathFinder):
    """Changes modules when they have been imported."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = self._changes.pop(name, None)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def follow(orders: Orders) -> None:
    """The step is that of the beats; the error and the gradient come with the first loss of the step."""

    def change_beat(module: ModuleType) -> None:
        beat = module.Pulse.beat

        def counting(self, phase: str, step: int) -> None:
            orders.step = step + 1
            beat(self, phase, step)

        module.Pulse.beat = counting

    def change_engine(module: ModuleType) -> None:
        backward = module.Engine.backward

        def disturbed(self, loss) -> None:
            orders.raise_if_due()
            backward(self, loss * float("nan") if orders.is_nan_due() else loss)

        module.Engine.backward = disturbed

    sys.meta_path.insert(0, _After({"ofa_ds.beat": change_beat, "ofa_ds.engine.engine": change_engine}))


def _rank() -> int | None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return None


def _begin() -> None:
    file, rank = os.environ.get("OFA_CHAOS"), _rank()
    if file is None or rank is None or not any(f"-m {name}" in " ".join(sys.orig_argv) for name in PROGRAMS):
        return
    if "ofa_ds.cluster" in " ".join(sys.orig_argv[:6]):  # an agent or a shim, which has the rank's words behind its own
        return
    stand_in = json.loads(Path(file).read_text())["stand_in"]
    if stand_in is None:
        follow(Orders(file, rank))
        return
    import runpy

    sys.path.insert(0, str(Path(__file__).parent))
    runpy.run_path(stand_in, run_name="__main__")


_begin()

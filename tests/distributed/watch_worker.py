"""What each rank of tests/distributed/test_watching.py runs: steps left out, spikes, looks for silent corruption."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from batches import random_batch
from engine_cases import CORRUPTED, KINDS, LEFT_OUT, VOCAB, result_file
from engine_worker import COUNTED, build_engine, different, dispose, ds_config, make_ofa, skip_config, state_of
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.cli.main import leave
from ofa_ds.engine.engine import Engine
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.train.checks import Checks
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import TokenLoss
from ofa_ds.train.spikes import LossWindow
from ofa_ds.train.step import StepResult, train_step

ACCUMULATION = 2


def batches(engine: Engine, step: int) -> list[Batch]:
    size = len(KINDS) // (engine.ranks.world_size * ACCUMULATION)
    first = [(micro * engine.ranks.world_size + engine.ranks.rank) * size for micro in range(ACCUMULATION)]
    return [random_batch((step,), kinds=KINDS[at : at + size], first=at, vocab_size=VOCAB) for at in first]


def take(engine: Engine, step: int, before: LossWindow | None = None, *, times: float = 1.0) -> StepResult:
    """times: what the loss of the last rank's first micro-batch weighs."""
    found = batches(engine, step)
    if engine.ranks.rank == engine.ranks.world_size - 1:
        found[0].loss_weight.mul_(times)
    return train_step(engine, found, Window(engine.device), TokenLoss(), before=before)


def begin(ranks: Any, name: str) -> Engine:
    config = skip_config(name)
    if name.endswith("3"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100  # some stay gathered on all ranks
    return build_engine(ranks, make_ofa, config, ACCUMULATION)


def steps_left_out(ranks: Any) -> list[dict[str, Any]]:
    """The same four steps: with a spike, with a step passed over, and with one whose loss is not finite."""
    results = []
    for name in LEFT_OUT:
        ends: dict[str, dict[str, Tensor]] = {}
        changed, said, levels = [], [], []
        for how in ("spike", "passed over", "nan"):
            engine = begin(ranks, name)
            before = LossWindow(6.0, [6.0 + 0.01 * (i % 5) for i in range(40)])
            for step in range(4):
                if step != 2:
                    take(engine, step, before)
                    continue
                state, known = state_of(engine), before.losses
                if how == "passed over":
                    engine.pass_over()
                else:
                    result = take(engine, step, before, times=50.0 if how == "spike" else float("nan"))
                    said.append((engine.skipped, engine.rescaled, bool(result.spike)))
                    levels.append(engine.loss_scale)
                changed += [each for each in different(state_of(engine), state) if each not in COUNTED]
                assert before.losses == known
            ends[how] = state_of(engine)
            dispose(engine)
        scaled = {"cur_scale", "cur_iter", "last_overflow_iter"}
        results.append({
            "name": name, "changed": sorted(set(changed)), "said": engine.gather(said),
            "nan": different(ends["nan"], ends["spike"]) if not name.startswith("fp16") else [],
            "passed over": [each for each in different(ends["passed over"], ends["spike"]) if each not in scaled],
        })  # fmt: skip
    return results


class Wrong:
    """A model's forward that is off in every second call, on one rank."""

    def __init__(self, engine: Engine, rank: int) -> None:
        self.calls, self.here = 0, engine.ranks.rank == rank
        self.handle = engine.module.register_forward_hook(self.spoil)

    def spoil(self, module: Any, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.calls += 1
        return (output[0] * 1.0001, *output[1:]) if self.here and self.calls % 2 else output


def told(checks: Checks, engine: Engine, step: int) -> str:
    try:
        checks.check(step, batches(engine, step)[0])
    except RuntimeError as error:
        return str(error)
    return ""


def flip(tensor: Tensor) -> None:
    """One bit of one element."""
    words = tensor.detach().view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    words[0] ^= 1


def shared_tensor(engine: Engine) -> Tensor:
    """One that all ranks have whole."""
    return next(each for each in engine.module.parameters() if getattr(each, "ds_persist", True)).data


def corruption(ranks: Any) -> list[dict[str, Any]]:
    results = []
    for name in CORRUPTED:
        engine = begin(ranks, name)
        checks = Checks(engine, TokenLoss(), every=1, buffers_agree=False)
        take(engine, 0)
        clean = [told(checks, engine, 1)]
        before = state_of(engine)
        clean.append(told(checks, engine, 1))
        changed = [each for each in different(state_of(engine), before) if each != "torch"]
        take(engine, 1)
        clean.append(told(checks, engine, 2))
        found: dict[str, Any] = {"names": len(engine.replicated_sums(with_buffers=False))}
        wrong = Wrong(engine, 2)
        found["replay"] = told(checks, engine, 2)
        wrong.handle.remove()
        if ranks.rank == 1:
            flip(shared_tensor(engine))
        found["copy"] = told(checks, engine, 2)
        dispose(engine)
        if name.endswith("3"):
            engine = begin(ranks, name)
            if ranks.rank == 0:
                flip(next(each for each in engine.module.parameters() if not each.ds_persist).ds_tensor)
            found["master"] = told(checks := Checks(engine, TokenLoss(), every=1, buffers_agree=False), engine, 1)
            dispose(engine)
        results.append({"name": name, "clean": clean, "changed": changed, **found})
    return results


def cost(ranks: Any) -> dict[str, float]:
    """Seconds of a step and of a check, medians."""
    engine = build_engine(ranks, make_ofa, ds_config(3), ACCUMULATION)
    checks, steps, looks = Checks(engine, TokenLoss(), every=1, buffers_agree=False), [], []
    for step in range(8):
        began = time.perf_counter()
        take(engine, step)
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
        checks.check(step, batches(engine, step)[0])
        looks.append(time.perf_counter() - began)
    dispose(engine)
    return {"step_s": statistics.median(steps[2:]), "check_s": statistics.median(looks[2:])}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = init_distributed("cpu")
    from engine_worker import allow_fp16_on_cpu

    allow_fp16_on_cpu()
    results = {"left out": steps_left_out(ranks), "corruption": corruption(ranks), "cost": cost(ranks)}
    if ranks.rank == 0:
        result_file(folder, ranks.world_size).write_text(json.dumps(results))
    leave_distributed()
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

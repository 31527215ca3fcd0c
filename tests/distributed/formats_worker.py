"""What each rank of the format tests runs: DeepSpeed itself writes and reads what this project reads and writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from engine_worker import (
    OPTIM,
    allow_fp16_on_cpu,
    build_engine,
    different,
    dispose,
    ds_config,
    make_toy,
    run_jobs,
    train_toy,
)
from formats_cases import EXPORTS, SAVED, UNIVERSAL
from torch import Tensor
from toy import Toy

from ofa_ds import checkpoint
from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.checkpoint.manifest import read_manifest
from ofa_ds.checkpoint.state import Reader, TrainingState
from ofa_ds.convert.deepspeed_folder import read_deepspeed, write_deepspeed
from ofa_ds.convert.universal import read_universal, write_universal
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 4
STEP_DIR = f"step_{STEPS:08d}"
SUB_GROUP = {("bf16", 3): 3000}
"""Where stage 3 has several flat groups: elements of a rank's one."""

PLAIN = dataclasses.replace(OPTIM, ema_decay=0.0)
"""DeepSpeed keeps no moving average."""
EXTRA = {"recipe": {"optim": json.loads(json.dumps(dataclasses.asdict(PLAIN)))}}


def config_of(precision: str, stage: int, **more: Any) -> dict[str, Any]:
    config = {**ds_config(stage), "bf16": {"enabled": precision == "bf16"}, **more}
    if precision == "fp16":
        config["fp16"] = {
            **load_deepspeed_config("zero3_fp16")["fp16"],
            "initial_scale_power": 20,
        }  # overflows at first
    if (precision, stage) in SUB_GROUP:
        zero = {**config["zero_optimization"], "sub_group_size": SUB_GROUP[precision, stage]}
        config["zero_optimization"] = zero
    return config


def fresh(ranks: Any, config: dict[str, Any]) -> Engine:
    """An engine in which nothing is as in another one, buffers and frozen weights included."""

    def other() -> Toy:
        torch.manual_seed(99)
        return make_toy()

    engine = build_engine(ranks, other, config, 2, PLAIN)
    with torch.no_grad():
        for buffer in engine.buffers().values():
            buffer.fill_(7)
    for piece in engine.pieces():
        for tensor in piece.tensors.values():
            tensor.normal_()
    return engine


def saved(ranks: Any, folder: Path) -> dict[str, float]:
    """Trained engines, saved by this project and by DeepSpeed. Returns the gradient norm two steps later."""
    norms = {}
    engine = build_engine(ranks, make_toy, config_of("fp32", 3), 2, PLAIN)
    checkpoint.save(engine, folder / "ours_untrained", STEPS, extra=EXTRA)
    dispose(engine)
    for precision, stage in SAVED:
        engine = build_engine(ranks, make_toy, config_of(precision, stage), 2, PLAIN)
        train_toy(engine, 0, STEPS, ranks.world_size)
        checkpoint.save(engine, folder / f"ours_{precision}_{stage}", STEPS, extra=EXTRA)  # makes buffers agree
        engine._wrapped.save_checkpoint(folder / f"deepspeed_{precision}_{stage}")
        train_toy(engine, STEPS, STEPS + 2, ranks.world_size)
        norms[f"{precision}_{stage}"] = engine.grad_norm
        dispose(engine)
    return norms


def stage0(ranks: Any, folder: Path) -> list[str]:
    """What is lost of an engine without ZeRO; none of its parameters is frozen."""

    def thawed() -> Toy:
        model = make_toy()
        model.frozen.requires_grad_(True)
        return model

    engine = build_engine(ranks, thawed, config_of("fp32", 0), 2, PLAIN)
    train_toy(engine, 0, STEPS, ranks.world_size)
    original = checkpoint.save(engine, folder / "ours_fp32_0", STEPS, extra=EXTRA)
    engine._wrapped.save_checkpoint(folder / "deepspeed_fp32_0")
    dispose(engine)
    if ranks.rank:
        return []
    found, want = read_deepspeed(folder / "deepspeed_fp32_0"), opened(original)
    return different(whole(found), whole(want)) + ([] if found.facts.state == want.facts.state else ["counters"])


def imported(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """What DeepSpeed saved, read, written as a checkpoint for 3 ranks and loaded: against what this project saved."""
    results = []
    for precision, stage in SAVED:
        original, target = folder / f"ours_{precision}_{stage}" / STEP_DIR, folder / f"imported_{precision}_{stage}"
        if ranks.rank == 0:
            write_checkpoint(target, read_deepspeed(folder / f"deepspeed_{precision}_{stage}"), ranks=3, stage=stage)
        dist.barrier()
        engine = fresh(ranks, config_of(precision, stage))
        checkpoint.load(engine, target)
        results.append(loaded(engine, folder / f"again_{precision}_{stage}_imported", original))
        dispose(engine)
    return results


def loaded(engine: Engine, run_dir: Path, original: Path) -> dict[str, Any]:
    """The state of an engine against that of a checkpoint: every tensor whole, counters, the copies that compute."""
    copies = engine.full_weights()
    path = checkpoint.save(engine, run_dir, STEPS, extra={})
    result = {"name": run_dir.name, "different": [], "state": True}
    if copies is not None:
        assert checkpoint.verify(path) == []
        found, want = whole(opened(path)), whole(opened(original))
        result["different"] = different(found, want)
        result["different"] += [
            f"copy of {name}" for name, copy in copies.items()
            if not torch.equal(copy.reshape(-1), want.get(f"weight|{name}", copy.reshape(-1)).to(copy.dtype))
        ]  # fmt: skip
        result["state"] = _states(path) == _states(original)
    train_toy(engine, STEPS, STEPS + 2, engine.ranks.world_size)
    return result | {"norm": engine.grad_norm}


def _states(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counters, and the loss scale beside them, which only precisions with one have."""
    state = dict(read_manifest(path).state)
    scaler = state.pop("loss_scaler")
    return state, scaler if len(scaler) > 1 else {}


def opened(path: Path) -> Reader:
    return Reader(path, read_manifest(path))


def whole(state: TrainingState) -> dict[str, Tensor]:
    """Every tensor of a state, flat, and every buffer."""
    tensors = {name: state.buffer(name) for name in state.buffers}
    for name, info in state.tensors.items():
        tensors |= {f"{kind}|{name}": state.read(name, kind, 0, info.numel) for kind in info.kinds}
    return tensors


def lost_on_the_way(back: TrainingState, original: TrainingState, target: Path) -> list[str]:
    """What a checkpoint made of `back` has otherwise than the original, which was exported."""
    again = opened(write_checkpoint(target, back, ranks=3, stage=2))
    lost = different(whole(again), whole(original))
    lost += [] if again.tensors == original.tensors else ["order, shapes or kinds"]
    return lost + ([] if again.facts.extra["recipe"] == EXTRA["recipe"] else ["recipe"])


def exported(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """A checkpoint of two ranks, written for DeepSpeed at this world size, loaded by it."""
    results = []
    for source, precision, stage in EXPORTS[ranks.world_size]:
        original = folder / f"ours_{source}" / STEP_DIR
        name = f"{source}_as_{precision}_{stage}_{ranks.world_size}"
        target = folder / f"deepspeed_{name}"
        lost: list[str] = []
        if ranks.rank == 0:
            reader = opened(original)
            more = {"sub_group_size": SUB_GROUP[precision, stage]} if (precision, stage) in SUB_GROUP else {}
            write_deepspeed(reader, target, ranks=ranks.world_size, stage=stage, dtype=DTYPES[precision], **more)
            lost = lost_on_the_way(read_deepspeed(target), reader, folder / f"back_{name}")
            weights = get_fp32_state_dict_from_zero_checkpoint(str(target))
            want = {name: weights[name].reshape(-1) for name in reader.tensors}
            lost += different(want, {name: reader.read(name, "weight", 0, info.numel)
                                     for name, info in reader.tensors.items()})  # fmt: skip
        dist.barrier()
        engine = fresh(ranks, config_of(precision, stage))
        before = vars(getattr(engine._wrapped.optimizer, "loss_scaler", None) or object).keys()
        path, _ = engine._wrapped.load_checkpoint(str(target))
        after = vars(getattr(engine._wrapped.optimizer, "loss_scaler", None) or object).keys()
        result = loaded(engine, folder / f"again_{name}", original)
        results.append(result | {"lost": lost, "path": path, "scaler": before == after})
        dispose(engine)
    return results


def universal(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """A checkpoint of two ranks as a universal one, loaded by DeepSpeed at other stages: all that it takes from it."""
    results = []
    for source, precision, stage in UNIVERSAL[ranks.world_size]:
        original = folder / f"ours_{source}" / STEP_DIR
        name = f"universal_{source}_as_{precision}_{stage}_{ranks.world_size}"
        target = folder / name
        lost: list[str] = []
        if ranks.rank == 0:
            reader = opened(original)
            write_universal(reader, target)
            lost = lost_on_the_way(read_universal(target), reader, folder / f"back_{name}")
        dist.barrier()
        engine = fresh(ranks, config_of(precision, stage, checkpoint={"load_universal": True}))
        path, _ = engine._wrapped.load_checkpoint(str(target))
        results.append(loaded(engine, folder / f"again_{name}", original) | {"lost": lost, "path": path})
        dispose(engine)
    return results


def converted(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """DeepSpeed's own converter on what DeepSpeed saved, read: against what this project saved."""
    results = []
    for precision, stage in SAVED if ranks.rank == 0 else []:
        source = folder / f"deepspeed_{precision}_{stage}"
        target = source / f"global_step{STEPS}_universal"
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(source / f"global_step{STEPS}"), output_folder=str(target), num_extract_workers=1,
                num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
            )
        )  # fmt: skip
        original = folder / f"ours_{precision}_{stage}" / STEP_DIR
        found, want = read_universal(source), opened(original)
        wrong = different(whole(found), whole(want))
        results.append({"name": target.name, "different": wrong, "state": found.facts.state == want.facts.state})
    dist.barrier()
    return results


if __name__ == "__main__":
    allow_fp16_on_cpu()
    run_jobs({
        "saved": saved, "stage0": stage0, "imported": imported, "exported": exported, "universal": universal,
        "converted": converted,
    })  # fmt: skip

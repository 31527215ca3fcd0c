"""The ranks of `bench checkpoint`: `torchrun checkpoint_worker.py save|load|flush FOLDER PRESET`."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ofa_ds import checkpoint
from ofa_ds.batch import pack
from ofa_ds.bench.step import example
from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig, load_recipe, recipe_to_dict
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.model.config import ModelConfig, preset
from ofa_ds.model.ofa import OFA

VOCAB_SIZE = 47_400
"""With it base has 173 M parameters: the size that the goals were set for."""
REPEATS = 3
STALLS = 9
FLUSHED_PAIRS = 120


def state_config(name: str) -> ModelConfig:
    return preset(name, vocab_size=VOCAB_SIZE)


def make_engine(name: str, deepspeed: str) -> Engine:
    """ZeRO with moments, as after one step (stage 3 in bf16); the values are drawn, not trained."""
    config = load_deepspeed_config(deepspeed)
    config["bf16"] = {"enabled": deepspeed == "zero3"}
    ranks = init_distributed("cpu")
    batch, optim, train = BatchConfig(global_rows=ranks.world_size, micro_rows=1), OptimConfig(), TrainConfig()
    model = state_config(name)
    engine = build(lambda: OFA(model), deepspeed=config, optim=optim, batch=batch, train=train, ranks=ranks)
    buffers = {key: value.clone() for key, value in engine.buffers().items()}
    steps = {"adam_step": 1, "global_steps": 1, "skipped_steps": 0, "global_samples": 2, "loss_scaler": {}}
    engine.restore(lambda _name, _kind, _start, numel: torch.rand(numel), lambda key: buffers[key], steps)
    return engine


def timed(action: Callable[[], object]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    action()
    seconds = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def sharded(engine: Engine) -> dict[str, DTensor]:
    """The same pieces as torch's own checkpoints want them: one-dimensional, cut like ours."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for piece in engine.pieces():
        total = torch.Size(piece.shape).numel()
        for kind in piece.kinds:
            local = piece.tensors.get(kind, torch.empty(0))
            found[f"{kind}|{piece.name}"] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size([total]), stride=(1,)
            )
    return found


def save(engine: Engine, root: Path, name: str) -> dict[str, Any]:
    recipe = recipe_to_dict(load_recipe("pretrain-base"))
    recipe["model"]["preset"] = name
    extra = {"recipe": recipe, "identity": {"data": None, "vocab": None}}
    saver = checkpoint.BackgroundSaver(engine, root / "background", keep=1)  # as a run does, long before it saves
    pieces = [tensor for piece in engine.pieces() for tensor in piece.tensors.values()]
    result: dict[str, Any] = {
        "parameters": sum(torch.Size(shape).numel() for shape in engine.parameter_shapes().values()),
        "save_s": min(timed(lambda: checkpoint.save(engine, root / "ours", 1, extra)) for _ in range(REPEATS)),
        "deepspeed_save_s": min(
            timed(lambda: engine._wrapped.save_checkpoint(str(root / "deepspeed"), tag="tag")) for _ in range(REPEATS)
        ),
        "dcp_save_s": timed(lambda: dcp.save(sharded(engine), checkpoint_id=root / "dcp")),
    }
    target = torch.empty(sum(tensor.numel() for tensor in pieces))
    target.zero_()
    stalls, copies = [], []
    for step in range(STALLS + 1):
        copies.append(timed(lambda: copy(pieces, target)))  # beside each other: a machine's speed drifts
        stalls.append(timed(lambda: saver.start(step, extra)))  # noqa: B023
        saver.finish()
    saver.close()
    return result | {
        "memcpy_s": statistics.median(copies[1:]),
        "background_first_stall_s": stalls[0],
        "background_stall_s": statistics.median(stalls[1:]),
    }


def copy(pieces: list[Tensor], target: Tensor) -> None:
    at = 0
    for piece in pieces:
        target[at : at + piece.numel()] = piece
        at += piece.numel()


def load(engine: Engine, root: Path) -> dict[str, Any]:
    directory = root / "ours" / "step_00000001"
    tensors = sharded(engine)
    return {
        "load": timed(lambda: checkpoint.load(engine, directory)),
        "dcp_load": timed(lambda: dcp.load(tensors, checkpoint_id=root / "dcp")),
    }


def flush(engine: Engine, root: Path) -> dict[str, Any]:
    """Seconds of a forward and backward of one example, beside a writing process and beside a stopped one."""
    config = engine.module.config
    one = example(np.random.default_rng(0), side=128, source=32, target=16)
    ids = one.target % VOCAB_SIZE
    examples = [replace(one, source=one.source % VOCAB_SIZE, target=ids, prev=ids)]
    batch = pack(examples, [(128, 128)], config.patch_size, config.image_bucket_size)
    saver = checkpoint.BackgroundSaver(engine, root / "flushed", keep=1)
    saver.start(0, {})
    saver.finish()

    def step_s() -> float:
        started = time.perf_counter()
        engine.module(batch)[0].sum().backward()
        return time.perf_counter() - started

    writer = saver._snapshot._process
    step_s()
    pairs: list[dict[int, float]] = []
    while len(pairs) < FLUSHED_PAIRS:
        if not saver.is_pending:
            saver.start(1, {})
            step_s()
        first = (signal.SIGCONT, signal.SIGSTOP)[len(pairs) % 2]  # no order has an advantage
        pair = {}
        for number in (first, signal.SIGCONT + signal.SIGSTOP - first):  # a machine's speed drifts: close in time
            writer.send_signal(number)
            pair[number] = step_s()
        writer.send_signal(signal.SIGCONT)
        if saver.is_done():
            saver.finish()  # it may have ended before the last step
        else:
            pairs.append(pair)
    saver.close()
    return {
        "step_alone_s": statistics.median(pair[signal.SIGSTOP] for pair in pairs),
        "step_flushing_s": statistics.median(pair[signal.SIGCONT] for pair in pairs),
        "flush_slowdown": statistics.median(pair[signal.SIGCONT] / pair[signal.SIGSTOP] - 1 for pair in pairs),
        "flushed_pairs": len(pairs),
    }


def main(what: str, root: Path, name: str) -> None:
    if what == "flush":
        torch.set_num_threads(1)
    engine = make_engine(name, "zero1" if what == "flush" else "zero3")
    jobs = {"save": lambda: save(engine, root, name), "load": lambda: load(engine, root)}
    result = flush(engine, root) if what == "flush" else jobs[what]()
    if engine.ranks.rank == 0:
        (root / f"{what}.json").write_text(json.dumps(result))
    leave_distributed()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])

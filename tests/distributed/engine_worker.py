"""What each rank of a distributed test runs: `torchrun ... engine_worker.py FOLDER JOB...`. Rank 0 writes the results.

One launch does many cases, since starting a rank takes seconds. Cases share no state but the process group.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from batches import random_batch
from deepspeed.accelerator import get_accelerator
from engine_cases import KINDS, OFFLOAD, PARITY, RESHARD, SKIP, STEPS, VOCAB, result_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from toy import Toy, toy_batch

from ofa_ds import checkpoint
from ofa_ds.checkpoint.manifest import read_manifest
from ofa_ds.checkpoint.state import Reader
from ofa_ds.cli.main import leave
from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.engine.ranks import Ranks
from ofa_ds.engine.schedule import polynomial_lr
from ofa_ds.model import products
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.train.loss import group_counts, group_sums
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import TokenLoss
from ofa_ds.train.step import train_step

OPTIM = OptimConfig(peak_lr=1e-3, warmup_steps=3, eps=1e-6, clip_norm=0.5, ema_decay=0.8)
TRAIN = TrainConfig(num_steps=30, seed=3)


def make_ofa() -> OFA:
    return OFA(preset("nano", vocab_size=VOCAB, dim=32, ffn_dim=64, num_heads=2))


def make_toy() -> Toy:
    return Toy(dropout=0.1)


def ds_config(stage: int, **more: Any) -> dict[str, Any]:
    if not stage:
        return {"zero_optimization": {"stage": 0}, **more}
    return {**load_deepspeed_config(f"zero{stage}"), **more}


def build_engine(
    ranks: Any, make: Callable[[], nn.Module], config: dict[str, Any], accumulation: int, optim: OptimConfig = OPTIM
) -> Engine:
    rows = 12 // (ranks.world_size * accumulation)
    batch = BatchConfig(global_rows=12, micro_rows=rows)
    return build(make, deepspeed=config, optim=optim, batch=batch, train=TRAIN, ranks=ranks)


def dispose(engine: Engine) -> None:
    engine._wrapped.destroy()
    del engine
    gc.collect()


def one_process() -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Plain torch on whole global batches: losses, gradient norms, final weights and their moving average."""
    torch.manual_seed(TRAIN.seed)
    model = make_ofa()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(OPTIM.ema_decay))
    average.update_parameters(model)  # its first update is a copy
    optimizer = torch.optim.AdamW(model.parameters(), betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay)
    losses, norms = [], []
    for step in range(STEPS):
        batch = random_batch((step,), kinds=KINDS, vocab_size=VOCAB)
        loss = (group_sums(model(batch)[0], batch) / group_counts(batch)).sum()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = polynomial_lr(step, peak_lr=OPTIM.peak_lr, warmup_steps=OPTIM.warmup_steps, num_steps=30)
        optimizer.step()
        average.update_parameters(model)
        optimizer.zero_grad()
        losses.append(loss.item())
    weights, averaged = model.state_dict(), average.module.state_dict()
    return losses, norms, weights, {name: averaged[name] for name, _ in model.named_parameters()}


def train_ofa(
    engine: Engine, steps: int, accumulation: int, world_size: int, begin: int = 0
) -> tuple[list[float], list[float]]:
    """(loss, gradient norm) of each step from `begin` on."""
    size = len(KINDS) // (world_size * accumulation)
    losses, norms = [], []
    window = Window(engine.device)
    for step in range(begin, begin + steps):
        first = [(micro * world_size + engine.ranks.rank) * size for micro in range(accumulation)]
        batches = [random_batch((step,), kinds=KINDS[at : at + size], first=at, vocab_size=VOCAB) for at in first]
        train_step(engine, batches, window, TokenLoss())
        losses.append(window.close(engine.all_reduce)["loss"])
        norms.append(engine.grad_norm)
    return losses, norms


def parity(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    products.MIN_PRODUCT = products.MIN_ROWS = (
        1  # also the smallest layers by oneDNN, where this machine uses it: a function of our own
    )
    want_losses, want_norms, want_weights, want_average = one_process()
    results = []
    for stage, accumulation in PARITY[ranks.world_size]:
        engine = build_engine(ranks, make_ofa, ds_config(stage), accumulation)
        losses, norms = train_ofa(engine, STEPS, accumulation, ranks.world_size)
        weights = engine.full_weights()
        path = checkpoint.save(engine, folder / f"parity_{ranks.world_size}_{stage}_{accumulation}", STEPS, extra={})
        if weights is not None:
            assert weights.keys() == want_weights.keys()
            reader = Reader(path, read_manifest(path))
            weights |= {f"ema|{name}": whole_tensor(reader, name, "ema") for name in want_average}
            wanted = want_weights | {f"ema|{name}": tensor for name, tensor in want_average.items()}
            # The gradient of a key's bias is mathematically zero, so AdamW turns rounding into steps there.
            compared = [name for name in wanted if not name.endswith(("k_proj.bias", "k_linear.bias"))]
            apart = {name: _apart(weights[name], wanted[name]) for name in compared}
            worst = max(apart, key=apart.get)
            results.append({
                "stage": stage, "accumulation": accumulation, "losses": losses,
                "loss_error": max(abs(a - b) / b for a, b in zip(losses, want_losses, strict=True)),
                "norm_error": max(abs(a - b) / b for a, b in zip(norms, want_norms, strict=True)),
                "weight_error": apart[worst], "worst": worst,
            })  # fmt: skip
        dispose(engine)
    return results


def _apart(tensor: Tensor, want: Tensor) -> float:
    """Relative to the norm of the whole tensor."""
    difference = (tensor.double() - want.double()).norm().item()
    return difference / max(want.double().norm().item(), 1e-12) if difference else 0.0


def allow_fp16_on_cpu() -> None:
    """DeepSpeed refuses fp16 on processors without native fp16 arithmetic; torch computes it all the same."""
    get_accelerator().is_fp16_supported = lambda: True


def precision(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """bf16 with fp32 accumulation and reduction at stages 1-3, fp16 with its loss scale: the course of the loss."""
    results = []
    allow_fp16_on_cpu()
    shipped_fp16 = load_deepspeed_config("zero3_fp16")
    configs = [(f"bf16 stage {stage}", ds_config(stage, bf16={"enabled": True})) for stage in (1, 2, 3)]
    for name, config in [*configs, ("fp16 stage 3", shipped_fp16)]:
        engine = build_engine(ranks, make_ofa, config, 2)
        losses, norms = train_ofa(engine, STEPS // 2, 2, ranks.world_size)
        results.append({"name": name, "losses": losses, "norms": norms, "updates": engine.num_updates})
        results[-1]["buffers"] = sorted({str(buffer.dtype) for buffer in engine.buffers().values()})
        dispose(engine)
    return results


def train_toy(engine: Engine, first: int, last: int, world_size: int) -> None:
    for step in range(first, last):
        batches = [toy_batch(step, micro * world_size + engine.ranks.rank, 2) for micro in range(2)]
        count = engine.all_reduce(torch.tensor(float(sum(batch.count for batch in batches))))
        for batch in batches:
            engine.backward(engine(batch).sum() / count)
            engine.step()


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Everything of this rank that a checkpoint must bring back."""
    pieces = {f"{kind}|{piece.name}": tensor for piece in engine.pieces() for kind, tensor in piece.tensors.items()}
    average = {f"ema_buffer|{name}": buffer for name, buffer in engine.average_buffers().items()}
    state = pieces | engine.buffers() | average | engine.rng_states()
    counters = engine.counters()
    counters = {key: torch.tensor(float(value)) for key, value in (counters | counters.pop("loss_scaler")).items()}
    return {name: tensor.detach().clone() for name, tensor in (state | counters).items()}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    both = one.keys() & other.keys()
    return sorted(one.keys() ^ other.keys()) + sorted(name for name in both if not torch.equal(one[name], other[name]))


def resume_exactly(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """8 steps with a save after 4, against 4 steps loaded into a fresh engine of another seed and 4 more."""
    results = []
    configs = {f"fp32_{stage}": ds_config(stage) for stage in range(4)}
    configs |= {f"bf16_{stage}": ds_config(stage, bf16={"enabled": True}) for stage in (1, 3)}
    allow_fp16_on_cpu()
    configs["fp16_3"] = load_deepspeed_config("zero3_fp16")
    configs["fp16_3"]["fp16"]["initial_scale_power"] = 20  # so that the first steps overflow and are skipped
    for name, config in configs.items():
        run_dir = folder / f"saved_{name}"
        engine = build_engine(ranks, make_toy, config, 2)
        train_toy(engine, 0, 4, ranks.world_size)
        path = checkpoint.save(engine, run_dir, 4, extra={"note": name})
        saver = checkpoint.BackgroundSaver(engine, folder / f"background_{name}")
        saver.start(4, {"note": name})
        train_toy(engine, 4, 8, ranks.world_size)
        meanwhile = saver.finish()
        saver.close()
        want = state_of(engine)
        dispose(engine)
        torch.manual_seed(99)
        engine = build_engine(ranks, lambda: make_toy(), config, 2)
        manifest = checkpoint.resume(engine, run_dir)
        train_toy(engine, 4, 8, ranks.world_size)
        wrong = different(state_of(engine), want)
        counts = engine.all_reduce(torch.tensor(float(len(wrong))))
        results.append({
            "name": name, "different": int(counts), "first": wrong[:3], "extra": manifest.facts.extra,
            "step": manifest.step, "saved": manifest.state, "problems": checkpoint.verify(path),
            "tensors": len(want), "background": meanwhile is not None and same_files(path, meanwhile),
        })  # fmt: skip
        dispose(engine)
    return results


def same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints are the same in every byte of every rank's file."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return names == sorted(path.name for path in other.glob("*.safetensors")) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def reshard(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """What two ranks saved, loaded here at each stage and saved again: every tensor whole and bit-identical."""
    results = []
    for source, stage in RESHARD[ranks.world_size]:
        original = folder / f"saved_{source}" / "step_00000004"
        engine = build_engine(ranks, make_toy, ds_config(stage), 2)
        checkpoint.load(engine, original)
        path = checkpoint.save(engine, folder / f"again_{source}_{stage}_{ranks.world_size}", 4, extra={})
        train_toy(engine, 4, 5, ranks.world_size)
        if ranks.rank == 0:
            wrong = different(whole_tensors(path), whole_tensors(original))
            results.append({"source": source, "stage": stage, "different": wrong, "norm": engine.grad_norm})
        dispose(engine)
    return results


def whole_tensors(path: Path) -> dict[str, Tensor]:
    """Every parameter's weight, moments and average and every buffer, put together from all files."""
    assert checkpoint.verify(path) == []
    reader = Reader(path, read_manifest(path))
    result = {name: reader.buffer(name) for name in reader.buffers}
    result |= {f"ema_buffer|{name}": reader.ema_buffer(name) for name in reader.ema_buffers}
    for name, info in reader.tensors.items():
        assert info.kinds == (("weight", "exp_avg", "exp_avg_sq", "ema") if info.trainable else ("weight",))
        result |= {f"{kind}|{name}": whole_tensor(reader, name, kind) for kind in info.kinds}
    return result


def whole_tensor(reader: Reader, name: str, kind: str) -> Tensor:
    info = reader.tensors[name]
    return reader.read(name, kind, 0, info.numel).reshape(info.shape)


def change_average(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """A run goes on with a moving average that its checkpoint lacks, and without one that it has."""
    results = []
    plain = dataclasses.replace(OPTIM, ema_decay=0.0)
    for stage in range(4):
        run_dir = folder / f"without_average_{stage}"
        engine = build_engine(ranks, make_toy, ds_config(stage), 2, plain)
        train_toy(engine, 0, 2, ranks.world_size)
        checkpoint.save(engine, run_dir, 2, extra={})
        dispose(engine)
        engine = build_engine(ranks, make_toy, ds_config(stage), 2)
        train_toy(engine, 0, 1, ranks.world_size)  # so that its average is not where it begins by itself
        checkpoint.resume(engine, run_dir)
        begun = state_of(engine)
        averages = {name: tensor for name, tensor in begun.items() if name.startswith("ema")}
        own = {name: begun[name.replace("ema_buffer|", "").replace("ema|", "weight|")] for name in averages}
        train_toy(engine, 2, 3, ranks.world_size)
        path = checkpoint.save(engine, run_dir, 3, extra={})
        dispose(engine)
        engine = build_engine(ranks, make_toy, ds_config(stage), 2, plain)
        checkpoint.load(engine, path)
        left = [name for name in state_of(engine) if name.startswith("ema")]
        dispose(engine)
        results.append({"averages": len(averages), "different": different(averages, own), "left": left})
    return results


def skip_steps(ranks: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Steps that one rank spoils, before any update, between and after others, and the same without them."""
    allow_fp16_on_cpu()
    results = []
    for name in names:
        engine = build_engine(ranks, Toy, skip_config(name), 2)
        changed, skipped, norms, good = [], [], [], 0
        for spoilt in ("nan loss", "", "", "infinite gradient", "infinite loss", ""):
            before = state_of(engine)
            toy_step(engine, good, spoilt, ranks)
            skipped.append(engine.gather(engine.skipped))
            if spoilt:
                norms.append(engine.grad_norm)
                changed += [each for each in different(state_of(engine), before) if each not in COUNTED]
            else:
                good += 1
        last = state_of(engine)
        dispose(engine)
        apart = []
        if not name.startswith("fp16"):  # whose smaller loss scale rounds otherwise
            engine = build_engine(ranks, Toy, skip_config(name), 2)
            for step in range(good):
                toy_step(engine, step, "", ranks)
            apart = [each for each in different(last, state_of(engine)) if each not in COUNTED]
            dispose(engine)
        results.append({
            "name": name, "skipped": skipped, "norms": norms, "updates": int(last["adam_step"]),
            "changed": sorted(set().union(*engine.gather(changed))),
            "apart": sorted(set().union(*engine.gather(apart))),
            "finite": all(bool(tensor.isfinite().all()) for tensor in last.values()),
        })  # fmt: skip
    return results


COUNTED = {"global_steps", "skipped_steps", "global_samples", "torch", "cur_scale", "cur_iter", "last_overflow_iter"}
"""What a skipped step is counted in; torch's generator is seeded anew in each step."""


def skip_config(name: str) -> dict[str, Any]:
    """`bf16_2_offload`: precision, stage, optimizer on the CPU."""
    precision, stage, *offload = name.split("_")
    config = ds_config(int(stage))
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 7, "hysteresis": 1}
        config["bf16"] = {"enabled": False}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def toy_step(engine: Engine, step: int, spoilt: str, ranks: Any) -> None:
    """spoilt: what is wrong with the first micro-batch of the last rank, if anything."""
    batches = [toy_batch(step, micro * ranks.world_size + ranks.rank, 2) for micro in range(2)]
    count = engine.all_reduce(torch.tensor(float(sum(batch.count for batch in batches))))
    for micro, batch in enumerate(batches):
        loss = engine(batch).sum() / count
        if spoilt and micro == 0 and ranks.rank == ranks.world_size - 1:
            if spoilt == "infinite gradient":
                loss.register_hook(lambda gradient: gradient * math.inf)
            else:
                loss = loss + {"nan loss": math.nan, "infinite loss": math.inf}[spoilt]
        engine.backward(loss)
        engine.step()


def fuzz(ranks: Any, folder: Path) -> dict[str, Any]:
    """300 micro-steps under ZeRO-3 in which each rank draws its own mixture, now and then of one kind only."""
    engine = build_engine(ranks, make_ofa, ds_config(3), 3)
    generator = torch.Generator().manual_seed(ranks.rank)
    done = 0
    for step in range(100):
        for _ in range(3):
            only = torch.randint(6, (1,), generator=generator).item()
            drawn = torch.randint(4, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator)
            kinds = "vitd"[only] * 3 if only < 4 else "".join("vitd"[n] for n in drawn)
            batch = random_batch((step, ranks.rank), kinds=kinds, vocab_size=VOCAB)
            engine.backward((group_sums(engine(batch)[0], batch) / 30).sum())
            engine.step()
            done += 1
            (folder / f"heartbeat_{ranks.rank}").write_text(str(done))
    result = {"micro_steps": done, "updates": engine.num_updates, "norm": engine.grad_norm}
    dispose(engine)
    return result


def run_jobs(jobs: Mapping[str, Callable[[Ranks, Path], Any]]) -> None:
    """What `engine_cases.launch` starts on each rank: the jobs that it names; rank 0 writes what they return."""
    folder, *names = sys.argv[1:]
    ranks = init_distributed("cpu")
    results = {name: jobs[name](ranks, Path(folder)) for name in names}
    if ranks.rank == 0:
        result_file(Path(folder), ranks.world_size).write_text(json.dumps(results))
    leave_distributed()
    leave(0)


if __name__ == "__main__":
    run_jobs({
        "parity": parity, "precision": precision, "skip": lambda ranks, _: skip_steps(ranks, SKIP),
        "offload": lambda ranks, _: skip_steps(ranks, OFFLOAD), "resume": resume_exactly, "reshard": reshard,
        "average": change_average, "fuzz": fuzz,
    })  # fmt: skip

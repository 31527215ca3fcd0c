"""A whole training step without DeepSpeed: the real engine around a stand-in that only runs the model and autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofa_ds.batch import Batch, pack
from ofa_ds.config import KernelConfig, OptimConfig, TrainConfig
from ofa_ds.data.example import Example
from ofa_ds.engine.engine import Engine
from ofa_ds.engine.ranks import Ranks
from ofa_ds.model.config import ModelConfig, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.train.packed_buffer import from_buffer, to_buffer

VOCAB = 120
SIZES = [(64, 64), (32, 48)]


def config(kernel: str, **options: Any) -> ModelConfig:
    """A nano model with dropout and drop-path, every operator by this kernel."""
    kernels = KernelConfig(attention="triton", layer_norm=kernel, cross_entropy=kernel)
    sizes = {"dim": 32, "ffn_dim": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    made = preset("nano", vocab_size=VOCAB, **sizes)
    return dataclasses.replace(made, **{"kernels": kernels, "dropout": 0.1, "drop_path": 0.1, **options})


def arrived(seed: int, model: ModelConfig, *, constrained: bool = False, prompt: int = 0) -> Batch:
    """A micro-batch as it comes from a worker. prompt: first positions of every target that have no loss."""
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]

    def example(picture: int | None, code: bool = False) -> Example:
        target = rng.integers(4, VOCAB, 17 if code else int(rng.integers(3, 9)))
        previous = np.concatenate([[0], target[:-1]])
        target[:prompt] = 1
        allowed = tuple(np.unique([token, 7]) if token != 1 else np.empty(0, np.int64) for token in target)
        return Example(
            task="image_infilling" if code else "caption", source=rng.integers(4, VOCAB, int(rng.integers(3, 20))),
            target=target, prev=previous, image=None if picture is None else pictures[picture], code=code,
            patches=None if picture else np.sort(rng.choice(16, 9, replace=False)),
            **({"allowed": allowed} if constrained else {}),
        )  # fmt: skip

    examples = [example(0), example(None), example(1, code=True), example(0)]
    batch = pack(examples, [*SIZES, (16, 16)], model.patch_size, model.image_bucket_size)  # the last shows a stand-in
    return from_buffer(*to_buffer(batch))


class Wrapped:
    """What `Engine` asks of DeepSpeed's engine, with autograd and SGD behind it."""

    def __init__(self, module: OFA, accumulation: int, before_update: Callable[[], None]) -> None:
        self.module, self._accumulation, self._before_update = module, accumulation, before_update
        self.micro_steps = self.global_steps = self.skipped_steps = 0
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.micro_steps % self._accumulation == self._accumulation - 1

    def zero_optimization_stage(self) -> int:
        return 3

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        torch.autograd.backward(loss / self._accumulation)

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self._before_update()
            self.global_steps += 1
            finite = all(p.grad.isfinite().all() for p in self.module.parameters() if p.grad is not None)
            self.skipped_steps += not finite
        self.micro_steps += 1


def engine_of(
    model: ModelConfig, *, device: torch.device, before_update: Callable[[], None], accumulation: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Engine:  # fmt: skip
    """before_update: called when the gradients of a step are there and DeepSpeed would look at them."""
    torch.manual_seed(0)
    module = OFA(model).to(device, dtype).train()
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=device)
    wrapped = Wrapped(module, accumulation, before_update)
    return Engine(wrapped, {}, ranks=ranks, optim=OptimConfig(), train=TrainConfig())

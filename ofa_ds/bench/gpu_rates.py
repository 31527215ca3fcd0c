"""Rates that a GPU attains on what a step of OFA is made of, in bf16: forward and backward, at a width of base or 6B.

Not seen on a GPU yet: tests run it on a CPU, small.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ofa_ds.batch import Batch
from ofa_ds.bench.pieces import batch_of_rows
from ofa_ds.bench.ranks_case import Rows
from ofa_ds.model.config import ModelConfig, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.flops import flops
from ofa_ds.plan.work import work_of

REPEATS = 20
SQUARE = 8192
ROWS = (Rows(count=24, side=384, source=20, target=12), Rows(count=4, side=0, source=200, target=256))


def bench_gpu() -> Calibration:
    """Of the current CUDA device."""
    from ofa_ds.bench.calibrate import blank

    rates, memory = measure_rates("cuda", preset("base"), ROWS, SQUARE)
    return dataclasses.replace(
        blank(), peak_flops=rates["peak"], rates={key: value for key, value in rates.items() if key != "peak"},
        bandwidths={"memory": memory},
    )  # fmt: skip


def measure_rates(
    device: str, config: ModelConfig, rows: Sequence[Rows], square: int
) -> tuple[dict[str, float], float]:
    """FLOP/s of a large square product (`peak`), of layers' products, of the backbone, of all of a step; bytes/s."""
    dtype = torch.bfloat16
    a, b = (torch.randn(square, square, device=device, dtype=dtype) for _ in range(2))
    rates = {"peak": 2 * square**3 / _seconds(lambda: a @ b, device)}
    target = torch.empty_like(a)
    memory = 2 * a.nbytes / _seconds(lambda: target.copy_(a), device)
    batch = batch_of_rows(rows, config).to(device)
    model = OFA(config).to(device=device, dtype=dtype).train()
    counted = flops(config, _work(batch), on_gpu=device == "cuda", stage=0)
    by_kind: dict[str, float] = {}
    for each in counted.modules:
        by_kind[each.kind] = by_kind.get(each.kind, 0.0) + each.useful
    tokens = len(batch.decoder_tokens) + int(batch.encoder_offsets[-1])
    rates["matmul"] = _rate_of_layer(config, tokens, device, dtype)
    rates["conv"] = by_kind["conv"] / _seconds(lambda: _backbone(model, batch, dtype), device)
    rates["step"] = counted.useful / _seconds(lambda: _step(model, batch), device)
    return rates, memory


def _rate_of_layer(config: ModelConfig, tokens: int, device: str, dtype: torch.dtype) -> float:
    """Of the two products of a feed-forward block, forward and backward."""
    block = nn.Sequential(
        nn.Linear(config.dim, config.ffn_dim, bias=False), nn.Linear(config.ffn_dim, config.dim, bias=False)
    ).to(device=device, dtype=dtype)
    x = torch.randn(tokens, config.dim, device=device, dtype=dtype, requires_grad=True)
    seconds = _seconds(lambda: block(x).sum().backward(), device)
    return 3 * 2 * 2 * tokens * config.dim * config.ffn_dim / seconds


def _backbone(model: OFA, batch: Batch, dtype: torch.dtype) -> None:
    for images in batch.images:
        model.encoder.embed_images(images.to(dtype), None).sum().backward()


def _step(model: OFA, batch: Batch) -> None:
    model.zero_grad()
    model(batch)[0].sum().backward()


def _work(batch: Batch) -> object:
    return work_of(
        [tuple(images.shape) for images in batch.images], batch.encoder_offsets.tolist(), batch.num_patches.tolist(),
        batch.decoder_offsets.tolist(), batch.code_mask.tolist(), len(batch.places.counted),
    )  # fmt: skip


def _seconds(action: Callable[[], Tensor | None], device: str) -> float:
    """Median of a few runs, each waited for."""
    action()
    found = []
    for _ in range(REPEATS if device == "cuda" else 2):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()

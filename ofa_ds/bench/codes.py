"""Encoding pictures into codes beside the original's way of it: the same weights, the same codes, on one thread.

Each way runs in a process of its own, by turns, as what a C library keeps of freed memory cannot be taken back.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ofa_ds.engine.host_memory import keep_freed_memory
from ofa_ds.vision.blocks import AttnBlock, Level, ResBlock
from ofa_ds.vision.coder import Coder
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.pixels import to_input
from ofa_ds.vision.vqgan import Vqgan

WAYS = ("original", "ours")
WORKERS = 2


def bench_codes(repeats: int = 5, pictures: int = 4, *, config: VqganConfig | None = None) -> dict[str, Any]:
    """{"pictures", "side", "<way>_s": seconds of a core for a picture, medians, "ratio" of each round, "equal",
    "rates"}.

    equal: share of the codes that are the same. config: the released f8 model's where not given. Both take pictures one
    by one, which was no slower than together. Seconds of a core, so that what else a machine does counts for little.
    rates: ours by the clock, pictures a second of 1, 2, ... WORKERS processes at once, as of `codes encode --workers`.
    """
    config = config or VqganConfig()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    codes: dict[str, np.ndarray] = {}
    context = multiprocessing.get_context("spawn")
    ways = (*WAYS, *WAYS[1:] * (WORKERS - 1))
    pipes = [context.Pipe() for _ in ways]
    workers = [
        context.Process(target=_work, args=(way, config, pictures, pipe))
        for way, (_, pipe) in zip(ways, pipes, strict=True)
    ]
    mine = [pipe for pipe, _ in pipes]
    for worker, (_, theirs) in zip(workers, pipes, strict=True):
        worker.start()
        theirs.close()  # or nobody would notice that it ended
    try:
        for pipe in mine:
            pipe.recv()  # it has started
        for _ in range(repeats):
            for way, pipe in zip(WAYS, mine, strict=False):
                pipe.send(True)
                seconds, codes[way] = pipe.recv()
                times[way].append(seconds / pictures)
        rates = {count: _rate(mine[1 : 1 + count], repeats, pictures) for count in range(1, WORKERS + 1)}
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    ratios = [a / b for a, b in zip(times["original"], times["ours"], strict=True)]
    medians = {f"{way}_s": statistics.median(each) for way, each in times.items()}
    equal = float((codes["original"] == codes["ours"]).mean())
    return {
        "pictures": pictures, "side": config.resolution, **medians, "ratio": ratios, "equal": equal, "rates": rates
    }  # fmt: skip


def _rate(pipes: Sequence[Any], repeats: int, pictures: int) -> float:
    """Pictures a second of these processes at once, median."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()
        seconds.append(time.perf_counter() - began)
    return len(pipes) * pictures / statistics.median(seconds)


def _work(way: str, config: VqganConfig, pictures: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = Vqgan(config).eval()
    draw = np.random.default_rng(1)
    side = config.resolution
    drawn = [_picture(draw, side) for _ in range(pictures)]
    encode = original_way(model, side) if way == "original" else Coder(model, side).encode
    if way == "ours":
        keep_freed_memory()  # as a worker of `ofa-ds codes encode` does
    encode(drawn[:1])  # what is made once
    pipe.send(None)
    while pipe.recv():
        began = time.process_time()
        found = encode(drawn)
        pipe.send((time.process_time() - began, np.stack(found)))


def _picture(draw: np.random.Generator, side: int) -> np.ndarray:
    """Smooth, with noise on it: uint8 [side, side, 3]."""
    coarse = torch.from_numpy(draw.random((1, 3, 8, 8)))
    smooth = functional.interpolate(coarse, (side, side), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return ((smooth + draw.normal(0, 0.02, smooth.shape)).clip(0, 1) * 255).astype(np.uint8)


def original_way(model: Vqgan, side: int) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """The published code's operations on the same weights: contiguous pictures, one at a time, without a gradient."""

    @torch.no_grad()
    def encode(pictures: list[np.ndarray]) -> list[np.ndarray]:
        found = []
        for picture in pictures:
            h_BEHW = model.quant_conv(_encoder(model, to_input(picture, side)[None].contiguous()))
            found.append(model.quantize.proj(h_BEHW).argmax(1)[0].numpy())
        return found

    return encode


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _encoder(model: Vqgan, x_BCHW: Tensor) -> Tensor:
    encoder = model.encoder
    h_BCHW = encoder.conv_in(x_BCHW)
    for level in encoder.down:
        h_BCHW = _level(level, h_BCHW)
        if hasattr(level, "downsample"):
            h_BCHW = level.downsample.conv(functional.pad(h_BCHW, (0, 1, 0, 1), mode="constant", value=0))
    middle = encoder.mid
    h_BCHW = _residual(middle.block_2, _attention(middle.attn_1, _residual(middle.block_1, h_BCHW)))
    return encoder.conv_out(_swish(encoder.norm_out(h_BCHW)))


def _level(level: Level, h_BCHW: Tensor) -> Tensor:
    for k, block in enumerate(level.block):
        h_BCHW = _residual(block, h_BCHW)
        if len(level.attn):
            h_BCHW = _attention(level.attn[k], h_BCHW)
    return h_BCHW


def _residual(block: ResBlock, x_BCHW: Tensor) -> Tensor:
    h_BCHW = block.conv1(_swish(block.norm1(x_BCHW)))
    h_BCHW = block.conv2(block.dropout(_swish(block.norm2(h_BCHW))))
    return (block.nin_shortcut(x_BCHW) if hasattr(block, "nin_shortcut") else x_BCHW) + h_BCHW


def _attention(block: AttnBlock, x_BCHW: Tensor) -> Tensor:
    h_BCHW = block.norm(x_BCHW)
    size, channels, height, width = h_BCHW.shape
    q, k, v = (part(h_BCHW).reshape(size, channels, height * width) for part in (block.q, block.k, block.v))
    weights = torch.bmm(q.permute(0, 2, 1), k) * channels**-0.5
    weights = functional.softmax(weights, dim=2).permute(0, 2, 1)
    return x_BCHW + block.proj_out(torch.bmm(v, weights).reshape(size, channels, height, width))


def table(found: dict[str, Any]) -> str:
    ratio = statistics.median(found["ratio"])
    return "\n".join(
        [
            f"a picture of {found['side']} pixels a side into codes, one thread, {len(found['ratio'])} rounds",
            f"  the original's way {found['original_s']:8.2f} s of a core",
            f"  ours               {found['ours_s']:8.2f} s of a core   1/{ratio:.2f} of it "
            f"({min(found['ratio']):.2f} to {max(found['ratio']):.2f})",
            f"  equal codes        {100 * found['equal']:8.2f} %",
            *(f"  {num} worker(s)       {rate:8.2f} pictures/s by the clock" for num, rate in found["rates"].items()),
        ]
    )

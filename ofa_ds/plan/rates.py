"""How long a GPU takes for what a module asks of it: the roofline of each kernel, with published or counted rates.

product     the best of cuBLAS's usual tiles: whole tiles, whole waves of them over the multiprocessors, at what the
            largest products reach (`Gpu.attainable`), or what the second cache feeds a tile (5,120 bytes a clock by
            A100's white paper, of which 60 % are assumed; twice that on sm_90, where clusters of 2 x 2 programs share
            what they load), or memory
attention   thread instructions a pair of a query and a key and head, counted in the kernels' machine code
            (kernels/README.md, Attention and Checked), over whole tiles of 64 queries and 64 or 32 keys, at the
            share of issue slots that kernels/roofline.py assumes; or its products; or its bytes
ViT         FlashAttention-2 at its paper's 73 % and 63 % of the peak, less what head dim 80 pads to 96
convolutions  ResNet-50 trains at 2,711 pictures/s on an A100-80GB (NVIDIA/DeepLearningExamples, RN50v1.5 in mixed
            precision, 24.5 GFLOP each): 66.5 TFLOP/s with its norms, bound by memory, so scaled with its bandwidth
norms       bytes (kernels/README.md, `At best`; 16 bits wide), at what a copy reaches
optimizer   46 bytes an element of a rank's share: three fp32 states read and written, gradients read three times
            and scaled once, weights written in 16 bits
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ofa_ds.config.architecture import ModelConfig, ViTConfig
from ofa_ds.plan.flops import Flops, ModuleFlops
from ofa_ds.plan.hardware import Gpu
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.work import Work

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
SPLITS = (1, 2, 4, 8)
"""Among how many programs the inner side of a product may be divided."""
CACHE_BYTES_PER_CLOCK = 0.6 * 5120
CONV_FLOPS, CONV_HBM = 66.5e12, 2.039e12
FLASH = {"forward": 0.73 * 80 / 96, "backward": 0.63 * 80 / 96}
OPTIMIZER_BYTES = 46
INSTRUCTIONS = {
    # (head dim, arch): forward of encoder, decoder, cross; backward of the same, with the relative row's pass
    (64, "sm_80"): ((21.5, 24.0, 16.6), (66.5, 71.9, 41.8)),
    (80, "sm_80"): ((24.6, 27.1, 19.7), (83.1, 88.5, 58.4)),
    (64, "sm_90"): ((19.4, 21.9, 14.3), (56.4, 61.2, 35.6)),
    (80, "sm_90"): ((22.7, 25.2, 17.6), (68.2, 73.0, 47.4)),
}
"""kernels/README.md; head dim 80's decoder and cross are 64's, plus the encoder's difference."""
KINDS = ("encoder", "decoder", "cross")


class Seconds(NamedTuple):
    """Of a module in one micro-batch."""

    name: str
    kind: str
    forward: float
    backward: float
    """Without what is computed again."""
    again: float = 0.0
    """Of a layer's second forward."""

    def times(self, factor: float) -> Seconds:
        return self._replace(forward=factor * self.forward, backward=factor * self.backward, again=factor * self.again)


def product_s(m: float, n: float, k: float, gpu: Gpu) -> float:
    """[m, k] x [k, n] in 16 bits."""
    if not m * n * k:
        return 0.0
    return _product_s(float(m), float(n), float(k), gpu.peak_flops * gpu.attainable, gpu.multiprocessors, _fed(gpu),
                      gpu.hbm_bytes_per_s * gpu.hbm_attainable)  # fmt: skip


def _fed(gpu: Gpu) -> float:
    """Bytes/s from the second cache. The clock by the peak: 1,024 multiply-adds a multiprocessor, 2,048 on sm_90."""
    old = _arch(gpu) == "sm_80"
    clock = gpu.peak_flops / (gpu.multiprocessors * (2048 if old else 4096))
    return CACHE_BYTES_PER_CLOCK * clock * (1 if old else 2)


def _arch(gpu: Gpu) -> str:
    return "sm_80" if gpu.name.startswith("a100") else "sm_90"


@functools.lru_cache(maxsize=4096)
def _product_s(m: float, n: float, k: float, rate: float, programs: int, fed_bytes: float, memory: float) -> float:
    moved = 2 * (m * k + k * n + m * n) / memory
    best = math.inf
    for rows, columns in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        fed = fed_bytes * rows * columns / (rows + columns)
        for split in SPLITS:
            if split > 1 and k / split < 256:
                continue
            waves = math.ceil(tiles * split / programs)
            seconds = 2 * rows * columns * (k / split) * waves * programs / min(rate, fed)
            partial = 8 * m * n * split / memory if split > 1 else 0.0
            best = min(best, seconds + partial)
    return max(best, moved)


def seconds(config: ModelConfig, work: Work, counted: Flops, gpu: Gpu) -> list[Seconds]:
    """Of each module of a micro-batch. counted: `plan.flops.flops` of the same."""
    return list(_seconds(config, work, counted, gpu))


def _seconds(config: ModelConfig, work: Work, counted: Flops, gpu: Gpu) -> Iterator[Seconds]:
    for each in counted.modules:
        if each.kind == "matmul":
            yield _linear(each, gpu)
        elif each.kind == "conv":
            yield _conv(each, config, gpu)
        elif each.kind == "vocabulary":
            yield _vocabulary(each, gpu)
        elif each.name.startswith("encoder.embed_images"):
            rate = gpu.peak_flops
            yield Seconds(each.name, "attention", each.forward / rate / FLASH["forward"],
                          each.backward / rate / FLASH["backward"])  # fmt: skip
        elif each.name.endswith("position_logits"):
            rate = gpu.peak_flops * gpu.attainable
            yield Seconds(each.name, "attention", each.forward / rate, each.backward / rate)
        else:
            yield _attention(each, config, work, gpu)
    yield from _norms(config, work, gpu)


def _linear(each: ModuleFlops, gpu: Gpu) -> Seconds:
    forward = product_s(each.m, each.n, each.k, gpu)
    weights = product_s(each.k, each.n, each.m, gpu)
    inputs = product_s(each.m, each.k, each.n, gpu) if each.backward > 1.5 * each.forward else 0.0
    stand_ins = each.recomputed > 0 and each.name.startswith("encoder.embed_images")
    again = forward if each.recomputed and not stand_ins else 0.0
    return Seconds(each.name, "matmul", forward, weights + inputs, again)


def _conv(each: ModuleFlops, config: ModelConfig, gpu: Gpu) -> Seconds:
    if isinstance(config.backbone, ViTConfig):  # one product over whole patches
        return _linear(each, gpu)._replace(kind="conv")
    rate = CONV_FLOPS * gpu.hbm_bytes_per_s / CONV_HBM
    share = each.executed / each.useful if each.useful else 1.0
    return Seconds(each.name, "conv", each.forward * share / rate, each.backward * share / rate)


def _vocabulary(each: ModuleFlops, gpu: Gpu) -> Seconds:
    """Logits [m, n]: three products, what is made again; a pass over the logits each way, and the fp32 gradient."""
    memory = gpu.hbm_bytes_per_s * gpu.hbm_attainable
    forward = product_s(each.m, each.n, each.k, gpu)
    backward = product_s(each.k, each.n, each.m, gpu) + product_s(each.m, each.k, each.n, gpu)
    again = forward if each.recomputed else 0.0
    moved = 8 * each.n * each.k / memory
    return Seconds(each.name, "vocabulary", forward + 2 * each.m * each.n / memory,
                   backward + again + 4 * each.m * each.n / memory + moved)  # fmt: skip


def _attention(each: ModuleFlops, config: ModelConfig, work: Work, gpu: Gpu) -> Seconds:
    which = 2 if each.name.endswith("encoder_attn") else 0 if each.name.startswith("encoder") else 1
    forward, backward = INSTRUCTIONS[80 if config.head_dim > 64 else 64, _arch(gpu)]
    scale = max(1.0, config.head_dim / 80)
    memory, products = gpu.hbm_bytes_per_s * gpu.hbm_attainable, gpu.peak_flops * gpu.attainable
    rows = each.m * config.dim * 2
    found = []
    for instructions, step, useful, tensors in (
        (forward[which], 64, each.forward, 4), (backward[which], 32, each.backward, 10)
    ):  # fmt: skip
        issued = _tile_pairs(work, KINDS[which], step) * config.num_heads * instructions * scale / 32 / gpu.issue_per_s
        found.append(max(issued, useful / products, tensors * rows / memory))
    return Seconds(each.name, "attention", found[0], found[1], found[0] if config.activation_checkpointing else 0.0)


@functools.lru_cache(maxsize=256)
def _tile_pairs(work: Work, kind: str, step: int) -> float:
    """Pairs of whole tiles: 64 queries and `step` keys; a causal mask leaves those before the diagonal."""
    total = 0.0
    for each in work.examples:
        queries = each.encoder if kind == "encoder" else each.target
        keys = each.target if kind == "decoder" else each.encoder
        wide, long = _up(queries, 64), _up(keys, step)
        total += each.count * (wide * (long + 64) / 2 if kind == "decoder" else wide * long)
    return total


def _up(length: float, multiple: int) -> float:
    return math.ceil(length / multiple) * multiple


def _norms(config: ModelConfig, work: Work, gpu: Gpu) -> Iterator[Seconds]:
    """Norms, GELU, dropout, residuals: bytes alone. N tokens, D and F channels, 2 bytes each.

    Forward and backward: a norm 4 N D and 6 N D, with a residual 8 and 10, GELU with a norm 4 N F and 10 N F, the sum
    at a layer's end 6 N D and 4 N D.
    """
    memory = gpu.hbm_bytes_per_s * gpu.hbm_attainable
    again = float(config.activation_checkpointing)
    for stack, tokens, layers, norms, sums in (
        ("encoder", work.encoder_tokens, config.encoder_layers, 2, 1),
        ("decoder", work.decoder_tokens, config.decoder_layers, 3, 2),
    ):
        wide, inner = tokens * config.dim / memory, tokens * config.ffn_dim / memory
        forward = wide * (4 * norms + 8 * sums + 6) + 4 * inner
        backward = wide * (6 * norms + 10 * sums + 4) + 10 * inner
        for i in range(layers):
            yield Seconds(f"{stack}.layers.{i}", "norms", forward, backward, again * forward)
    if isinstance(config.backbone, ViTConfig):
        yield from _vit_norms(config.backbone, work, memory)


def _vit_norms(backbone: ViTConfig, work: Work, memory: float) -> Iterator[Seconds]:
    """Of a block: two norms, two sums, GELU by torch's own operators (three passes over 4 C channels)."""
    patch = backbone.patch_size
    tokens = sum(each.count * (each.height // patch) * (each.width // patch) for each in work.images)
    wide = tokens * backbone.channels / memory
    for i in range(backbone.layers):
        name = f"encoder.embed_images.transformer.resblocks.{i}"
        yield Seconds(name, "norms", wide * (2 * 4 + 2 * 6 + 4 * 10), wide * (2 * 6 + 2 * 4 + 4 * 16))


def optimizer_s(elements: float, gpu: Gpu) -> float:
    """Of a rank's share of the parameters."""
    return OPTIMIZER_BYTES * elements / (gpu.hbm_bytes_per_s * gpu.hbm_attainable)


HOST_MEMORY_BYTES_PER_S = 0.7 * 2 * 8 * 25.6e9
"""Of a host: two sockets of eight channels of DDR4-3200, as a DGX A100 has; 70 % of it are assumed."""
NVME_BYTES_PER_S = {"read": 48e9, "write": 26e9}
"""Of a host: DeepSpeed's DeepNVMe, its blog's figures of eight drives of PCIe 5; older hosts have less."""


def offload_s(layout: Layout, elements: float, accumulation: int, gpu: Gpu) -> float:
    """What a step takes longer where the optimizer is on the host; elements: of a rank's share.

    Gradients go down in fp32 after each micro-batch, weights come up in 16 bits once; AdamW on the processors reads and
    writes 30 bytes an element, of all the host's ranks; NVMe has master and moments read and written, 12 bytes each.
    """
    if layout.offload_optimizer == "none":
        return 0.0
    link = elements * (4 * accumulation + layout.weight_bytes) / gpu.host_link_bytes_per_s
    together = elements * layout.ranks_per_host
    found = link + 30 * together / HOST_MEMORY_BYTES_PER_S
    if layout.offload_optimizer == "nvme":
        found += sum(12 * together / speed for speed in NVME_BYTES_PER_S.values())
    return found


def fetch_s(share: float, layout: Layout, gpu: Gpu) -> float:
    """Of `share` bytes, a rank's own of what is gathered, to the GPU from where its weights are."""
    if layout.offload_param == "none":
        return 0.0
    seconds = share / gpu.host_link_bytes_per_s
    if layout.offload_param == "nvme":
        seconds = max(seconds, share * layout.ranks_per_host / NVME_BYTES_PER_S["read"])
    return seconds


HOST_US = {"linear": 100.0, "norm": 122.0, "gelu": 125.0, "residual": 220.0, "self": 288.0, "cross": 219.0}
"""Of the host, forward and backward: kernels/README.md, `Host time`; a linear layer, by the same clock on the same
machine, 2026-11-28: 103 us. Without DeepSpeed's hooks."""


def host_s(config: ModelConfig) -> float:
    """Until all operations of a micro-batch's layers are issued: below the 6B a step takes no less."""
    us = HOST_US
    encoder = us["self"] + 2 * us["norm"] + us["gelu"] + us["residual"] + 6 * us["linear"]
    decoder = us["self"] + us["cross"] + 3 * us["norm"] + us["gelu"] + 2 * us["residual"] + 10 * us["linear"]
    again = 4 / 3 if config.activation_checkpointing else 1.0
    return again * (config.encoder_layers * encoder + config.decoder_layers * decoder) * 1e-6


def totals(parts: Sequence[Seconds]) -> dict[str, float]:
    """Seconds by kind."""
    found: dict[str, float] = {}
    for each in parts:
        found[each.kind] = found.get(each.kind, 0.0) + each.forward + each.backward + each.again
    return found

"""Seconds of a model's pieces on this machine's CPU, one thread: the factors that `plan.cpu_pieces` multiplies.

Layers are measured as the difference between whole models of one and of three layers, so that each runs as it does in
a model: after others, with its weights and activations out of the cache.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ofa_ds.batch import Batch, pack
from ofa_ds.bench.ranks_case import Case, Rows
from ofa_ds.bench.step import example, progress
from ofa_ds.engine.host_memory import keep_freed_memory
from ofa_ds.model.config import ConvConfig, ModelConfig, preset
from ofa_ds.model.layers import TokenEmbedding
from ofa_ds.model.ofa import OFA
from ofa_ds.model.resnet import ResNet
from ofa_ds.model.stem import ConvStem
from ofa_ds.plan.cpu_pieces import RESNET_PIECES, logits_features, pieces, seconds_of

WIDTHS = ("nano", "tiny", "base")
"""Presets whose layer widths are measured."""
REPEATS = 3
STEM = ConvConfig(patch_size=16, channels=32)
"""A backbone that costs next to nothing, where layers are measured."""
SMALL_VOCAB = 1000

SHAPES: tuple[tuple[Rows, ...], ...] = (
    (Rows(count=1, side=64, source=16, target=8),),
    (Rows(count=2, side=256, source=30, target=14),),
    (Rows(count=1, side=256, source=60, target=90), Rows(count=2, side=0, source=150, target=60)),
    (Rows(count=6, side=128, source=40, target=24),),
    (Rows(count=3, side=0, source=100, target=200),),
)
PIXELS = ((1, 128), (1, 256), (3, 256), (2, 384))
"""(pictures, side) on which backbones are measured."""
COUNTED = (16, 100, 280, 420)
"""Tokens with a loss."""


class Measured(NamedTuple):
    """Of one piece at one shape: seconds, and bytes that its forward keeps for the backward."""

    forward_s: float
    both_s: float
    kept_bytes: float


def measure_pieces(widths: Sequence[str] = WIDTHS) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """`Calibration.costs` and `sizes` of every piece; about two minutes."""
    torch.set_num_threads(1)
    keep_freed_memory()
    costs: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}

    def add(found: Fitted) -> None:
        costs.update(found[0])
        sizes.update(found[1])

    add(_resnet())
    add(_conv_stem())
    for name in widths:
        config = preset(name, vocab_size=SMALL_VOCAB)
        add(_vocabulary(config.dim))
        add(_layers(config, costs, sizes))
    progress("")
    return costs, sizes


Fitted = tuple[dict[str, list[float]], dict[str, list[float]]]


def fitted(name: str, features: Sequence[Sequence[float]], found: Sequence[Measured]) -> Fitted:
    """(costs, sizes) of a piece; the cost of its forward alone is there as well."""
    costs = {
        name: fit(features, [each.both_s for each in found]),
        _forward(name): fit(features, [each.forward_s for each in found]),
    }
    return costs, {name: fit(features, [each.kept_bytes for each in found])}


def _forward(name: str) -> str:
    piece, _, width = name.rpartition(".")
    return f"{piece}.forward.{width}" if width.isdigit() else f"{name}.forward"


def fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """The factors >= 0 with the least relative squares: what is negative is left out, one after another."""
    x, y = np.asarray(features, float), np.asarray(seconds, float)
    weighted = x / y[:, None]
    scale = np.where(np.abs(weighted).max(0) > 0, np.abs(weighted).max(0), 1.0)
    kept = [i for i in range(x.shape[1]) if np.abs(x[:, i]).max() > 0]
    while True:
        solution = np.linalg.lstsq(weighted[:, kept] / scale[kept], np.ones(len(y)), rcond=1e-9)[0]
        if (solution >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(solution.argmin()))
    out = [0.0] * x.shape[1]
    for i, value in zip(kept, solution, strict=True):
        out[i] = max(0.0, float(value / scale[i]))
    return out


def _measured(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Measured:
    """Medians of runs after the first."""
    own = {each.untyped_storage().data_ptr() for each in parameters}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = forward()
    kept_bytes = sum(each.untyped_storage().nbytes() for at, each in kept.items() if at not in own)
    kept.clear()
    loss.backward()
    seconds = []
    for _ in range(REPEATS):
        for each in parameters:
            each.grad = None
        began = time.perf_counter()
        loss = forward()
        middle = time.perf_counter()
        loss.backward()
        seconds.append((middle - began, time.perf_counter() - began))
        del loss
    forward_s, both_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return Measured(forward_s, both_s, kept_bytes)


def _resnet() -> Fitted:
    model = ResNet((2, 2, 2)).train()
    parts: dict[str, nn.Module] = {"stem": _Stem(model)}
    for i, stage in enumerate((model.layer1, model.layer2, model.layer3), 1):
        parts[f"layer{i}_first"], parts[f"layer{i}"] = stage[0], stage[1]
    found: dict[str, list[Measured]] = {name: [] for name in RESNET_PIECES}
    for count, side in PIXELS:
        progress(f"backbone: {count} x {side} px")
        x = torch.randn(count, 3, side, side).contiguous(memory_format=torch.channels_last)
        for name in RESNET_PIECES:
            part, given = parts[name], x.detach().requires_grad_(name != "stem")
            with torch.no_grad():
                x = part(given, None)
            ones = torch.ones_like(x)

            def forward(part: nn.Module = part, given: Tensor = given, ones: Tensor = ones) -> Tensor:
                return (part(given, None) * ones).sum()

            found[name].append(_measured(forward, [ones, *part.parameters(), *([given] * (name == "stem"))]))
    features = [(1, count * side * side) for count, side in PIXELS]
    return _joined(fitted(f"resnet.{name}", features, each) for name, each in found.items())


def _joined(parts: Iterable[Fitted]) -> Fitted:
    costs: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    for part in parts:
        costs |= part[0]
        sizes |= part[1]
    return costs, sizes


class _Stem(nn.Module):
    def __init__(self, model: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1 = model.conv1, model.bn1

    def forward(self, images: Tensor, weight: Tensor | None) -> Tensor:
        x = self.bn1(self.conv1(images), weight, relu=True)
        return nn.functional.max_pool2d(x, 3, stride=2, padding=1)


def _conv_stem() -> Fitted:
    def of(channels: int) -> Fitted:
        model, found = ConvStem(ConvConfig(patch_size=16, channels=channels)), []
        for count, side in PIXELS:
            x = torch.randn(count, 3, side, side)
            found.append(_measured(lambda x=x: model(x, None).sum(), [x, *model.parameters()]))
        return fitted(f"conv_stem.{channels}", [(1, count * side * side) for count, side in PIXELS], found)

    return _joined(of(channels) for channels in (STEM.channels, 128))


def _vocabulary(dim: int) -> Fitted:
    features, found = [], []
    for vocab in (8_000, 59_457):
        embed = TokenEmbedding(vocab, dim, 0.02)
        for counted in COUNTED:
            progress(f"vocabulary of {vocab}, width {dim}: {counted} tokens")
            hidden = torch.randn(counted, dim, requires_grad=True)
            ids, every = torch.randint(4, vocab, (counted,)), torch.arange(counted)

            def forward(
                embed: TokenEmbedding = embed, hidden: Tensor = hidden, ids: Tensor = ids, every: Tensor = every
            ) -> Tensor:
                return embed(hidden + embed(ids), ids, 0.0, None, every)[0].sum()

            found.append(_measured(forward, [hidden, embed.weight]))
            features.append(logits_features(vocab, counted))
    return fitted(f"vocabulary.{dim}", features, found)


def batch_of_rows(rows: Sequence[Rows], config: ModelConfig) -> Batch:
    rng = np.random.default_rng(0)
    examples = []
    for row in rows:
        for _ in range(row.count):
            made = example(rng, side=row.side, source=row.source, target=row.target)
            made.source[:] %= config.vocab_size - 4
            made.target[:] = made.target % (config.vocab_size - 4) + 4
            examples.append(made)
    sides = sorted({row.side for row in rows if row.side}, reverse=True)
    return pack(examples, [(side, side) for side in sides], 16, config.image_bucket_size)


def _layers(config: ModelConfig, costs: dict[str, list[float]], sizes: dict[str, list[float]]) -> Fitted:
    depths = {"one": (1, 1), "encoder_layer": (3, 1), "decoder_layer": (1, 3)}
    models = {
        key: OFA(dataclasses.replace(config, encoder_layers=depth[0], decoder_layers=depth[1], backbone=STEM)).train()
        for key, depth in depths.items()
    }
    features: dict[str, list[tuple[float, ...]]] = {"encoder_layer": [], "decoder_layer": [], "rest": []}
    found: dict[str, list[Measured]] = {name: [] for name in features}
    for number, rows in enumerate(SHAPES, 1):
        progress(f"layers of width {config.dim}: shape {number} of {len(SHAPES)}")
        batch = batch_of_rows(rows, config)
        whole = {
            key: _measured(lambda model=model, batch=batch: model(batch)[0].sum(), list(model.parameters()))
            for key, model in models.items()
        }
        parts = pieces(models["one"].config, Case(model="nano", rows=rows, stage=0, ranks=1).work())
        rest = np.array(whole["one"])
        for name in ("encoder_layer", "decoder_layer"):
            layer = (np.array(whole[name]) - np.array(whole["one"])) / 2
            rest -= layer
            found[name].append(Measured(*np.maximum(layer, 1e-6).tolist()))
        for each in parts:
            if each.name in ("vocabulary", "conv_stem"):
                rest[1] -= seconds_of(each, costs)
                rest[2] -= seconds_of(each, sizes)
        found["rest"].append(Measured(*np.maximum(rest, 1e-4).tolist()))
        for name in features:
            features[name].append(next(each.features for each in parts if each.name == name))
    return _joined(fitted(f"{name}.{config.dim}", features[name], found[name]) for name in features)

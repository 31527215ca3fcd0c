"""What a micro-batch's forward and backward on a CPU is made of: pieces of a model, each with a few counts.

The time of a piece is linear in its counts; `bench step` measures the factors (`Calibration.costs`). Those of a layer
width that was not measured lie between the measured ones, or beyond them as the products' operations do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ofa_ds.config.architecture import ConvConfig, ModelConfig, ResNetConfig
from ofa_ds.plan.flops import sums_of
from ofa_ds.plan.work import Work

KEPT_LOGITS = 3 * (6 << 20)
"""Logits from which on the loss makes them again in the backward (`ofa_kernels.cross_entropy`: three chunks)."""
BUCKET_PAIRS = 8000
"""What a bucket of attention costs, in padded pairs (`ofa_kernels.attention_plan`)."""
SECOND_ORDER = {"encoder_layer": (1, 2), "decoder_layer": (1, 2), "rest": (1, 2)}
"""Per-token features of a piece: the products behind them grow with the square of the width."""


class Piece(NamedTuple):
    name: str
    """Key of `Calibration.costs`, without the width."""
    width: int
    """0 where it is the same in all models."""
    count: float
    features: tuple[float, ...]
    recomputed: bool = False
    """Under activation checkpointing its forward runs twice."""


def pieces(config: ModelConfig, work: Work) -> list[Piece]:
    """Of one micro-batch. Raises ValueError for a backbone that is not measured on CPUs."""
    sums, heads, dim = sums_of(config, work), config.num_heads, config.dim
    pairs = [padded_pairs(work, kind) * heads for kind in ("encoder", "decoder", "cross")]
    own, other, across = (
        each * heads for each in (sums.encoder_position_pairs, sums.decoder_position_pairs, sums.cross_position_pairs)
    )
    ckpt = config.activation_checkpointing
    return [
        *_backbone(config, work),
        Piece("encoder_layer", dim, config.encoder_layers, (1, sums.encoder, pairs[0], own), ckpt),
        Piece(
            "decoder_layer", dim, config.decoder_layers,
            (1, sums.decoder, sums.encoder, pairs[1] + pairs[2], other), ckpt,
        ),
        Piece("rest", dim, 1, (1, sums.encoder, sums.decoder, own + other + across)),
        Piece("vocabulary", dim, 1, logits_features(config.vocab_size, sums.counted)),
    ]  # fmt: skip


def logits_features(vocab: float, counted: float) -> tuple[float, ...]:
    """Size of the vocabulary; logits that are kept for the backward; those that are made again there."""
    logits = vocab * counted
    return (vocab, 0, logits) if logits > KEPT_LOGITS else (vocab, logits, 0)


RESNET_PIECES = ("stem", "layer1_first", "layer1", "layer2_first", "layer2", "layer3_first", "layer3")


def _backbone(config: ModelConfig, work: Work) -> Iterator[Piece]:
    backbone = config.backbone
    for group in work.images:
        pixels = group.count * group.height * group.width
        if isinstance(backbone, ConvConfig):
            yield Piece("conv_stem", backbone.channels, 1, (1, pixels))
        elif isinstance(backbone, ResNetConfig):
            counts = [1, *(n for depth in backbone.depths for n in (1, depth - 1))]
            for name, count in zip(RESNET_PIECES, counts, strict=True):
                yield Piece(f"resnet.{name}", 0, count, (1, pixels))
        else:
            raise ValueError("the time of a ViT is not measured on CPUs; plan for a GPU")


def seconds_of(each: Piece, costs: Mapping[str, Sequence[float]]) -> float:
    """Forward, backward and what is computed again. Raises ValueError: `costs` lacks it."""
    per_one = _dot(each.features, _factors(each.name, each.width, costs))
    if each.recomputed:
        per_one += _dot(each.features, _factors(f"{each.name}.forward", each.width, costs))
    return each.count * per_one


def kept_bytes(each: Piece, sizes: Mapping[str, Sequence[float]], work: Work) -> float:
    """What its forward keeps for the backward; under activation checkpointing the inputs, and one layer's rest."""
    of_one = _dot(each.features, _factors(each.name, each.width, sizes))
    if not each.recomputed:
        return each.count * of_one
    tokens = work.encoder_tokens if each.name == "encoder_layer" else work.decoder_tokens
    return each.count * tokens * each.width * 4 + of_one


def _dot(features: Sequence[float], factors: Sequence[float]) -> float:
    if len(features) != len(factors):
        raise ValueError("this calibration was made for other features; measure again: ofa-ds bench step")
    return sum(a * b for a, b in zip(features, factors, strict=True))


def _factors(name: str, width: int, costs: Mapping[str, Sequence[float]]) -> Sequence[float]:
    if not width:
        if name not in costs:
            raise ValueError(f"this calibration has no costs of {name}; measure again: ofa-ds bench step")
        return costs[name]
    known = sorted(int(key.rpartition(".")[2]) for key in costs if key.rpartition(".")[0] == name)
    if not known:
        raise ValueError(f"this calibration has no costs of {name}; measure again: ofa-ds bench step")
    below = max((each for each in known if each <= width), default=known[0])
    above = min((each for each in known if each >= width), default=known[-1])
    low, high = costs[f"{name}.{below}"], costs[f"{name}.{above}"]
    if below == above:
        squared = SECOND_ORDER.get(name.removesuffix(".forward"), ())
        ratio = width / below
        return [cost * (ratio**2 if i in squared else ratio) for i, cost in enumerate(low)]
    share = math.log(width / below) / math.log(above / below)
    return [
        math.exp((1 - share) * math.log(a) + share * math.log(b)) if a and b else (1 - share) * a + share * b
        for a, b in zip(low, high, strict=True)
    ]


def padded_pairs(work: Work, kind: str) -> float:
    """Query-key pairs of one head as the CPU's attention pads them: by its own way of sorting into buckets.

    kind: encoder, decoder (self-attention, all of the square) or cross.
    """
    sides = {"encoder": ("encoder", "encoder"), "decoder": ("decoder", "decoder"), "cross": ("decoder", "encoder")}
    query, key = sides[kind]
    rows = []
    for each in work.examples:
        axes = {"encoder": (each.patches, each.source), "decoder": (0.0, each.target)}
        rows.append((each.code and kind != "encoder", axes[query], axes[key]))
    total = 0.0
    for code in (False, True):
        same = sorted((row[1:] for row in rows if row[0] == code), key=lambda row: (*row[1], *row[0]))
        total += _split(same) if same else 0.0
    return total


def _split(rows: list[tuple[tuple[float, float], tuple[float, float]]]) -> float:
    ahead, behind = _pairs(rows), _pairs(rows[::-1])[::-1]
    if len(rows) > 1:
        costs = [a + b + BUCKET_PAIRS for a, b in zip(ahead[:-1], behind[1:], strict=True)]
        cut = costs.index(min(costs)) + 1
        if costs[cut - 1] < ahead[-1]:
            return _split(rows[:cut]) + _split(rows[cut:])
    return ahead[-1]


def _pairs(rows: list[tuple[tuple[float, float], tuple[float, float]]]) -> list[float]:
    """Of the first 1, 2, ... rows in one bucket."""
    found, most = [], [0.0] * 4
    for count, (query, key) in enumerate(rows, 1):
        most = [max(pair) for pair in zip(most, (*query, *key), strict=True)]
        found.append((most[0] + most[1]) * (most[2] + most[3]) * count)
    return found

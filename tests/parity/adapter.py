"""From the fixtures' padded arrays to the model's packed batch and back, weights by rule, and the micro configurations."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ofa_ds.data.batch import Batch
from ofa_ds.model.config import ModelConfig, ResNetConfig, ViTConfig

PAD = 1
ALIASES = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")

MICRO = ModelConfig(
    dim=32, ffn_dim=64, num_heads=4, encoder_layers=2, decoder_layers=2, backbone=ResNetConfig(depths=(1, 2, 1)),
    vocab_size=309, max_positions=64, token_bucket_size=8, image_bucket_size=6, code_image_size=32,
)  # fmt: skip
MICRO_VIT = ViTConfig(resolution=224, patch_size=16, channels=32, layers=2, heads=4)
MICRO_6B_VIT = ViTConfig(resolution=56, patch_size=14, channels=32, layers=2, heads=4)


@dataclass(frozen=True)
class Padded:
    """Where the packed tokens are in the fixture's padded arrays (rows of [B, S] and [B, L] flattened)."""

    encoder: Tensor
    decoder: Tensor
    num_examples: int


def pack_padded(
    inputs: Mapping[str, np.ndarray],
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    patch_orders: np.ndarray | None = None,
) -> tuple[Batch, Padded]:
    """The packed batch of a fixture's `in/*` arrays (names without the prefix), pads dropped.

    An image whose patch mask is False is passed, and no token refers to it. A row without any previous token that is
    not pad keeps its length: targets decide nothing here.
    """
    source = torch.from_numpy(np.asarray(inputs["src_tokens"]))
    previous = torch.from_numpy(np.asarray(inputs["prev_output_tokens"]))
    target = torch.from_numpy(np.asarray(inputs["target"])) if "target" in inputs else torch.full_like(previous, PAD)
    num_examples = len(source)
    images: dict[str, tuple[Tensor, ...]] = {"images": (), "image_holes": (), "image_weight": ()}
    patches = [np.zeros(0, np.int64)] * num_examples
    width, per_image, max_patches = 1, 0, 0
    if "patch_images" in inputs:
        pixels = torch.from_numpy(np.asarray(inputs["patch_images"])).to(dtype)
        height, width = (-(-side // config.patch_size) if isinstance(config.backbone, ResNetConfig) else side // config.patch_size
                         for side in pixels.shape[2:])  # fmt: skip
        per_image = max_patches = height * width
        if patch_orders is not None:
            max_patches = patch_orders.shape[1]
        images = {
            "images": (pixels,),
            "image_holes": (torch.zeros(num_examples, 4, dtype=torch.int32),),
            "image_weight": (torch.ones(num_examples),),
        }
        for e in np.flatnonzero(inputs["patch_masks"]):
            patches[e] = np.arange(per_image) if patch_orders is None else patch_orders[e]
    source_length = [int((row != PAD).sum()) for row in source]
    decoder_length = [_length(row) for row in previous]
    lengths = [len(p) + t for p, t in zip(patches, source_length, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cell = np.concatenate(patches)
    batch = Batch(
        **images,
        patch_index=_ids(np.concatenate([e * per_image + patches[e] for e in range(num_examples)])),
        patch_position=_ids(cell // width * config.image_bucket_size + cell % width + 1),
        patch_slot=_ids(np.concatenate([offsets[e] + np.arange(len(patches[e])) for e in range(num_examples)])),
        source_tokens=source[source != PAD],
        source_position=_ids(np.concatenate([np.arange(t) for t in source_length])),
        source_slot=_ids(
            np.concatenate([offsets[e] + len(patches[e]) + np.arange(t) for e, t in enumerate(source_length)])
        ),
        encoder_offsets=torch.from_numpy(offsets.astype(np.int32)),
        num_patches=torch.tensor([len(p) for p in patches], dtype=torch.int32),
        decoder_tokens=torch.cat([row[:n] for row, n in zip(previous, decoder_length, strict=True)]),
        decoder_position=_ids(np.concatenate([np.arange(n) for n in decoder_length])),
        decoder_offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(decoder_length)]).astype(np.int32)),
        targets=torch.cat([row[:n] for row, n in zip(target, decoder_length, strict=True)]),
        loss_weight=torch.ones(sum(decoder_length)),
        code_mask=torch.from_numpy(np.asarray(inputs.get("code_masks", np.zeros(num_examples, bool)))),
        task=torch.zeros(num_examples, dtype=torch.int64),
        group=torch.zeros(num_examples, dtype=torch.int64),
    )
    num_slots = max_patches + source.shape[1]
    encoder = [
        e * num_slots + np.concatenate([np.arange(len(patches[e])), max_patches + np.arange(source_length[e])])
        for e in range(num_examples)
    ]
    decoder = [e * previous.shape[1] + np.arange(n) for e, n in enumerate(decoder_length)]
    return batch, Padded(_ids(np.concatenate(encoder)), _ids(np.concatenate(decoder)), num_examples)


def packed(array: np.ndarray, rows: Tensor) -> Tensor:
    """The rows of a padded array [B, S, ...] that are tokens."""
    flat = torch.from_numpy(np.ascontiguousarray(array))
    return flat.reshape(-1, *flat.shape[2:])[rows]


def rule_weight(name: str, shape: Iterable[int]) -> Tensor:
    """The documented weight of an official parameter or buffer name (golden/README.md), fp32."""
    shape = tuple(shape)
    z = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    norms = ("layer_norm", "layernorm", "_ln", "pos_ln", "bn1", "bn2", "bn3", "downsample.1", "ln_1", "ln_2", "ln_pre")
    if name.endswith("running_var"):
        value = 1 + 0.25 * np.abs(z)
    elif name.endswith("running_mean"):
        value = 0.1 * z
    elif name.endswith("c_attn"):
        value = 1 + 0.2 * z
    elif name.endswith("weight") and any(norm in name for norm in norms):
        value = 1 + 0.1 * z
    elif name.endswith("bias"):
        value = 0.1 * z
    elif len(shape) == 4:
        value = z * np.sqrt(2 / np.prod(shape[1:]))
    elif "rel_pos_table" in name or "embed" in name:
        value = 0.5 * z
    elif len(shape) == 2:
        value = z / np.sqrt(shape[1])
    else:
        value = 0.1 * z
    return torch.from_numpy(np.asarray(value, np.float32))


def load(model: nn.Module, weights: Mapping[str, np.ndarray] | None) -> None:
    """Set every parameter and floating-point buffer, from official names or by the rule (None)."""
    state = model.state_dict()
    used = {}
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        stored = rule_weight(name, value.shape) if weights is None else torch.from_numpy(np.asarray(weights[name]))
        used[name] = stored.to(value.dtype)
    model.load_state_dict({**state, **used})


def _length(row: Tensor) -> int:
    """Tokens before the trailing pads."""
    kept = (row != PAD).nonzero()
    return int(kept[-1]) + 1 if len(kept) else len(row)


def _ids(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))

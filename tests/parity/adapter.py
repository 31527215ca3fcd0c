"""From the fixtures' padded arrays to the model's packed batch and back, and the micro models with their weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ofa_ds.batch import Batch
from ofa_ds.model.config import ModelConfig, ResNetConfig, ViTConfig

PAD = 1
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

    An image whose patch mask is False is passed, and no token refers to it. patch_orders [B, k]: the patches drawn.
    """
    source, previous = (torch.from_numpy(inputs[name]) for name in ("src_tokens", "prev_output_tokens"))
    target = torch.from_numpy(inputs["target"]) if "target" in inputs else torch.full_like(previous, PAD)
    num_examples = len(source)
    images, patches, grid_width, per_image = _images(inputs, config, dtype, patch_orders)
    source_length = np.array([int((row != PAD).sum()) for row in source])
    decoder_length = np.array([_length(row) for row in previous])
    num_patches = np.array([len(cells) for cells in patches])
    offsets = np.concatenate([[0], np.cumsum(num_patches + source_length)])
    cells = np.concatenate(patches)
    batch = Batch(
        **images,
        patch_index=_ids(np.repeat(np.arange(num_examples) * per_image, num_patches) + cells),
        patch_position=_ids(cells // grid_width * config.image_bucket_size + cells % grid_width + 1),
        patch_slot=_ids(np.repeat(offsets[:-1], num_patches) + _counting(num_patches)),
        source_tokens=source[source != PAD],
        source_position=_ids(_counting(source_length)),
        source_slot=_ids(np.repeat(offsets[:-1] + num_patches, source_length) + _counting(source_length)),
        encoder_offsets=torch.from_numpy(offsets.astype(np.int32)),
        num_patches=torch.from_numpy(num_patches.astype(np.int32)),
        decoder_tokens=_trimmed(previous, decoder_length),
        decoder_position=_ids(_counting(decoder_length)),
        decoder_offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(decoder_length)]).astype(np.int32)),
        targets=_trimmed(target, decoder_length),
        loss_weight=torch.ones(int(decoder_length.sum())),
        code_mask=torch.from_numpy(np.asarray(inputs.get("code_masks", np.zeros(num_examples, bool)))),
        task=torch.zeros(num_examples, dtype=torch.int64),
        group=torch.zeros(num_examples, dtype=torch.int64),
    )
    max_patches = per_image if patch_orders is None else patch_orders.shape[1]
    slots = np.arange(num_examples) * (max_patches + source.shape[1])
    sizes = zip(slots, num_patches, source_length, strict=True)
    encoder = [slot + np.concatenate([np.arange(p), max_patches + np.arange(t)]) for slot, p, t in sizes]
    decoder = np.repeat(np.arange(num_examples) * previous.shape[1], decoder_length) + _counting(decoder_length)
    return batch, Padded(_ids(np.concatenate(encoder)), _ids(decoder), num_examples)


def _images(
    inputs: Mapping[str, np.ndarray], config: ModelConfig, dtype: torch.dtype, patch_orders: np.ndarray | None
) -> tuple[dict[str, tuple[Tensor, ...]], list[np.ndarray], int, int]:
    """(image fields of the batch, patches of each example, width of the grid, patches per image)."""
    num_examples = len(inputs["src_tokens"])
    patches = [np.zeros(0, np.int64)] * num_examples
    if "patch_images" not in inputs:
        return {"images": (), "image_holes": (), "image_weight": ()}, patches, 1, 0
    pixels = torch.from_numpy(inputs["patch_images"]).to(dtype)
    rounding = config.patch_size - 1 if isinstance(config.backbone, ResNetConfig) else 0  # ResNets round up
    height, width = ((side + rounding) // config.patch_size for side in pixels.shape[2:])
    for e in np.flatnonzero(inputs["patch_masks"]):
        patches[e] = np.arange(height * width) if patch_orders is None else patch_orders[e]
    holes, weight = torch.zeros(num_examples, 4, dtype=torch.int32), torch.ones(num_examples)
    return {"images": (pixels,), "image_holes": (holes,), "image_weight": (weight,)}, patches, width, height * width


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


def stored_weights(folder: Path, file: str) -> dict[str, np.ndarray] | None:
    """Weights that a set of fixtures carries, or None where the rule makes them."""
    path = folder / file
    if not path.is_file():
        return None
    return stored_arrays(path)


def stored_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of a fixture file, by name."""
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def load(model: nn.Module, weights: Mapping[str, np.ndarray] | None, rename: Callable[[str], str] = str) -> None:
    """Set every parameter and floating-point buffer from `weights`, or by the rule where that is None.

    rename: from the model's names to those of `weights` and the rule.
    """
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if value.is_floating_point():
                name = rename(name)
                value.copy_(rule_weight(name, value.shape) if weights is None else torch.from_numpy(weights[name]))


def _counting(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length, one run after another."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _trimmed(rows: Tensor, lengths: np.ndarray) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)])


def _length(row: Tensor) -> int:
    """Tokens before the trailing pads."""
    kept = (row != PAD).nonzero()
    return int(kept[-1]) + 1 if len(kept) else len(row)


def _ids(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.int64))

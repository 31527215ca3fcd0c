"""Sizes and switches of OFA. `preset("tiny")` is the official model of that name (docs/ofa.md, Model: sizes)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ofa_ds.config import KernelConfig, Recipe

VOCAB_SIZE = 59457
"""English OFA: 50265 text ids, 8192 image codes, 1000 coordinate bins."""

MAX_TOKEN_DISTANCE = 1024
"""Distances between text tokens from here on share the outermost buckets, whatever the size of the position table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetConfig:
    """First three stages of a bottleneck ResNet: 1024 channels at stride 16."""

    depths: tuple[int, int, int]
    patch_size: int = 16
    channels: int = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """The first layers of a CLIP tower, with one position row per patch of a `resolution` x `resolution` picture."""

    resolution: int
    patch_size: int
    channels: int
    layers: int
    heads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvConfig:
    """One strided convolution: the smallest stem that can see. Not an official one; nano's."""

    patch_size: int
    channels: int


Backbone = ResNetConfig | ViTConfig | ConvConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    dim: int
    ffn_dim: int
    num_heads: int
    encoder_layers: int
    decoder_layers: int
    backbone: Backbone
    vocab_size: int = VOCAB_SIZE

    max_positions: int = 1024
    """Longest text; the tables have two rows more."""
    token_bucket_size: int = 256
    """Relative positions of text: distances up to half of it have their own row, longer ones share rows."""
    image_bucket_size: int = 42
    """Largest grid of patches, per side."""
    code_image_size: int = 128
    """Side in pixels of the pictures whose codes are generated, one code per 8 x 8."""
    attn_scale_factor: float = 2.0
    interpolate_position: bool = False
    """Positions of a grid larger than `orig_patch_image_size` are resized from that grid's."""
    orig_patch_image_size: int = 256
    disable_entangle: bool = True
    """False adds the positions to the decoder's embeddings too (the original's meaning: docs/ofa.md, Model: layers)."""

    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    backbone_drop_path: float = 0.0
    batch_norm: Literal["frozen", "batch", "sync"] = "batch"
    batch_norm_eps: float = 1e-5
    activation_checkpointing: bool = False
    init_std: float = 0.02

    kernels: KernelConfig = KernelConfig()
    """Which operators run as Triton kernels. Does not change what the model computes."""

    use_ofasys: bool = False
    """The 6B's structure (docs/ofa.md, Model: 6B): positions without norm, no image codes in the decoder."""
    share_attn_bias: bool = False
    """OFASys: one relative table for all layers of a stack."""
    entangle_position_embedding: bool = False
    """OFASys: positions are added to the embeddings, attention has relative biases only."""
    gamma: float | None = None
    """OFASys: initial per-channel scale of each residual branch; None for no scales."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"model: want dim divisible by num_heads, got {self.dim} and {self.num_heads}")
        ofasys_only = (self.share_attn_bias, self.entangle_position_embedding, self.gamma is not None)
        if any(ofasys_only) and not self.use_ofasys:
            raise ValueError("model: share_attn_bias, entangle_position_embedding and gamma need use_ofasys = true")

    @property
    def patch_size(self) -> int:
        """Pixels per patch side."""
        return self.backbone.patch_size

    @property
    def adds_decoder_positions(self) -> bool:
        """Whether the decoder's embeddings hold the positions; OFASys looks at both flags, the original at one."""
        return not self.disable_entangle and (self.entangle_position_embedding or not self.use_ofasys)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def attention_scale(self) -> float:
        """Factor of both the content and the positional logits."""
        return (self.head_dim * self.attn_scale_factor) ** -0.5


_R50, _R101, _R152 = (ResNetConfig(depths=depths) for depths in ((3, 4, 6), (3, 4, 23), (3, 8, 36)))
_VIT_HUGE = ViTConfig(resolution=224, patch_size=14, channels=1280, layers=24, heads=16)

_NANO = ModelConfig(
    dim=128, ffn_dim=512, num_heads=4, encoder_layers=2, decoder_layers=2, init_std=128**-0.5,
    backbone=ConvConfig(patch_size=16, channels=128), max_positions=512, image_bucket_size=16, code_image_size=32,
)  # fmt: skip
_6B = ModelConfig(
    dim=2560, ffn_dim=10240, num_heads=32, encoder_layers=36, decoder_layers=24, backbone=_VIT_HUGE,
    orig_patch_image_size=224, disable_entangle=False, use_ofasys=True,
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "nano": _NANO,
    "tiny": ModelConfig(dim=256, ffn_dim=1024, num_heads=4, encoder_layers=4, decoder_layers=4, backbone=_R50),
    "medium": ModelConfig(dim=512, ffn_dim=2048, num_heads=8, encoder_layers=4, decoder_layers=4, backbone=_R101),
    "base": ModelConfig(dim=768, ffn_dim=3072, num_heads=12, encoder_layers=6, decoder_layers=6, backbone=_R101),
    "large": ModelConfig(dim=1024, ffn_dim=4096, num_heads=16, encoder_layers=12, decoder_layers=12, backbone=_R152),
    "huge": ModelConfig(dim=1280, ffn_dim=5120, num_heads=16, encoder_layers=24, decoder_layers=12, backbone=_R152),
    "6b": _6B,
    "6b_share_attn_bias": dataclasses.replace(_6B, share_attn_bias=True),
    "6b_share_attn_bias_entangle": dataclasses.replace(_6B, share_attn_bias=True, entangle_position_embedding=True),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named size, with fields replaced; a backbone may be given as a plain dict of its fields.

    Raises ValueError for an unknown name or field.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"model.preset: want one of {', '.join(PRESETS)}, got {name!r}{hint}")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"model.preset {name}: no field {', '.join(unknown)}; fields are {', '.join(sorted(known))}")
    if isinstance(overrides.get("backbone"), Mapping):
        overrides["backbone"] = backbone_from(overrides["backbone"])
    return dataclasses.replace(PRESETS[name], **overrides)


def backbone_from(values: Mapping[str, Any]) -> Backbone:
    """The backbone with these fields, found out by their names. Raises ValueError where there is none."""
    for kind in (ResNetConfig, ViTConfig, ConvConfig):
        if {field.name for field in dataclasses.fields(kind)} == values.keys():
            return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    raise ValueError(f"model.change.backbone: want the fields of a ResNet, a ViT or a convolution, got {dict(values)}")


def model_config(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """The preset, with the recipe's changes and regularisation. Raises ValueError where both set one field."""
    options = recipe.model
    run = {
        "vocab_size": vocab_size,
        "dropout": options.dropout,
        "attention_dropout": options.attention_dropout,
        "drop_path": options.drop_path,
        "activation_checkpointing": options.activation_checkpointing,
        "batch_norm": options.batch_norm,
        "code_image_size": recipe.data.code_image_size,
        "kernels": recipe.kernels,
    }
    if clash := sorted(run.keys() & options.change.keys()):
        raise ValueError(f"model.change sets {', '.join(clash)}, which the recipe has a place of its own for")
    return preset(options.preset, **options.change, **run)

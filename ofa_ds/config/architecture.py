"""Sizes and switches of OFA. `preset("tiny")` is the official model of that name; defaults are the original's.

A configuration checks itself when it is made, whoever makes it: a recipe, an import, a test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_type_hints

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, with_config
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from ofa_ds.config.values import STRICT, Count, Real, first_problem, nearest, shown

VOCAB_SIZE = 59457
"""English OFA: 50265 text ids, 8192 image codes, 1000 coordinate bins."""

MAX_TOKEN_DISTANCE = 1024
"""Distances between text tokens from here on share the outermost buckets, whatever the size of the position table."""

Kernel = Literal["auto", "triton", "torch"]
BatchNormMode = Literal["frozen", "batch", "sync"]
PixelNorm = Literal["half", "imagenet"]
Rate = Annotated[Real, Field(ge=0, lt=1)]
Width = Annotated[Count, Field(ge=1, le=2**20)]
Layers = Annotated[Count, Field(ge=1, le=1000)]
Pixels = Annotated[Count, Field(ge=1, le=2**16)]


@pydantic_dataclass(frozen=True, kw_only=True, config=STRICT)
class KernelConfig:
    """auto: Triton on a GPU, in 16 bits, where it pays, torch elsewhere; triton: always; torch: never."""

    attention: Kernel = "auto"
    layer_norm: Literal["auto", "triton", "torch", "apex"] = "auto"
    cross_entropy: Kernel = "auto"
    deterministic: bool = True
    """Gradients of convolutions with the same bits in every run, as all others have; false is faster."""


class _Checked:
    """Checks the values of its fields when it is made, then what they say together. Raises ValueError, one line."""

    __slots__ = ()
    _what: ClassVar[str]

    def __post_init__(self) -> None:
        cls = type(self)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(cls)}
        try:
            checked = _adapter(cls).validate_python(values)
        except ValidationError as error:
            raise ValueError(f"{cls._what}: {first_problem(error, without=STEMS)}") from error
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if problem := self._contradiction():
            raise ValueError(f"{cls._what}: {problem}")

    def _contradiction(self) -> str:
        """What two fields say against each other; empty where nothing."""
        return ""


@cache
def _adapter(cls: type[_Checked]) -> TypeAdapter[dict[str, Any]]:
    return TypeAdapter(fields_of(cls, total=True))


def fields_of(cls: type[_Checked], *, total: bool, without: Collection[str] = ()) -> type[TypedDict]:
    """The fields of a configuration as a dictionary's; total: all of them must be given."""
    hints = get_type_hints(cls, include_extras=True)
    named = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.name not in without}
    return with_config(STRICT)(TypedDict(f"{cls.__name__}Fields", named, total=total))


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetConfig(_Checked):
    """First three stages of a bottleneck ResNet: 1024 channels at stride 16."""

    _what = "ResNet"

    depths: tuple[Layers, Layers, Layers]
    patch_size: Literal[16] = 16
    channels: Literal[1024] = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig(_Checked):
    """The first layers of a CLIP tower, with one position row per patch of a `resolution` x `resolution` picture."""

    _what = "ViT"

    resolution: Pixels
    patch_size: Pixels
    channels: Width
    layers: Layers
    heads: Width

    def _contradiction(self) -> str:
        if self.channels % self.heads:
            return f"channels {self.channels} is not a multiple of heads {self.heads}"
        if self.resolution < self.patch_size:
            return f"resolution {self.resolution} is less than patch_size {self.patch_size}"
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvConfig(_Checked):
    """Strided convolutions: the smallest stem that can see. Not an official one; nano's."""

    _what = "convolutional stem"

    patch_size: Pixels
    channels: Width

    def _contradiction(self) -> str:
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            return f"patch_size {self.patch_size} is not a power of 2 from 2 on"
        if self.channels < self.patch_size // 2:  # each convolution is twice as wide as the one before
            return f"channels {self.channels} is less than half of patch_size {self.patch_size}"
        return ""


STEMS = {"resnet": ResNetConfig, "vit": ViTConfig, "conv": ConvConfig}
"""Names by which pydantic tells the backbones apart; they are in no recipe."""


def _stem(backbone: Any) -> str | None:
    """Which backbone a configuration, or a section by the names in it, is of."""
    for name, cls in STEMS.items():
        if isinstance(backbone, cls):
            return name
    if not isinstance(backbone, Mapping):
        return None
    if "depths" in backbone:
        return "resnet"
    return "vit" if {"resolution", "layers", "heads"} & backbone.keys() else "conv"


Backbone: TypeAlias = Annotated[
    Annotated[ResNetConfig, Tag("resnet")] | Annotated[ViTConfig, Tag("vit")] | Annotated[ConvConfig, Tag("conv")],
    Discriminator(
        _stem,
        custom_error_type="backbone",
        custom_error_message="want a section: depths for a ResNet; patch_size and channels for convolutions, and "
        "resolution, layers and heads for a ViT",
    ),
]


def backbone_from(values: Mapping[str, Any]) -> Backbone:
    """The backbone with these fields, found out by their names. Raises ValueError where there is none."""
    try:
        return TypeAdapter(Backbone).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"backbone: {first_problem(error, without=STEMS)}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(_Checked):
    _what = "model"

    dim: Width
    ffn_dim: Width
    num_heads: Width
    encoder_layers: Layers
    decoder_layers: Layers
    backbone: Backbone
    vocab_size: Annotated[Count, Field(ge=1, le=1 << 25)] = VOCAB_SIZE

    max_positions: Width = 1024
    """Longest text; the tables have two rows more."""
    token_bucket_size: Annotated[Count, Field(ge=2, le=2 * MAX_TOKEN_DISTANCE - 3)] = 256
    """Relative positions of text: distances up to half of it have their own row, longer ones share rows."""
    image_bucket_size: Annotated[Count, Field(ge=1, le=1024)] = 42
    """Largest grid of patches, per side."""
    code_image_size: Annotated[Pixels, Field(multiple_of=8)] = 128
    """Side in pixels of the pictures whose codes are generated, one code per 8 x 8."""
    attn_scale_factor: Annotated[Real, Field(gt=0)] = 2.0
    interpolate_position: bool = False
    """Positions of a grid larger than `orig_patch_image_size` are resized from that grid's."""
    orig_patch_image_size: Pixels = 256
    disable_entangle: bool = True
    """False adds the positions to the decoder's embeddings too (the original's meaning: docs/ofa.md, Model: layers)."""

    dropout: Rate = 0.0
    attention_dropout: Rate = 0.0
    drop_path: Rate = 0.0
    backbone_drop_path: Rate = 0.0
    batch_norm: BatchNormMode = "batch"
    pixel_norm: PixelNorm = "half"
    activation_checkpointing: bool = False
    init_std: Annotated[Real, Field(gt=0, le=10)] = 0.02

    kernels: KernelConfig = KernelConfig()
    """Which operators run as Triton kernels. Does not change what the model computes."""

    use_ofasys: bool = False
    """The 6B's structure (docs/ofa.md, Model: 6B): positions without norm, no image codes in the decoder."""
    share_attn_bias: bool = False
    """OFASys: one relative table for all layers of a stack."""
    entangle_position_embedding: bool = False
    """OFASys: positions are added to the embeddings, attention has relative biases only."""
    gamma: Annotated[Real, Field(gt=0)] | None = None
    """OFASys: initial per-channel scale of each residual branch; None for no scales."""

    def _contradiction(self) -> str:
        if self.dim % self.num_heads:
            return f"dim {self.dim} is not a multiple of num_heads {self.num_heads}"
        ofasys_only = (self.share_attn_bias, self.entangle_position_embedding, self.gamma is not None)
        if any(ofasys_only) and not self.use_ofasys:
            return "share_attn_bias, entangle_position_embedding and gamma need use_ofasys = true"
        native = self.orig_patch_image_size // self.patch_size
        if self.interpolate_position and not 1 <= native <= self.image_bucket_size:
            return (
                f"orig_patch_image_size {self.orig_patch_image_size} is {native} patches of {self.patch_size} pixels a "
                f"side, image_bucket_size {self.image_bucket_size} has room for 1 to {self.image_bucket_size}"
            )
        return ""

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


OWNED_BY_RECIPE = {
    "vocab_size": "data.vocab",
    "dropout": "model.dropout",
    "attention_dropout": "model.attention_dropout",
    "drop_path": "model.drop_path",
    "batch_norm": "model.batch_norm",
    "pixel_norm": "model.pixel_norm",
    "activation_checkpointing": "model.activation_checkpointing",
    "code_image_size": "data.code_image_size",
    "kernels": "[kernels]",
}
"""Fields that a recipe sets elsewhere than in model.change, and where."""

ModelChange = fields_of(ModelConfig, total=False, without=OWNED_BY_RECIPE)
"""What a recipe's model.change may hold."""

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


def _known(name: str) -> str:
    if name not in PRESETS:
        raise ValueError(f"want one of {', '.join(PRESETS)}, got {shown(name)}{nearest(name, PRESETS)}")
    return name


PresetName = Annotated[str, AfterValidator(_known)]


def preset(name: str, **changes: Any) -> ModelConfig:
    """The configuration of a named size, with fields replaced; a backbone may be given as a plain dict of its fields.

    Raises ValueError for an unknown name or field, or a wrong value.
    """
    try:
        _known(name)
    except ValueError as error:
        raise ValueError(f"model.preset: {error}") from error
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"model.preset {name}: no field {', '.join(unknown)}; fields are {', '.join(sorted(known))}")
    return dataclasses.replace(PRESETS[name], **changes)

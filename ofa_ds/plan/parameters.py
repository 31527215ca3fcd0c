"""Names and shapes of the parameters of a model, by arithmetic: `OFA(config).named_parameters()`, in that order.

A module's own parameters come before those of the modules in it. Nothing is built: 6B takes milliseconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import NamedTuple

from ofa_ds.config.architecture import ConvConfig, ModelConfig, ResNetConfig, ViTConfig

LEAF_CLASSES = ("EncoderLayer", "DecoderLayer")
"""What ds_configs/zero3*.json gathers whole."""

_MODULES = {
    "Encoder": r"encoder",
    "Decoder": r"decoder",
    "EncoderLayer": r"encoder\.layers\.\d+",
    "DecoderLayer": r"decoder\.layers\.\d+",
    "Attention": r"(?:encoder|decoder)\.layers\.\d+\.(?:self|encoder)_attn",
    "ResNet": r"encoder\.embed_images",
    "Bottleneck": r"encoder\.embed_images\.layer[123]\.\d+",
    "ConvStem": r"encoder\.embed_images",
    "ViT": r"encoder\.embed_images",
    "Transformer": r"encoder\.embed_images\.transformer",
    "Block": r"encoder\.embed_images\.transformer\.resblocks\.\d+",
    "SelfAttention": r"encoder\.embed_images\.transformer\.resblocks\.\d+\.attn",
    "Mlp": r"encoder\.embed_images\.transformer\.resblocks\.\d+\.mlp",
}
"""Classes of modules that hold others, and the names that modules of the class have."""

_BACKBONES = {ResNetConfig: "ResNet", ConvConfig: "ConvStem", ViTConfig: "ViT"}

_STAGE_CHANNELS, _EXPANSION = (64, 128, 256), 4

Named = Iterator[tuple[str, tuple[int, ...]]]


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    unit: str
    """The module whose call gathers it under ZeRO-3: that of a leaf class, else its own."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Its own module."""
        return self.name.rpartition(".")[0]


def parameters(config: ModelConfig, *, leaf_classes: Collection[str] = LEAF_CLASSES) -> list[Parameter]:
    """In the order of `named_parameters()`. Raises ValueError for a leaf class that the model cannot have."""
    return list(_parameters(config, tuple(leaf_classes)))


@lru_cache(16)  # a search for what fits plans the same model hundreds of times
def _parameters(config: ModelConfig, leaf_classes: tuple[str, ...]) -> tuple[Parameter, ...]:
    if unknown := sorted(set(leaf_classes) - _MODULES.keys()):
        raise ValueError(f"leaf module class {unknown[0]}: the model has none; classes are {', '.join(_MODULES)}")
    others = {"ResNet", "ConvStem", "ViT"} - {_BACKBONES[type(config.backbone)]}
    leaves = [re.compile(_MODULES[name]) for name in leaf_classes if name not in others]
    return tuple(Parameter(name, shape, _unit(name, leaves)) for name, shape in _named(config))


@lru_cache(16)
def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for _, shape in _named(config))


def _unit(name: str, leaves: list[re.Pattern[str]]) -> str:
    """The outermost module of a leaf class that holds it, else its own."""
    found = [match[0] for leaf in leaves if (match := leaf.match(name)) and name[match.end()] == "."]
    return min(found, key=len, default=name.rpartition(".")[0])


def _named(config: ModelConfig) -> Named:
    yield from _within("encoder", _encoder(config))
    yield from _within("decoder", _decoder(config))


def _within(prefix: str, named: Named) -> Named:
    return ((f"{prefix}.{name}", shape) for name, shape in named)


def _encoder(config: ModelConfig) -> Named:
    dim = config.dim
    yield "embed_tokens.weight", (config.vocab_size, dim)
    yield from _norm("layernorm_embedding", dim)
    yield "type_embedding.weight", (2, dim)
    yield from _within("embed_images", _backbone(config))
    yield from _linear("image_proj", config.backbone.channels, dim)
    yield from _norm("patch_layernorm_embedding", dim)
    yield "embed_positions.weight", (config.max_positions + 2, dim)
    yield "embed_image_positions.weight", (config.image_bucket_size**2 + 1, dim)
    if not config.use_ofasys:
        yield from _norm("pos_ln", dim)
    yield from _norm("image_pos_ln", dim)
    if not config.entangle_position_embedding:
        yield from _linear("pos_q_linear", dim, dim)
        yield from _linear("pos_k_linear", dim, dim)
    for i in range(config.encoder_layers):
        yield from _within(f"layers.{i}", _encoder_layer(config))
    yield from _norm("layer_norm", dim)
    yield from _tables(config, config.encoder_layers, "token", "image")


def _decoder(config: ModelConfig) -> Named:
    dim = config.dim
    yield from _norm("layernorm_embedding", dim)
    yield from _norm("code_layernorm_embedding", dim)
    yield "embed_positions.weight", (config.max_positions + 2, dim)
    yield from _tables(config, config.decoder_layers, "token")
    if config.use_ofasys:
        yield "type_embedding.weight", (1, dim)
    else:
        yield "embed_image_positions.weight", (config.image_bucket_size**2 + 1, dim)
        yield from _norm("pos_ln", dim)
        yield from _norm("image_pos_ln", dim)
        yield from _tables(config, config.decoder_layers, "image")
    own = () if config.entangle_position_embedding else ("self_pos_q_linear", "self_pos_k_linear")
    for name in (*own, "cross_pos_q_linear", "cross_pos_k_linear"):
        yield from _linear(name, dim, dim)
    for i in range(config.decoder_layers):
        yield from _within(f"layers.{i}", _decoder_layer(config))
    yield from _norm("layer_norm", dim)


def _tables(config: ModelConfig, layers: int, *kinds: str) -> Named:
    """Relative tables of the layers of a stack."""
    rows = {"token": 2 * config.token_bucket_size - 1, "image": (2 * config.image_bucket_size - 1) ** 2 + 3}
    for kind in kinds:
        for i in range(1 if config.share_attn_bias else layers):
            yield f"{kind}_rel_pos_table_list.{i}.weight", (rows[kind], config.num_heads)


def _encoder_layer(config: ModelConfig) -> Named:
    yield from _gammas(config, "weight_self_attn", "weight_ffn")
    yield from _feed_forward(config)
    yield from _within("self_attn", _attention(config))
    yield from _norm("self_attn_layer_norm", config.dim)
    yield from _norm("attn_ln", config.dim)


def _decoder_layer(config: ModelConfig) -> Named:
    yield from _gammas(config, "weight_self_attn", "weight_cross_attn", "weight_ffn")
    yield from _feed_forward(config)
    yield from _within("self_attn", _attention(config))
    yield from _within("encoder_attn", _attention(config))
    for name in ("self_attn_layer_norm", "self_attn_ln", "encoder_attn_layer_norm", "cross_attn_ln"):
        yield from _norm(name, config.dim)


def _gammas(config: ModelConfig, *names: str) -> Named:
    return ((name, (config.dim,)) for name in names if config.gamma is not None)


def _feed_forward(config: ModelConfig) -> Named:
    yield from _linear("fc1", config.dim, config.ffn_dim)
    yield from _linear("fc2", config.ffn_dim, config.dim)
    yield from _norm("ffn_layernorm", config.ffn_dim)
    yield from _norm("final_layer_norm", config.dim)


def _attention(config: ModelConfig) -> Named:
    yield "c_attn", (config.num_heads,)
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield from _linear(name, config.dim, config.dim)


def _backbone(config: ModelConfig) -> Named:
    backbone = config.backbone
    if isinstance(backbone, ConvConfig):
        return _conv_stem(backbone)
    if isinstance(backbone, ViTConfig):
        return _vit(backbone)
    return _resnet(backbone, norms=config.batch_norm != "frozen")


def conv_widths(backbone: ConvConfig) -> list[int]:
    """Channels before and after each convolution of the small stem."""
    convs = backbone.patch_size.bit_length() - 1
    return [3, *(backbone.channels >> (convs - 1 - i) for i in range(convs))]


def _conv_stem(backbone: ConvConfig) -> Named:
    widths = conv_widths(backbone)
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        yield f"convs.{i}.weight", (after, before, 3, 3)
        yield f"convs.{i}.bias", (after,)


def _vit(backbone: ViTConfig) -> Named:
    width, patch = backbone.channels, backbone.patch_size
    yield "positional_embedding", ((backbone.resolution // patch) ** 2 + 1, width)
    yield "conv1.weight", (width, 3, patch, patch)
    yield from _norm("ln_pre", width)
    for i in range(backbone.layers):
        block = f"transformer.resblocks.{i}"
        yield f"{block}.attn.in_proj_weight", (3 * width, width)
        yield f"{block}.attn.in_proj_bias", (3 * width,)
        yield from _linear(f"{block}.attn.out_proj", width, width)
        yield from _norm(f"{block}.ln_1", width)
        yield from _linear(f"{block}.mlp.c_fc", width, 4 * width)
        yield from _linear(f"{block}.mlp.c_proj", 4 * width, width)
        yield from _norm(f"{block}.ln_2", width)


class Convolution(NamedTuple):
    """Of a ResNet, without bias."""

    name: str
    norm: str
    """Name of the batch norm behind it."""
    inputs: int
    outputs: int
    kernel: int
    stride: int
    reads: str = ""
    """Name of the convolution behind whose output it stands; empty for the one before it in the list."""


def resnet_convolutions(backbone: ResNetConfig) -> list[Convolution]:
    """In the order of the parameters: conv1, conv2, conv3 of each block, then the shortcut's, if it has one."""
    found = [Convolution("conv1", "bn1", 3, _STAGE_CHANNELS[0], 7, 2)]
    before, last = _STAGE_CHANNELS[0], "conv1"
    for stage, (channels, depth) in enumerate(zip(_STAGE_CHANNELS, backbone.depths, strict=True)):
        out = channels * _EXPANSION
        for i in range(depth):
            block, stride = f"layer{stage + 1}.{i}", 2 if stage and not i else 1
            for k, (inputs, outputs, kernel) in enumerate(
                ((before, channels, 1), (channels, channels, 3), (channels, out, 1)), 1
            ):
                step = stride if k == 2 else 1
                reads = last if k == 1 else ""
                found.append(Convolution(f"{block}.conv{k}", f"{block}.bn{k}", inputs, outputs, kernel, step, reads))
            if stride != 1 or before != out:
                names = f"{block}.downsample.0", f"{block}.downsample.1"
                found.append(Convolution(*names, before, out, 1, stride, last))
            before, last = out, f"{block}.conv3"
    return found


def _resnet(backbone: ResNetConfig, *, norms: bool) -> Named:
    for conv in resnet_convolutions(backbone):
        yield f"{conv.name}.weight", (conv.outputs, conv.inputs, conv.kernel, conv.kernel)
        if norms:
            yield from _norm(conv.norm, conv.outputs)


def _linear(name: str, inputs: int, outputs: int) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)

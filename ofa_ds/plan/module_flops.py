"""The generator behind `ofa_ds.plan.flops`: one entry for each product, convolution and attention of a forward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from ofa_ds.config.architecture import ConvConfig, ModelConfig, ResNetConfig, ViTConfig
from ofa_ds.plan.parameters import conv_widths, resnet_convolutions
from ofa_ds.plan.vocabulary import DEVICE_SHARE, PAYS_TOKENS, tile_shape
from ofa_ds.plan.work import ImageGroup

Kind = Literal["matmul", "attention", "conv", "vocabulary"]
KEPT_LOGITS = 3 * (6 << 20)
"""Logits from which on the loss makes them again in the backward (`ofa_kernels.cross_entropy`: three chunks)."""


class ModuleFlops(NamedTuple):
    """Of one micro-batch. m, n, k: of the forward's product; of attention: queries, keys that one sees, channels."""

    name: str
    """The module's, of the model's names; positional logits: the stack's with `.position_logits` behind it."""
    forward: float
    backward: float
    recomputed: float
    kind: Kind
    m: float
    n: float
    k: float

    @property
    def useful(self) -> float:
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        return self.useful + self.recomputed


class Sums(NamedTuple):
    """What the cost of a micro-batch is linear in, beside its pictures. Pairs are of one head."""

    patches: float = 0.0
    encoder: float = 0.0
    """Tokens, patches included."""
    decoder: float = 0.0
    memory: float = 0.0
    """Encoder tokens that the decoder's examples read: `encoder`, but for runs that share one."""
    counted: float = 0.0
    encoder_pairs: float = 0.0
    decoder_pairs: float = 0.0
    cross_pairs: float = 0.0
    encoder_positions: float = 0.0
    """Distinct."""
    decoder_positions: float = 0.0
    encoder_position_pairs: float = 0.0
    decoder_position_pairs: float = 0.0
    cross_position_pairs: float = 0.0


class How(NamedTuple):
    config: ModelConfig
    on_gpu: bool
    stage: int
    frozen_embedding: bool
    gpu_bytes: float

    def last_again(self, drop_path: float) -> bool:
        """Whether the last product of a layer with this drop-path is computed twice.

        torch ends the second forward where all is there that the backward reads: the last product's output is read by
        dropout, scale and drop-path alone. DeepSpeed's linear layer under stage 3 saves its input after it.
        """
        config = self.config
        reads = config.dropout > 0 or config.gamma is not None or drop_path > 0
        return config.activation_checkpointing and (self.stage == 3 or reads)


def modules(how: How, sums: Sums, images: Sequence[ImageGroup]) -> Iterator[ModuleFlops]:
    config, dim = how.config, how.config.dim
    if images:
        yield from _backbone(config, images)
    yield _linear("encoder.image_proj", sums.patches, config.backbone.channels, dim)
    yield from _positions(how, sums)
    layers = config.encoder_layers
    for i in range(layers):
        name = f"encoder.layers.{i}"
        yield from _attention(f"{name}.self_attn", how, sums.encoder, sums.encoder, sums.encoder_pairs)
        yield from _feed_forward(name, how, sums.encoder, i / max(layers - 1, 1))
    layers = config.decoder_layers
    for i in range(layers):
        name = f"decoder.layers.{i}"
        yield from _attention(f"{name}.self_attn", how, sums.decoder, sums.decoder, sums.decoder_pairs)
        yield from _attention(f"{name}.encoder_attn", how, sums.decoder, sums.memory, sums.cross_pairs)
        yield from _feed_forward(name, how, sums.decoder, i / max(layers - 1, 1))
    yield _vocabulary(how, sums.counted)


def _vocabulary(how: How, tokens: float) -> ModuleFlops:
    """Logits are made again but for those that fit the kept tile, or where plain torch has them in one chunk."""
    vocab, dim = how.config.vocab_size, how.config.dim
    forward = 2.0 * tokens * vocab * dim
    several = tokens * vocab > KEPT_LOGITS
    again = forward if several else 0.0
    if how.on_gpu and (several or tokens >= PAYS_TOKENS):
        number = max(round(tokens), 1)
        rows, columns = tile_shape(number, vocab, dim, 2, int(how.gpu_bytes) // DEVICE_SHARE)
        again = forward * (1 - _last(number, rows) * _last(vocab, columns) / (number * vocab))
    backward = forward if how.frozen_embedding else 2 * forward
    return ModuleFlops("encoder.embed_tokens", forward, backward, again, "vocabulary", tokens, vocab, dim)


def _last(total: int, part: int) -> int:
    """Length of the last part."""
    return total - (-(-total // part) - 1) * part


def _linear(
    name: str, rows: float, inputs: int, outputs: int, *, again: bool = False, reaches_input: bool = True
) -> ModuleFlops:
    """again: the forward is computed twice. reaches_input: its input has a gradient."""
    forward = 2.0 * rows * inputs * outputs
    backward = 2 * forward if reaches_input else forward
    return ModuleFlops(name, forward, backward, forward if again else 0.0, "matmul", rows, outputs, inputs)


def _feed_forward(name: str, how: How, rows: float, depth: float) -> Iterator[ModuleFlops]:
    config = how.config
    yield _linear(f"{name}.fc1", rows, config.dim, config.ffn_dim, again=config.activation_checkpointing)
    last_again = how.last_again(depth * config.drop_path)
    yield _linear(f"{name}.fc2", rows, config.ffn_dim, config.dim, again=last_again)


def _attention(name: str, how: How, queries: float, keys: float, pairs: float) -> Iterator[ModuleFlops]:
    config, again = how.config, how.config.activation_checkpointing
    for part, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys), ("out_proj", queries)):
        yield _linear(f"{name}.{part}", rows, config.dim, config.dim, again=again)
    product = 2.0 * pairs * config.dim
    more = 0
    forward_products = 2
    if how.on_gpu:
        positions = int(not config.entangle_position_embedding)
        forward_products += positions
        # the kernels make logits twice more and the probabilities' gradient once more, and each positional product
        more = positions + 3 + 4 * positions
        if positions and config.head_dim > 96:  # keys' gradients in two passes (attention_triton.Form.key_passes)
            more += 3
    more += forward_products if again else 0
    shape = queries, pairs / queries if queries else 0.0, config.dim
    yield ModuleFlops(name, 2 * product, 4 * product, more * product, "attention", *shape)


def _positions(how: How, sums: Sums) -> Iterator[ModuleFlops]:
    """Projections of the distinct positions, and their logits.

    The kernels make no such logits, but those of every pair of tokens in every layer: these then are taken off again.
    """
    config = how.config
    if config.entangle_position_embedding:
        return
    own, other, dim = sums.encoder_positions, sums.decoder_positions, config.dim
    for name, rows in (
        ("encoder.pos_q_linear", own), ("encoder.pos_k_linear", own), ("decoder.self_pos_q_linear", other),
        ("decoder.self_pos_k_linear", other), ("decoder.cross_pos_q_linear", other),
        ("decoder.cross_pos_k_linear", own),
    ):  # fmt: skip
        yield _linear(name, rows, dim, dim)
    for stack, pairs, queries in (
        ("encoder", sums.encoder_position_pairs, own),
        ("decoder", sums.decoder_position_pairs + sums.cross_position_pairs, other),
    ):
        product = 2.0 * pairs * dim
        shape = queries, pairs / queries if queries else 0.0, dim
        instead = -3 * product if how.on_gpu else 0.0
        yield ModuleFlops(f"{stack}.position_logits", product, 2 * product, instead, "attention", *shape)


class _Places(NamedTuple):
    """Pixels, patches or pairs over all pictures."""

    real: float
    stand_in: float


def _places(images: Sequence[ImageGroup], areas: Sequence[float]) -> _Places:
    pairs = list(zip(images, areas, strict=True))
    return _Places(
        sum((group.count - group.stand_ins) * area for group, area in pairs),
        sum(group.stand_ins * area for group, area in pairs),
    )


def _backbone(config: ModelConfig, images: Sequence[ImageGroup]) -> Iterator[ModuleFlops]:
    backbone = config.backbone
    if isinstance(backbone, ViTConfig):
        yield from _vit(backbone, images)
    elif isinstance(backbone, ConvConfig):
        yield from _conv_stem(backbone, images)
    else:
        yield from _resnet(backbone, images)


def _seen(
    name: str, kind: Kind, places: _Places, inputs: int, outputs: int, *, reaches_input: bool = True
) -> ModuleFlops:
    """A product over pictures; what stand-ins cost is no use."""
    real = _linear(name, places.real, inputs, outputs, reaches_input=reaches_input)
    stand_in = _linear(name, places.stand_in, inputs, outputs, reaches_input=reaches_input)
    return real._replace(kind=kind, recomputed=stand_in.useful, m=places.real + places.stand_in)


def _conv_stem(backbone: ConvConfig, images: Sequence[ImageGroup]) -> Iterator[ModuleFlops]:
    sizes = [(each.height, each.width) for each in images]
    widths = conv_widths(backbone)
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        sizes = [_size(size, 3, 2) for size in sizes]
        places = _places(images, [math.prod(size) for size in sizes])
        yield _seen(f"encoder.embed_images.convs.{i}", "conv", places, before * 9, after, reaches_input=i > 0)


def _resnet(backbone: ResNetConfig, images: Sequence[ImageGroup]) -> Iterator[ModuleFlops]:
    sizes: dict[str, list[tuple[int, int]]] = {}
    before = ""
    for conv in resnet_convolutions(backbone):
        read = sizes[conv.reads or before] if sizes else [(each.height, each.width) for each in images]
        out = [_size(size, conv.kernel, conv.stride) for size in read]
        places = _places(images, [math.prod(size) for size in out])
        inputs = conv.inputs * conv.kernel**2
        reaches_input = bool(sizes)
        yield _seen(
            f"encoder.embed_images.{conv.name}", "conv", places, inputs, conv.outputs, reaches_input=reaches_input
        )
        sizes[conv.name] = out if reaches_input else [_size(size, 3, 2) for size in out]  # the first one's is pooled
        before = conv.name


def _vit(backbone: ViTConfig, images: Sequence[ImageGroup]) -> Iterator[ModuleFlops]:
    width, patch, name = backbone.channels, backbone.patch_size, "encoder.embed_images"
    areas = [(each.height // patch) * (each.width // patch) for each in images]
    places = _places(images, areas)
    pairs = _places(images, [area**2 for area in areas])
    yield _seen(f"{name}.conv1", "conv", places, 3 * patch**2, width, reaches_input=False)
    product, stand_in = 2.0 * pairs.real * width, 2.0 * pairs.stand_in * width
    rows = places.real + places.stand_in
    seen = (pairs.real + pairs.stand_in) / rows if rows else 0.0
    for i in range(backbone.layers):
        block = f"{name}.transformer.resblocks.{i}"
        yield _seen(f"{block}.attn", "matmul", places, width, 3 * width)
        again = product + 7 * stand_in  # torch's attention makes its logits again, on a CPU as on a GPU
        yield ModuleFlops(f"{block}.attn", 2 * product, 4 * product, again, "attention", rows, seen, width)
        for part, inputs, outputs in (
            ("attn.out_proj", width, width), ("mlp.c_fc", width, 4 * width), ("mlp.c_proj", 4 * width, width)
        ):  # fmt: skip
            yield _seen(f"{block}.{part}", "matmul", places, inputs, outputs)


def _size(size: tuple[int, int], kernel: int, stride: int) -> tuple[int, int]:
    """Of a convolution's output, with kernel // 2 of padding."""
    height, width = ((side + 2 * (kernel // 2) - kernel) // stride + 1 for side in size)
    return height, width

"""The image backbones as `ofa_ds.plan.tape` sees them. Legend: I images, C channels, h w height and width."""

from __future__ import annotations

from ofa_ds.config.architecture import ConvConfig, ModelConfig, ResNetConfig, ViTConfig
from ofa_ds.plan.operators import WORKSPACE, Grads, Operators
from ofa_ds.plan.tape import Buffer, Value
from ofa_ds.plan.work import ImageGroup

_STAGE_CHANNELS, _EXPANSION, _MLP = (64, 128, 256), 4, 4


def features(ops: Operators, config: ModelConfig, group: ImageGroup, module: str) -> Value:
    """[I, C, h / patch, w / patch] of a group of pictures."""
    tape, backbone = ops.tape, config.backbone
    pixels = tape.value(group.count * 3 * group.height * group.width)
    bodies = {ResNetConfig: _resnet, ViTConfig: _vit, ConvConfig: _convolutions}
    body = bodies[type(backbone)]
    return tape.call(module, lambda x: [body(ops, config, x, group, module)], pixels)[0]


def _convolution(ops: Operators, x: Value, module: str, elements: float) -> Value:
    """Without a bias or with one."""
    tape, whole, needs = ops.tape, x.elements, x.node is not None
    leaves = [leaf for leaf in (ops.leaf(f"{module}.weight"), ops.leaf(f"{module}.bias")) if leaf is not None]

    def body(x: Value) -> list[Value]:
        def run(gradient: Buffer) -> Grads:
            return [tape.new(whole) if needs else None, *(tape.of_parameter(leaf) for leaf in leaves)]

        return tape.op([x, *leaves], [(elements, tape.width)], run, save=[x.buffer], first=True)

    return tape.call(module, body, x)[0]


def _batch_norm(ops: Operators, x: Value, module: str, relu: bool = False) -> Value:
    """relu: in place."""
    tape, elements, needs = ops.tape, x.elements, x.node is not None
    leaves = [leaf for leaf in (ops.leaf(f"{module}.weight"), ops.leaf(f"{module}.bias")) if leaf is not None]

    def body(x: Value) -> list[Value]:
        def run(gradient: Buffer) -> Grads:
            return [tape.new(elements) if needs else None, *(tape.of_parameter(leaf) for leaf in leaves)]

        out = tape.op([x, *leaves], [(elements, tape.width)], run, save=[x.buffer])[0]
        return [_relu(ops, out)] if relu else [out]

    return tape.call(module, body, x)[0]


def _relu(ops: Operators, x: Value) -> Value:
    tape, elements = ops.tape, x.elements
    return tape.op([x], [x], lambda g: [tape.new(elements)], saves_outputs=[0])[0]


def _drop_path(ops: Operators, x: Value, module: str, drops: bool) -> Value:
    return ops.tape.call(module, lambda x: [ops.pointwise(x) if drops else x], x)[0]


def _resnet(ops: Operators, config: ModelConfig, x: Value, group: ImageGroup, module: str) -> Value:
    tape, count = ops.tape, group.count
    height, width = -(-group.height // 2), -(-group.width // 2)
    x = tape.value(x.elements)  # channels last: a copy
    x = _convolution(ops, x, f"{module}.conv1", count * 64 * height * width)
    x = _batch_norm(ops, x, f"{module}.bn1", relu=True)
    height, width, before = -(-height // 2), -(-width // 2), x.elements
    pooled = count * 64 * height * width
    places = tape.new(pooled, 8)
    x = tape.op([x], [(pooled, tape.width)], lambda g: [tape.new(before)], save=[x.buffer, places])[0]
    del places
    channels_in = _STAGE_CHANNELS[0]
    for i, (channels, depth) in enumerate(zip(_STAGE_CHANNELS, config.backbone.depths, strict=True)):
        for block in range(depth):
            name, stride = f"{module}.layer{i + 1}.{block}", 2 if i and not block else 1
            sizes = (count * height * width, channels, channels_in, stride)
            drops = config.backbone_drop_path * block / max(depth - 1, 1) > 0
            height, width = -(-height // stride), -(-width // stride)
            after = count * height * width

            def body(x: Value, name: str = name, sizes=sizes, after: float = after, drops: bool = drops) -> list[Value]:
                return [_bottleneck(ops, x, name, sizes, after, drops)]

            x = tape.call(name, body, x)[0]
            channels_in = channels * _EXPANSION
    return x


def _bottleneck(
    ops: Operators, x: Value, name: str, sizes: tuple[float, int, int, int], pixels: float, drops: bool
) -> Value:
    before, channels, channels_in, stride = sizes
    out = _batch_norm(ops, _convolution(ops, x, f"{name}.conv1", before * channels), f"{name}.bn1", relu=True)
    out = _batch_norm(ops, _convolution(ops, out, f"{name}.conv2", pixels * channels), f"{name}.bn2", relu=True)
    wide = pixels * channels * _EXPANSION
    out = _batch_norm(ops, _convolution(ops, out, f"{name}.conv3", wide), f"{name}.bn3")
    out = _drop_path(ops, out, f"{name}.drop_path", drops)
    if stride != 1 or channels_in != channels * _EXPANSION:
        x = _batch_norm(ops, _convolution(ops, x, f"{name}.downsample.0", wide), f"{name}.downsample.1")
    return _relu(ops, ops.sum(out, x))


def _convolutions(ops: Operators, config: ModelConfig, x: Value, group: ImageGroup, module: str) -> Value:
    height, width, count = group.height, group.width, config.backbone.patch_size.bit_length() - 1
    x = ops.tape.value(x.elements)
    for i in range(count):
        height, width = -(-height // 2), -(-width // 2)
        channels = config.backbone.channels >> (count - 1 - i)
        x = _convolution(ops, x, f"{module}.convs.{i}", group.count * channels * height * width)
        if i + 1 < count:
            x = ops.pointwise(x, save_output=True)
    return x


def _vit(ops: Operators, config: ModelConfig, x: Value, group: ImageGroup, module: str) -> Value:
    tape, backbone = ops.tape, config.backbone
    patches = (group.height // backbone.patch_size) * (group.width // backbone.patch_size)
    elements = group.count * patches * backbone.channels
    x = _convolution(ops, x, f"{module}.conv1", elements)
    table = ops.leaf(f"{module}.positional_embedding")

    def body(x: Value) -> list[Value]:
        return tape.op([x, table], [(elements, tape.width)], lambda g: [g, tape.of_parameter(table)])

    x = body(x)[0]
    x = ops.norm(x, f"{module}.ln_pre")
    return tape.call(f"{module}.transformer", lambda x: [_blocks(ops, config, x, f"{module}.transformer")], x)[0]


def _blocks(ops: Operators, config: ModelConfig, x: Value, module: str) -> Value:
    for i in range(config.backbone.layers):
        name = f"{module}.resblocks.{i}"
        x = ops.tape.call(name, lambda x, name=name: [_block(ops, config, x, name)], x)[0]
    return x


def _block(ops: Operators, config: ModelConfig, x: Value, name: str) -> Value:
    drops = config.backbone_drop_path > 0
    attended = ops.tape.call(f"{name}.attn", lambda x: [_attention(ops, config, x, f"{name}.attn")],
                             ops.norm(x, f"{name}.ln_1"))[0]  # fmt: skip
    attended = _drop_path(ops, attended, f"{name}.drop_path", drops)
    x = ops.sum(x, attended)
    del attended
    mlp = f"{name}.mlp"
    out = ops.tape.call(mlp, lambda x: [_mlp(ops, x, mlp)], ops.norm(x, f"{name}.ln_2"))[0]
    return ops.sum(x, _drop_path(ops, out, f"{name}.drop_path", drops))


def _attention(ops: Operators, config: ModelConfig, x: Value, name: str) -> Value:
    """Flash attention: q, k, v are one storage, out and the sums of exponentials are kept beside it."""
    tape, elements = ops.tape, x.elements
    rows = elements / config.backbone.channels
    qkv = ops.product(x, f"{name}.in_proj_weight", f"{name}.in_proj_bias")

    sums = tape.new(rows * config.backbone.heads, 4)
    parts = tape.op([qkv], [qkv] * 3, lambda *gradients: [tape.new(3 * elements)])
    del qkv

    def run(gradient: Buffer) -> Grads:
        scratch = tape.new(elements, 4, WORKSPACE) if tape.workspace else None  # dq is summed in fp32
        gradients = [tape.new(elements) for _ in range(3)]
        del scratch
        return gradients

    out = tape.op(parts, [(elements, tape.width)], run, save=[parts[0].buffer, sums], saves_outputs=[0])[0]
    del sums, parts
    return ops.linear(out, f"{name}.out_proj")


def _mlp(ops: Operators, x: Value, name: str) -> Value:
    tape, hidden = ops.tape, ops.linear(x, f"{name}.c_fc")
    elements = hidden.elements
    scaled = tape.op([hidden], [(elements, tape.width)], lambda g: [tape.new(elements)])[0]
    gate = ops.pointwise(scaled, save_output=True)
    del scaled

    def run(gradient: Buffer) -> Grads:
        return [tape.new(elements), tape.new(elements)]

    out = tape.op([hidden, gate], [(elements, tape.width)], run, save=[hidden.buffer, gate.buffer], first=True)[0]
    del hidden, gate
    return ops.linear(out, f"{name}.c_proj")

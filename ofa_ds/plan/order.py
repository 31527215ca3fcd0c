"""In which order DeepSpeed's ZeRO-3 meets the modules of a step: fetches, releases and finished gradients.

Forward is the model's own order of calls. Autograd goes through what it recorded strictly backwards, so the order of
the backward is that of the forward reversed: a module begins where its output was made and ends where its inputs came
in. It ends at all only if an input has a gradient, and if it is the last of its calls in the forward: DeepSpeed counts
the inputs of one call at a time. tests/distributed/test_traffic.py compares it with real ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ofa_ds.config.architecture import ConvConfig, ModelConfig, ResNetConfig, ViTConfig
from ofa_ds.plan.parameters import Parameter, parameters

Kind = Literal["fetch", "release", "gradient", "reduce"]
WITHOUT_MODULES = ("TokenEmbedding", "LayerNorm", "GeluLayerNorm", "Linear", "Embedding", "BatchNorm", "Conv2d")
"""Classes of modules that hold no others: being a leaf changes nothing for them."""


class Event(NamedTuple):
    kind: Kind
    """fetch: before a call, forward or backward; release: after it; gradient: a parameter's is complete; reduce: a sum
    over ranks of the backbone's own (synchronous batch norm)."""
    name: str
    """Of a module, or of a parameter. For reduce: how many elements."""
    backward: bool
    again: bool = False
    """Of a layer that is computed again in the backward."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module, or a use of parameters (then `uses` alone), in the order of the forward."""

    name: str = ""
    inside: tuple[Call, ...] = ()
    uses: tuple[str, ...] | None = None
    inputs: int = 1
    """How many tensors with a gradient come in; 0: it has no end in the backward."""
    outputs: int = 1
    """Of how many outputs a gradient comes back."""
    recomputed: bool = False
    """Activation checkpointing: computed again in the backward."""
    first_saved: str = ""
    """Module in it from whose backward on something saved is wanted: where computing again begins, and ends."""
    reduces: int = 0
    """Elements of a sum over ranks in it, forward and backward."""


class Order:
    """The modules of a model, and what each of them owns."""

    def __init__(
        self, config: ModelConfig, leaf_classes: Collection[str], *, image_groups: int, checkpointing: bool,
        stage: int = 3,
    ) -> None:  # fmt: skip
        """image_groups: how often the backbone is called."""
        self.config, self.checkpointing = config, checkpointing
        classes = [name for name in leaf_classes if name not in WITHOUT_MODULES]
        self.parameters: list[Parameter] = parameters(config, leaf_classes=classes)
        self._bias_first = set() if stage == 3 else _linear_modules(self.parameters)
        """Modules whose bias has its gradient before the weight; DeepSpeed's own linear layer of stage 3 turns it."""
        self.own: dict[str, list[str]] = {}
        """Parameters that a fetch of the module wants, in DeepSpeed's order: of a leaf all in it."""
        self.direct: dict[str, list[str]] = {}
        """Its own alone."""
        for each in self.parameters:
            self.own.setdefault(each.unit, []).append(each.name)
            self.direct.setdefault(each.module, []).append(each.name)
        self.leaves = {each.unit for each in self.parameters if each.unit != each.module}
        self.external = external(self.parameters, images=bool(image_groups))
        for module, names in self.external.items():
            self.own[module] = [*self.own.get(module, ()), *names]
        self.root = self._model(image_groups)

    # The model, as its modules call each other.

    def _model(self, image_groups: int) -> Call:
        embed = "encoder.embed_tokens"
        stacks = self._encoder(image_groups), self._decoder()
        if "encoder" in self.leaves:
            return Call("", stacks, inputs=0)
        return Call("", (self._simple(embed, inputs=0), *stacks, self._simple(embed)), inputs=0)

    def _simple(self, name: str, *, inputs: int = 1, outputs: int = 1, more: Iterable[str] = ()) -> Call:
        """more: parameters of others that come in with its inputs."""
        return Call(name, (Call(uses=(*self._own_uses(name), *more)),), inputs=inputs, outputs=outputs)

    def _own_uses(self, name: str) -> list[str]:
        own = self.direct.get(name, [])
        return own[::-1] if name in self._bias_first else own

    def _encoder(self, image_groups: int) -> Call:
        config, at = self.config, "encoder."
        images = image_groups > 0
        calls = [self._simple(at + "type_embedding", inputs=0)]
        calls += [self._backbone() for _ in range(image_groups)]
        calls.append(self._simple(at + "embed_positions", inputs=0))
        if not config.use_ofasys:
            calls.append(self._simple(at + "pos_ln"))
        if images:
            calls.append(self._simple(at + "embed_image_positions", inputs=0))
            if not config.use_ofasys:
                calls.append(self._simple(at + "image_pos_ln"))
        calls.append(self._simple(at + "layernorm_embedding"))
        if images:
            calls += [self._simple(at + "image_proj"), self._simple(at + "patch_layernorm_embedding")]
        if not config.entangle_position_embedding:
            calls += [self._simple(at + "pos_q_linear"), self._simple(at + "pos_k_linear")]
        for i in range(config.encoder_layers):
            calls += [self._tables("encoder", i, image=True), self._encoder_layer(i)]
        calls.append(self._simple(at + "layer_norm"))
        # What comes out: states, and positional vectors, which the decoder reads where they are not entangled.
        return Call("encoder", tuple(calls), outputs=1 if config.entangle_position_embedding else 2)

    def _decoder(self) -> Call:
        config, at = self.config, "decoder."
        calls = [self._simple(at + "embed_positions", inputs=0)]
        if not config.use_ofasys:
            calls += [self._simple(at + "embed_image_positions", inputs=0)]
            calls += [self._simple(at + "pos_ln"), self._simple(at + "image_pos_ln")]
        calls += [self._simple(at + "layernorm_embedding"), self._simple(at + "code_layernorm_embedding")]
        if not config.entangle_position_embedding:
            names = ("self_pos_q_linear", "self_pos_k_linear", "cross_pos_q_linear", "cross_pos_k_linear")
            calls += [self._simple(at + name) for name in names]
        for i in range(config.decoder_layers):
            calls += [self._tables("decoder", i, image=not config.use_ofasys), self._decoder_layer(i)]
        calls.append(self._simple(at + "layer_norm"))
        return Call("decoder", tuple(calls), inputs=0 if config.entangle_position_embedding else 3)

    def _tables(self, stack: str, layer: int, *, image: bool) -> Call:
        at = 0 if self.config.share_attn_bias else layer
        kinds = ("token", "image") if image else ("token",)
        tables = (self._simple(f"{stack}.{kind}_rel_pos_table_list.{at}", inputs=0) for kind in kinds)
        return Call(f"{stack}.relative", tuple(tables), inputs=0)

    def _attention(self, name: str, *, inputs: int) -> Call:
        q, k, v, out = (self._simple(f"{name}.{each}_proj") for each in ("q", "k", "v", "out"))
        return Call(name, (q, k, v, Call(uses=tuple(self.direct[name])), out), inputs=inputs)

    def _feed_forward(self, name: str, gamma: tuple[str, ...]) -> tuple[Call, ...]:
        """The last block: the norm that takes the residual in, then both products. gamma: of the block before."""
        own = self._gamma(name, "weight_ffn")
        branch = Call(f"{name}.branch", (Call(uses=own),), inputs=2 + len(own))
        return (
            self._simple(f"{name}.final_layer_norm", inputs=2, outputs=2, more=gamma), self._simple(f"{name}.fc1"),
            self._simple(f"{name}.ffn_layernorm"), self._simple(f"{name}.fc2"), branch,
        )  # fmt: skip

    def _gamma(self, name: str, which: str) -> tuple[str, ...]:
        return (f"{name}.{which}",) if self.config.gamma is not None else ()

    def _first_saved(self, name: str, layer: int, layers: int) -> str:
        """A bare sum keeps nothing for the backward."""
        config = self.config
        keeps = config.dropout or config.gamma is not None or (config.drop_path and layer and layers > 1)
        return f"{name}.branch" if keeps else f"{name}.fc2"

    def _layer(self, name: str, inside: tuple[Call, ...], inputs: int, first_saved: str) -> Call:
        return Call(name, inside, inputs=inputs, recomputed=self.checkpointing, first_saved=first_saved)

    def _encoder_layer(self, i: int) -> Call:
        name = f"encoder.layers.{i}"
        inside = (
            self._simple(f"{name}.self_attn_layer_norm"), self._attention(f"{name}.self_attn", inputs=2),
            self._simple(f"{name}.attn_ln"), *self._feed_forward(name, self._gamma(name, "weight_self_attn")),
        )  # fmt: skip
        return self._layer(name, inside, 1, self._first_saved(name, i, self.config.encoder_layers))

    def _decoder_layer(self, i: int) -> Call:
        name = f"decoder.layers.{i}"
        own, across = self._gamma(name, "weight_self_attn"), self._gamma(name, "weight_cross_attn")
        inside = (
            self._simple(f"{name}.self_attn_layer_norm"), self._attention(f"{name}.self_attn", inputs=2),
            self._simple(f"{name}.self_attn_ln"),
            self._simple(f"{name}.encoder_attn_layer_norm", inputs=2, outputs=2, more=own),
            self._attention(f"{name}.encoder_attn", inputs=2), self._simple(f"{name}.cross_attn_ln"),
            *self._feed_forward(name, across),
        )  # fmt: skip
        return self._layer(name, inside, 2, self._first_saved(name, i, self.config.decoder_layers))

    def _backbone(self) -> Call:
        at, backbone = "encoder.embed_images", self.config.backbone
        if isinstance(backbone, ConvConfig):
            convs = backbone.patch_size.bit_length() - 1
            inside = tuple(self._simple(f"{at}.convs.{i}", inputs=min(i, 1)) for i in range(convs))
            return Call(at, inside, inputs=0)
        return Call(
            at, self._vit(at, backbone) if isinstance(backbone, ViTConfig) else self._resnet(at, backbone), inputs=0
        )

    def _vit(self, at: str, backbone: ViTConfig) -> tuple[Call, ...]:
        blocks = tuple(self._block(f"{at}.transformer.resblocks.{i}") for i in range(backbone.layers))
        positions = Call(uses=(f"{at}.positional_embedding",))
        return (
            self._simple(f"{at}.conv1", inputs=0), positions, self._simple(f"{at}.ln_pre"),
            Call(f"{at}.transformer", blocks),
        )  # fmt: skip

    def _block(self, name: str) -> Call:
        projection = Call(uses=tuple(self._own_uses(f"{name}.attn")))
        drop_path = Call(f"{name}.drop_path")
        mlp = Call(f"{name}.mlp", (self._simple(f"{name}.mlp.c_fc"), self._simple(f"{name}.mlp.c_proj")))
        attn = Call(f"{name}.attn", (projection, self._simple(f"{name}.attn.out_proj")))
        return Call(name, (
            self._simple(f"{name}.ln_1"), attn, drop_path, self._simple(f"{name}.ln_2"), mlp, drop_path,
        ))  # fmt: skip

    def _resnet(self, at: str, backbone: ResNetConfig) -> tuple[Call, ...]:
        calls = [self._simple(f"{at}.conv1", inputs=0), self._norm(f"{at}.bn1", 64)]
        for stage, (channels, depth) in enumerate(zip((64, 128, 256), backbone.depths, strict=True)):
            for i in range(depth):
                name = f"{at}.layer{stage + 1}.{i}"
                inside: list[Call] = []
                for k, width in enumerate((channels, channels, 4 * channels), 1):
                    inside += [self._simple(f"{name}.conv{k}"), self._norm(f"{name}.bn{k}", width)]
                inside.append(Call(f"{name}.drop_path"))
                if not i:
                    inside += [self._simple(f"{name}.downsample.0"), self._norm(f"{name}.downsample.1", 4 * channels)]
                calls.append(Call(name, tuple(inside)))
        return tuple(calls)

    def _norm(self, name: str, channels: int) -> Call:
        uses = Call(uses=tuple(self.direct.get(name, ())))
        return Call(name, (uses,), reduces=2 * channels + 1 if self.config.batch_norm == "sync" else 0)

    # What DeepSpeed sees of it.

    def _last_uses(self) -> dict[str, int]:
        """How often each parameter is used: its gradient is complete after as many."""
        found: dict[str, int] = {}

        def count(call: Call) -> None:
            for name in call.uses or ():
                found[name] = found.get(name, 0) + 1
            for each in call.inside:
                count(each)

        count(self.root)
        return found

    def events(self) -> list[Event]:
        """Of one micro-batch, forward and backward."""
        return [*self.forward(self.root), *_Backward(self).of(self.root)]

    def inside(self, call: Call) -> tuple[Call, ...]:
        """Calls in it that DeepSpeed sees: it has no hooks within a leaf."""
        return () if call.name in self.leaves else call.inside

    def forward(self, call: Call) -> Iterator[Event]:
        if call.uses is not None:
            return
        yield Event("fetch", call.name, False)
        for each in self.inside(call):
            yield from self.forward(each)
        if call.reduces:
            yield Event("reduce", str(call.reduces), False)
        yield Event("release", call.name, False)


class _Backward:
    """What was recorded, backwards."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._uses = _uses(order.root, {})
        """How often each parameter is still to be met before its gradient is complete."""
        self._seen: set[str] = set()

    def of(self, call: Call, again: Call | None = None) -> Iterator[Event]:
        """again: the layer around it that has not been computed again yet."""
        if call.uses is not None:
            yield from self._gradients(call.uses)
            return
        for _ in range(call.outputs):
            yield Event("fetch", call.name, True)
        if call.reduces:
            yield Event("reduce", str(call.reduces), True)
        leaf = call.name in self._order.leaves
        if call.recomputed:
            if leaf:
                yield Event("fetch", call.name, True, True)
            else:
                again = call
        elif again is not None and call.name == again.first_saved:
            yield from self._again(again)
        for each in reversed(call.inside):
            events = self.of(each, again)
            yield from (event for event in events if event.kind == "reduce") if leaf else events
            if again is not None and (each.name == again.first_saved):
                again = None
        if leaf:
            yield from (Event("gradient", name, True) for name in self._order.own[call.name])
        if call.inputs and call.name not in self._seen:
            yield Event("release", call.name, True)
        self._seen.add(call.name)

    def _again(self, layer: Call) -> Iterator[Event]:
        """The layer's forward, until the last thing that the backward wants of it is there."""
        for event in self._order.forward(layer):
            yield event._replace(backward=True, again=True)
            if (event.kind, event.name) == ("fetch", layer.first_saved):
                return

    def _gradients(self, names: Iterable[str]) -> Iterator[Event]:
        for name in names:
            self._uses[name] -= 1
            if not self._uses[name]:
                yield Event("gradient", name, True)


def external(parameters: Iterable[Parameter], *, images: bool) -> dict[str, list[str]]:
    """module -> parameters of others that it reads itself: DeepSpeed fetches them with its own from then on."""
    if any(each.unit == "encoder" != each.module for each in parameters):
        return {"": ["encoder.embed_tokens.weight"]}  # called from outside, where DeepSpeed does not see the module
    return {"encoder": ["encoder.type_embedding.weight"]} if images else {}


def _linear_modules(parameters: Iterable[Parameter]) -> set[str]:
    """Modules of a matrix and its bias."""
    found: dict[str, list[int]] = {}
    for each in parameters:
        found.setdefault(each.module, []).append(len(each.shape))
    return {name for name, dims in found.items() if dims == [2, 1]}


def _uses(call: Call, found: dict[str, int]) -> dict[str, int]:
    """How often each parameter is used in a forward."""
    for name in call.uses or ():
        found[name] = found.get(name, 0) + 1
    for each in call.inside:
        _uses(each, found)
    return found

"""What a forward and backward holds at its highest point beside the state: activations, gathered weights, gradients.

The model's code once more, with `ofa_ds.plan.tape` in place of tensors: encoder.py, decoder.py, layers.py, ofa.py.
Legend: P image tokens, T source text tokens, N = P + T encoder tokens, M decoder tokens, D channels, U positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.plan.attention import Attended, attention
from ofa_ds.plan.coordinator import Coordinator, held
from ofa_ds.plan.gathering import GatheredBytes
from ofa_ds.plan.gradients import Gradients
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.operators import Branch, Operators
from ofa_ds.plan.order import WITHOUT_MODULES, external
from ofa_ds.plan.parameters import Parameter, parameters
from ofa_ds.plan.stems import features
from ofa_ds.plan.tape import Ledger, Tape, Value
from ofa_ds.plan.vocabulary import vocabulary_loss
from ofa_ds.plan.work import Work


def activations(
    config: ModelConfig,
    work: Work,
    layout: Layout,
    *,
    accumulation: int = 1,
    gpu_bytes: float = 0.0,
    fake: bool = False,
    watch: Callable[[Coordinator, str, bool, bool], None] | None = None,
) -> Counter[str]:
    """Bytes by part at the highest point of one micro-batch, in a step that has settled.

    accumulation: micro-batches a step. gpu_bytes: memory of the GPU, a part of which the vocabulary loss may take.
    fake: as `tests/fake_step.py` sees it: without what only the kernels know of. watch: sees stage 3's coordinator
    after a module was entered or left: (it, module, forward, entered).
    """
    leaves = [name for name in layout.leaf_classes if name not in WITHOUT_MODULES]
    params = parameters(config, leaf_classes=leaves)
    modules = held(params, external(params, images=bool(work.images)))
    order: list[str] | None = None
    for _ in range(2 if layout.stage == 3 else 1):  # once to know the order of modules
        ledger = Ledger()
        weights = Gradients(params, layout, ledger, accumulation)
        if layout.stage == 3:
            weights.coordinator = GatheredBytes(modules, layout, ledger, order)
            if watch is not None and order is not None:
                weights.coordinator.watch = partial(watch, weights.coordinator)
        tape = Tape(ledger, layout.weight_bytes, weights, _hooks(params, layout.stage), fake=fake)
        shapes = {each.name: each.shape for each in params}
        ops = Operators(tape, shapes, fused=layout.precision != "fp32")
        tape.backward(_Model(ops, config, work, gpu_bytes)())
        weights.finish()
        order = weights.coordinator.seen if weights.coordinator is not None else None
    return ledger.at_peak


def _hooks(params: list[Parameter], stage: int) -> Callable[[str], bool]:
    """Whether stage 3 sees a module's call: of all modules, those without weights too, but for what is in a leaf."""
    if stage < 3:
        return lambda module: False
    leaves = tuple({f"{each.unit}." for each in params if each.unit != each.name.rpartition(".")[0]})
    return cache(lambda module: not module.startswith(leaves))


class _Model:
    def __init__(self, ops: Operators, config: ModelConfig, work: Work, gpu_bytes: float) -> None:
        self.ops, self.config, self.work, self.gpu_bytes = ops, config, work, gpu_bytes
        self.patches = sum(each.count * each.patches for each in work.examples)
        self.source = sum(each.count * each.source for each in work.examples)
        self.memory_tokens, self.target = work.encoder_tokens, work.decoder_tokens
        self.pictures, self.texts, self.target_texts, self.codes = work.distinct or _distinct(work)

    def __call__(self) -> Value:
        """The loss."""
        return self.ops.tape.call("", lambda: [self._loss()])[0]

    def _loss(self) -> Value:
        dim, ops = self.config.dim, self.ops
        embedded = ops.table(self.source + self.target, "encoder.embed_tokens")
        text = ops.part(embedded, self.source * dim)
        memory, positions = ops.tape.call("encoder", lambda x: list(self._encoder(x)), text)
        del text
        tokens = ops.part(embedded, self.target * dim)
        hidden = ops.tape.call("decoder", lambda *inputs: [self._decoder(*inputs)], tokens, memory, positions)[0]
        del tokens, memory, positions
        work = self.work
        return vocabulary_loss(ops, hidden, "encoder.embed_tokens", work.counted_tokens, self.gpu_bytes)

    def _encoder(self, text: Value) -> tuple[Value, Value]:
        ops, config, dim = self.ops, self.config, self.config.dim
        types = ops.table(2, "encoder.type_embedding")
        image = self._patch_features() if self.work.images else None
        positions = self._positions()
        added = None
        if config.entangle_position_embedding:
            added = ops.rows(positions, self.memory_tokens * dim)
            text = ops.sum(text, ops.rows(added, self.source * dim))
        x = text = self._dropout(ops.norm(ops.add_row(text, types), "encoder.layernorm_embedding"))
        if image is not None:
            picture = ops.linear(image, "encoder.image_proj")
            if added is not None:
                picture = ops.sum(picture, ops.rows(added, self.patches * dim))
            picture = self._dropout(ops.norm(ops.add_row(picture, types), "encoder.patch_layernorm_embedding"))
            x = ops.joined(picture, text)
        x = ops.rows(x, self.memory_tokens * dim)
        x = self._encoder_layers(x, positions)
        return ops.norm(x, "encoder.layer_norm"), positions

    def _dropout(self, x: Value) -> Value:
        return self.ops.dropout(x) if self.config.dropout else x

    def _patch_features(self) -> Value:
        channels, groups = self.config.backbone.channels, []
        for group in self.work.images:
            found = features(self.ops, self.config, group, "encoder.embed_images")
            groups.append(found)
        whole = groups[0] if len(groups) == 1 else self.ops.joined(*groups)
        return self.ops.rows(whole, self.patches * channels)

    def _positions(self) -> Value:
        ops, original = self.ops, not self.config.use_ofasys
        text = ops.table(self.texts, "encoder.embed_positions")
        text = ops.norm(text, "encoder.pos_ln") if original else text
        if not self.work.images:
            return text
        image = ops.table(self.pictures, "encoder.embed_image_positions")
        image = ops.norm(image, "encoder.image_pos_ln") if original else image
        return ops.joined(image, text)

    def _row(self, stack: str, layer: int, tables: int) -> Value:
        return self.ops.tape.call(f"{stack}.relative", lambda: [self._row_of_tables(stack, layer, tables)])[0]

    def _row_of_tables(self, stack: str, layer: int, tables: int) -> Value:
        """[H, R] of a layer: rows of its tables, transposed."""
        config = self.config
        entries = 2 * min(config.max_positions, 1024) - 1
        row = self.ops.table(entries, f"{stack}.token_rel_pos_table_list.{layer % tables}")
        name = f"{stack}.image_rel_pos_table_list.{layer % tables}"
        if f"{name}.weight" not in self.ops.shapes:
            return row
        cells = (2 * config.image_bucket_size - 1) ** 2
        if stack == "decoder":  # and the start token's
            span = 2 * config.image_bucket_size * (config.image_bucket_size - 1) + 1
            cells += 3 * span + cells + 1
        return self.ops.joined(row, self.ops.table(cells, name))

    def _branch(self, stack: str, layer: int, name: str) -> Branch:
        config, gamma = self.config, f"{stack}.layers.{layer}.{name}"
        count = config.encoder_layers if stack == "encoder" else config.decoder_layers
        drop_path = config.drop_path * layer / max(count - 1, 1)
        return Branch(config.dropout, drop_path, gamma, bool(config.dropout or drop_path or gamma in self.ops.shapes))

    def _layer(self, body: Callable[..., list[Value]], name: str, *inputs: Value) -> Value:
        tape = self.ops.tape
        if self.config.activation_checkpointing:
            return tape.checkpoint(lambda: tape.call(name, body, *inputs))[0]
        return tape.call(name, body, *inputs)[0]

    def _encoder_layers(self, x: Value, positions: Value) -> Value:
        ops, config = self.ops, self.config
        own = self._position_terms("encoder", "pos_", positions, positions)
        tables = 1 if config.share_attn_bias else config.encoder_layers
        pairs = self.work.pairs[0]
        for i in range(config.encoder_layers):
            kind = Attended(pairs, own, self._row("encoder", i, tables))
            name = f"encoder.layers.{i}"

            def body(x: Value, i: int = i, kind: Attended = kind, name: str = name) -> list[Value]:
                normed = ops.norm(x, f"{name}.self_attn_layer_norm")
                attended = self._attention(f"{name}.self_attn", normed, normed, kind)
                attended = ops.norm(attended, f"{name}.attn_ln")
                branch = self._branch("encoder", i, "weight_self_attn")
                x, normed = ops.add_norm(x, attended, f"{name}.final_layer_norm", branch)
                return [
                    self._added(name, x, self._feed_forward(name, normed), self._branch("encoder", i, "weight_ffn"))
                ]

            x = self._layer(body, name, x)
            del kind, body
        return x

    def _added(self, name: str, residual: Value, x: Value, branch: Branch) -> Value:
        ops = self.ops
        return ops.tape.call(f"{name}.branch", lambda residual, x: [ops.add(residual, x, branch)], residual, x)[0]

    def _feed_forward(self, name: str, normed: Value) -> Value:
        ops = self.ops
        return ops.linear(ops.gelu_norm(ops.linear(normed, f"{name}.fc1"), f"{name}.ffn_layernorm"), f"{name}.fc2")

    def _attention(self, name: str, x: Value, memory: Value, kind: Attended) -> Value:
        ops = self.ops

        def body(x: Value, memory: Value) -> list[Value]:
            q = ops.linear(x, f"{name}.q_proj")
            k, v = ops.linear(memory, f"{name}.k_proj"), ops.linear(memory, f"{name}.v_proj")
            out = attention(ops, self.config, (q, k, v), f"{name}.c_attn", kind)
            del q, k, v
            return [ops.linear(out, f"{name}.out_proj")]

        return ops.tape.call(name, body, x, memory)[0]

    def _position_terms(self, stack: str, prefix: str, own: Value, other: Value) -> tuple[Value, Value] | None:
        if self.config.entangle_position_embedding:
            return None
        ops = self.ops
        q, k = ops.linear(own, f"{stack}.{prefix}q_linear"), ops.linear(other, f"{stack}.{prefix}k_linear")
        return ops.wide(q), ops.wide(k)

    def _decoder(self, tokens: Value, memory: Value, memory_positions: Value) -> Value:
        ops, config, dim = self.ops, self.config, self.config.dim
        raw, normed = self._decoder_positions()
        if config.adds_decoder_positions:
            tokens = ops.sum(tokens, ops.rows(raw, self.target * dim))
        as_text = ops.norm(tokens, "decoder.layernorm_embedding")
        as_code = ops.norm(tokens, "decoder.code_layernorm_embedding")
        tape, elements = ops.tape, tokens.elements
        x = tape.op([as_code, as_text], [(elements, tape.width)], lambda g: [tape.new(elements), tape.new(elements)])[0]
        x = self._dropout(x)
        del as_text, as_code, tokens
        own = self._position_terms("decoder", "self_pos_", normed, normed)
        across = self._position_terms("decoder", "cross_pos_", normed, memory_positions)
        tables = 1 if config.share_attn_bias else config.decoder_layers
        pairs, cross = self.work.pairs[1], Attended(self.work.pairs[2], across, None)
        for i in range(config.decoder_layers):
            kind = Attended(pairs, own, self._row("decoder", i, tables))
            name = f"decoder.layers.{i}"

            def body(x: Value, memory: Value, i: int = i, kind: Attended = kind, name: str = name) -> list[Value]:
                normed = ops.norm(x, f"{name}.self_attn_layer_norm")
                attended = self._attention(f"{name}.self_attn", normed, normed, kind)
                attended = ops.norm(attended, f"{name}.self_attn_ln")
                branch = self._branch("decoder", i, "weight_self_attn")
                x, normed = ops.add_norm(x, attended, f"{name}.encoder_attn_layer_norm", branch)
                attended = ops.norm(
                    self._attention(f"{name}.encoder_attn", normed, memory, cross), f"{name}.cross_attn_ln"
                )
                branch = self._branch("decoder", i, "weight_cross_attn")
                x, normed = ops.add_norm(x, attended, f"{name}.final_layer_norm", branch)
                return [
                    self._added(name, x, self._feed_forward(name, normed), self._branch("decoder", i, "weight_ffn"))
                ]

            x = self._layer(body, name, x, memory)
            del kind, body
        return ops.norm(x, "decoder.layer_norm")

    def _decoder_positions(self) -> tuple[Value, Value]:
        ops = self.ops
        if self.config.use_ofasys:
            raw = ops.table(self.target_texts + self.codes, "decoder.embed_positions")
            return raw, raw
        text = ops.table(self.target_texts, "decoder.embed_positions")
        image = ops.table(self.codes, "decoder.embed_image_positions")
        normed = ops.joined(ops.norm(text, "decoder.pos_ln"), ops.norm(image, "decoder.image_pos_ln"))
        return ops.joined(text, image), normed


def _distinct(work: Work) -> tuple[float, float, float, float]:
    texts = [each.target for each in work.examples if not each.code]
    codes = [each.target for each in work.examples if each.code]
    return (
        max((each.patches for each in work.examples), default=0.0),
        max((each.source for each in work.examples), default=0.0), max(texts, default=0.0), max(codes, default=0.0),
    )  # fmt: skip

"""What attention keeps and makes (`ofa_kernels.attention`). Legend: N queries, M keys, H heads, R entries."""

from __future__ import annotations

from typing import NamedTuple

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.plan.operators import WORKSPACE, Grads, Operators
from ofa_ds.plan.tape import Buffer, Value

DLOGITS_BYTES = 128 << 20
"""Gradients of logits that the kernels hold at a time, unless one head has more (`attention_row_ops_triton`)."""


class Attended(NamedTuple):
    """One kind of attention of one layer."""

    pairs: float
    """Query-key pairs of a head."""
    positions: tuple[Value, Value] | None
    """Vectors [U, D] and [V, D] in fp32."""
    row: Value | None
    """[H, R]."""


def attention(
    ops: Operators, config: ModelConfig, qkv: tuple[Value, Value, Value], head_scale: str, kind: Attended
) -> Value:
    """[N, D], before the output's projection."""
    q, k, _ = qkv
    leaf = ops.leaf(head_scale)
    inputs = [*qkv, *(kind.positions or ()), *([kind.row] if kind.row is not None else []), leaf]
    if ops.fused:
        return _kernels(ops, config, inputs, qkv, kind)
    return _padded(ops, config, inputs, qkv, kind)


def _kernels(
    ops: Operators, config: ModelConfig, inputs: list[Value], qkv: tuple[Value, Value, Value], kind: Attended
) -> Value:
    tape, (q, k, _), heads = ops.tape, qkv, config.num_heads
    queries, keys = q.elements / config.dim, k.elements / config.dim
    sizes = [each.elements for each in inputs]
    widths = [tape.width] * 3 + [4] * (2 if kind.positions else 0) + [tape.width] * 2
    has_row, has_positions = kind.row is not None, kind.positions is not None
    dlogits = max(heads * queries * keys / max(heads, 1) * tape.width, 0)

    def run(gradient: Buffer) -> Grads:
        scratch = []
        if tape.workspace:
            if has_row:
                scratch.append(tape.ledger.take(min(max(DLOGITS_BYTES, dlogits), heads * dlogits), WORKSPACE))
            if has_positions:
                scratch.append(tape.new(sizes[0] + sizes[1], None, WORKSPACE))
            scratch.append(tape.new(heads * queries, 4, WORKSPACE))
        gradients = [tape.new(size, width) for size, width in zip(sizes, widths, strict=False)]
        del scratch
        return gradients

    sums = tape.new(heads * (queries + 1), 4)
    save = [each.buffer for each in qkv] + [sums]
    row = None
    if has_row and tape.workspace:  # prepared for the kernels, in fp32
        row = tape.new(kind.row.elements, 4)
        save.append(row)
    elif has_row:
        save.append(kind.row.buffer)
    del row
    return tape.op(inputs, [(q.elements, tape.width)], run, save=save, saves_outputs=[0])[0]


def _padded(
    ops: Operators, config: ModelConfig, inputs: list[Value], qkv: tuple[Value, Value, Value], kind: Attended
) -> Value:
    """In plain torch: probabilities are kept, padded copies of q, k, v too; pads are left out here."""
    tape, (q, k, _), heads = ops.tape, qkv, config.num_heads
    pairs, sizes = heads * kind.pairs, [each.elements for each in inputs]
    pairs *= 2 if config.attention_dropout else 1

    def run(gradient: Buffer) -> Grads:
        scratch = [tape.new(heads * kind_pairs, 4) for _ in range(2)]
        gradients = [tape.new(size) for size in sizes]
        del scratch
        return gradients

    kind_pairs = kind.pairs
    save = [tape.new(q.elements, 4), tape.new(q.elements + 2 * k.elements, 4), tape.new(pairs, 4)]
    return tape.op(inputs, [(q.elements, tape.width)], run, save=save)[0]

"""What the loss over the vocabulary keeps and makes (`ofa_kernels.cross_entropy`). N tokens, V ids, D channels."""

from __future__ import annotations

from ofa_ds.plan.operators import Grads, Operators
from ofa_ds.plan.tape import Buffer, Value

PART = "vocabulary loss"
CHUNK_ELEMENTS, WHOLE_CHUNKS, PAYS_TOKENS = 6 << 20, 3, 1024
TILE_AND_SUM_BYTES, SUM_BYTES, DEVICE_SHARE = 84 << 20, 48 << 20, 256
ROW_MULTIPLE, COLUMN_MULTIPLE = 16, 64
"""All as in `ofa_kernels.cross_entropy` and `cross_entropy_ops_triton`; a test compares."""


def vocabulary_loss(ops: Operators, hidden: Value, module: str, counted: float, gpu_bytes: float) -> Value:
    """hidden [M, D] -> loss [M]."""
    rows = hidden.elements / ops.shapes[f"{module}.weight"][1]
    vocab = ops.shapes[f"{module}.weight"][0]
    several = rows * vocab > WHOLE_CHUNKS * CHUNK_ELEMENTS
    fused = ops.fused and (several or rows >= PAYS_TOKENS)
    body = _tiles if fused else _chunks
    with ops.tape.as_part(PART):
        return ops.tape.call(module, lambda x: [body(ops, x, f"{module}.weight", (rows, counted), gpu_bytes)], hidden)[
            0
        ]


def _tiles(ops: Operators, hidden: Value, weight: str, tokens: tuple[float, float], gpu_bytes: float) -> Value:
    tape, leaf, (vocab, dim) = ops.tape, ops.leaf(weight), ops.shapes[weight]
    rows = tokens[0]
    tile_rows, columns = tile_shape(round(rows), vocab, dim, tape.width, int(gpu_bytes) // DEVICE_SHARE)
    one_product, elements = rows <= tile_rows, hidden.elements

    def run(gradient: Buffer) -> Grads:
        dhidden, dweight = tape.new(elements), tape.of_parameter(leaf, None if one_product else 4)
        sums = tape.new(tile_rows * dim, 4) if columns < vocab and tape.width < 4 and tape.workspace else None
        del sums
        return [dhidden, dweight if one_product else tape.of_parameter(leaf)]

    tile = tape.new(tile_rows * columns)
    save = [hidden.buffer, tape.new(rows * 5, 4), tile]
    return tape.op([hidden, leaf], [(rows, 4)], run, save=save)[0]


def _chunks(ops: Operators, hidden: Value, weight: str, tokens: tuple[float, float], gpu_bytes: float) -> Value:
    """Plain torch: one chunk's log-probabilities are kept, several are computed again."""
    tape, leaf, (vocab, _) = ops.tape, ops.leaf(weight), ops.shapes[weight]
    rows, counted = tokens
    whole, elements = rows * vocab <= WHOLE_CHUNKS * CHUNK_ELEMENTS, hidden.elements
    chunk = (counted if whole else CHUNK_ELEMENTS // vocab) * vocab

    def run(gradient: Buffer) -> Grads:
        dhidden = tape.new(elements)
        dweight = None if whole else tape.of_parameter(leaf, 4)
        probabilities = tape.new(chunk, 4)
        del probabilities
        narrow = tape.new(chunk)
        dweight = tape.of_parameter(leaf) if whole or tape.width < 4 else dweight
        del narrow
        return [dhidden, dweight]

    logits = tape.new(chunk)
    kept = tape.new(chunk, 4)
    del logits
    save = [hidden.buffer, *([kept] if whole else [])]
    del kept
    return tape.op([hidden, leaf], [(rows, 4)], run, save=save)[0]


def tile_shape(tokens: int, vocab: int, dim: int, item_bytes: int, budget: int) -> tuple[int, int]:
    """(tokens, columns) of a tile of logits, as `cross_entropy_ops_triton.tile_shape` without a chunk."""
    all_columns = -(-vocab // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    all_bytes = all_columns * tokens * item_bytes
    limit = max(budget, TILE_AND_SUM_BYTES) if all_bytes <= 2 * budget else TILE_AND_SUM_BYTES
    rows = tokens
    if all_bytes > limit:
        rows = _even_share(tokens, max(ROW_MULTIPLE, SUM_BYTES // (4 * dim)), ROW_MULTIPLE)
    row_bytes = max(rows, 1) * item_bytes
    sum_bytes = 4 * dim * rows if item_bytes < 4 and row_bytes * all_columns > limit else 0
    columns = (limit - sum_bytes) // row_bytes // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    return max(rows, 1), _even_share(vocab, max(columns, COLUMN_MULTIPLE), COLUMN_MULTIPLE)


def _even_share(total: int, most: int, multiple: int) -> int:
    share = -(-total // max(1, -(-total // (most // multiple * multiple))))
    return -(-share // multiple) * multiple

"""What a kernel would take on a GPU at best: the larger of FLOPs over matrix rate and bytes over bandwidth.

Arithmetic, not measurement; `python kernels/bench.py --roofline` prints it. Everything is 16 bits wide but lse, delta
and the gradients of positions. d: head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

RATES = {"A100": (271e12, 2.0e12), "H200": (790e12, 4.3e12)}
"""FLOP/s of 16-bit products and bytes/s, as published measurements of dense products and copies reach."""
VOCAB = 59457
MIX = {
    "encoder": [(216, 216)] * 17 + [(260, 260)] * 2 + [(267, 267)],
    "decoder": [(20, 20)] * 16 + [(260, 260)] * 2 + [(257, 257), (30, 30)],
    "cross": [(20, 216)] * 16 + [(260, 260)] * 2 + [(257, 267), (30, 216)],
}
"""(queries, keys) of the examples of one pretraining micro-batch: 16 + 2 + 1 + 1."""
LONG = {"encoder": [(980, 980)] * 8}
"""Eight pictures of 480 px with 80 tokens each."""
SIZES = {"base": (12, 64, 3072), "huge": (16, 80, 5120), "6b": (32, 80, 10240)}
"""Heads, head dim, feed-forward channels."""


@dataclass(frozen=True)
class Work:
    operator: str
    size: str
    rows: int
    flops: float
    bytes: float

    def seconds(self, gpu: str) -> float:
        rate, bandwidth = RATES[gpu]
        return max(self.flops / rate, self.bytes / bandwidth)


def attention(size: str, kind: str, examples: list[tuple[int, int]], label: str) -> Iterator[Work]:
    """Per pair and head 6 d FLOP forward; backward 10 d queries, 12 d keys, 6 d row (none in cross-attention)."""
    heads, d, _ = SIZES[size]
    width = heads * d
    queries, keys = (sum(lengths) for lengths in zip(*examples, strict=True))
    pairs = sum(q * k for q, k in examples) / (2 if kind == "decoder" else 1)
    row = kind != "cross"
    yield Work(
        f"attention {kind}, {label}, forward", size, queries, 6 * d * heads * pairs,
        2 * width * (2 * queries + 2 * keys) + 4 * heads * queries,
    )  # fmt: skip
    content = 2 * width * (4 * queries + 2 * keys) + 4 * width * queries  # queries kernel; positions are fp32
    content += 2 * width * (2 * queries + 4 * keys) + 4 * width * keys  # keys kernel
    sums = 4 * width * (queries + keys)  # positions
    again = 2 * width * (2 * queries + 2 * keys) if row else 0
    yield Work(
        f"attention {kind}, {label}, backward", size, queries, (22 + 6 * row) * d * heads * pairs,
        content + sums + again + 16 * heads * queries,
    )  # fmt: skip


def norms(size: str, rows: int) -> Iterator[Work]:
    """Values read and written, two bytes each; a few FLOP a value, which no GPU waits for."""
    heads, d, ffn = SIZES[size]
    for name, width, forward, backward in (
        ("layer norm", heads * d, 2, 3),
        ("residual + dropout + layer norm", heads * d, 4, 5),
        ("gelu + layer norm", ffn, 2, 5 if ffn >= 8192 else 3),
    ):
        for direction, values in (("forward", forward), ("backward", backward)):
            yield Work(f"{name}, {direction}", size, rows, 0, 2 * values * rows * width)


def vocabulary_loss(size: str, rows: int) -> Work:
    """Three products and the logits written, read, overwritten and read twice."""
    heads, d, _ = SIZES[size]
    width = heads * d
    return Work(
        "vocabulary loss, both", size, rows, 6 * rows * VOCAB * width, 2 * (5 * rows * VOCAB + 3 * VOCAB * width)
    )


def table() -> list[Work]:
    work = []
    for size in SIZES:
        for kind, examples in MIX.items():
            work += attention(size, kind, examples, "mix")
        work += attention(size, "encoder", LONG["encoder"], "8 x 980")
        work += norms(size, sum(q for q, _ in MIX["encoder"]))
        work.append(vocabulary_loss(size, sum(q for q, _ in MIX["decoder"])))
    return work


def print_table() -> None:
    print(f"| {'operator':44} | size | rows | GFLOP | MB | {' | '.join(f'{gpu} us at best' for gpu in RATES)} |")
    print("|" + "---|" * (5 + len(RATES)))
    for work in table():
        times = " | ".join(f"{work.seconds(gpu) * 1e6:.0f}" for gpu in RATES)
        amounts = f"{work.flops / 1e9:.1f} | {work.bytes / 1e6:.0f}"
        print(f"| {work.operator:44} | {work.size} | {work.rows} | {amounts} | {times} |")

"""What a kernel takes on a GPU: at best, and as its own machine code lets one expect.

Arithmetic, not measurement; `python kernels/bench.py --roofline` prints it. At best: the larger of FLOPs over matrix
rate and bytes over bandwidth. Expected: the largest of these (with what a kernel really moves and multiplies) and of

    issue     instructions of the main loop, as the compile gate counts them (INSTRUCTIONS), for the pairs of whole
              tiles, over what a GPU issues
    atomics   additions to 64-bit integers, over what its cache takes

It is a bound that knows more, no forecast: nothing here overlaps worse than perfectly, and launches cost nothing.
Everything is 16 bits wide but lse and delta. d: head dim.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

INSTRUCTIONS = Path(__file__).parent / "instructions.json"
"""{"made": how, "each": {"kernel, size, arch": thread instructions for a pair or an element, in bf16}}."""


@dataclass(frozen=True)
class Gpu:
    """Rates as published measurements reach them."""

    arch: str
    flops: float
    """FLOP/s of dense 16-bit products."""
    bandwidth: float
    """Bytes/s of a copy."""
    issue: float
    """Warp instructions/s: multiprocessors x 4 x clock, times the share that attention kernels keep up (assumed:
    53 % on an A100, 65 % on Hopper)."""
    atomics: float
    """Per second: one a clock and slice of the second cache, if no two meet."""
    memory: float
    """Bytes; the vocabulary loss keeps more logits on a larger GPU."""


GPUS = {
    "A100": Gpu("sm_80", 271e12, 2.0e12, 108 * 4 * 1.41e9 * 0.53, 80 * 1.41e9, 80 * 2**30),
    "H200": Gpu("sm_90", 790e12, 4.3e12, 132 * 4 * 1.75e9 * 0.65, 96 * 1.75e9, 141e9),
}
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
ROW_ROWS, ROW_LANES = 8, 32
"""Tile of attention's row kernel: query positions, diagonals (`attention_row_triton.ROW_TILE`)."""


Lengths = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Work:
    operator: str
    size: str
    rows: int
    flops: float
    bytes: float
    loops: tuple[tuple[str, int, Lengths, int], ...] = ()
    """(kernel of the compile gate, its head dim or width, examples or (), what one pair or element stands for)."""
    atomics: float = 0.0
    more_bytes: float = 0.0
    """Beyond `bytes`: partial sums, dlogits in 16 bits."""

    def seconds(self, gpu: str) -> float:
        """At best."""
        return max(self.flops / GPUS[gpu].flops, self.bytes / GPUS[gpu].bandwidth)

    def bounds(self, gpu: str) -> dict[str, float] | None:
        """Seconds by each of the things that may hold it up; None where its instructions were not counted."""
        its, kept = GPUS[gpu], products(self.rows, gpu) / 3 if self.operator == "vocabulary loss, both" else 1.0
        found = {"products": self.flops * kept / its.flops, "bytes": (self.bytes + self.more_bytes) / its.bandwidth}
        slots = 0.0
        for kernel, size, examples, times in self.loops:
            each = counted().get(f"{kernel}, {size}, {its.arch}")
            if each is None:
                return None
            slots += each * times * (tile_pairs(kernel, size, its.arch, examples) if examples else 1) / 32
        return found | {"issue": slots / its.issue, "atomics": self.atomics / its.atomics}

    def waste(self, gpu: str) -> float | None:
        """Pairs of whole tiles over pairs that there are, of the operator's first kernel; None without one."""
        if not self.loops or not self.loops[0][2]:
            return None
        kernel, size, examples, _ = self.loops[0]
        return tile_pairs(kernel, size, GPUS[gpu].arch, examples) / real_pairs(examples, "decoder" in kernel)


@functools.cache
def counted() -> dict[str, float]:
    return json.loads(INSTRUCTIONS.read_text())["each"] if INSTRUCTIONS.exists() else {}


@functools.cache
def _tile(kernel: str, size: int, arch: str) -> tuple[int, int]:
    """(rows that a program owns, rows that a step of its loop takes)."""
    from compile_gate import compile_cases

    (tile,) = {
        (case.constants["OWNED"], case.constants["STEP"])
        for case in compile_cases(False, arch)
        if case.kernel == kernel and case.size == size
    }
    return tile


def real_pairs(examples: Sequence[tuple[int, int]], causal: bool) -> float:
    return sum(q * k for q, k in examples) / (2 if causal else 1)


@functools.cache
def tile_pairs(kernel: str, size: int, arch: str, examples: Lengths) -> int:
    """Pairs that a kernel of attention computes: those of whole tiles, less tiles that a causal mask makes empty."""
    causal = "decoder" in kernel
    if kernel.startswith("attention row"):  # the tiles lie along diagonals
        return sum(_up(q, ROW_ROWS) * _up(k + ROW_ROWS - 1, ROW_LANES) for q, k in examples) // (2 if causal else 1)
    owned, step = _tile(kernel, size, arch)
    total = 0
    for q, k in examples:
        own, other = (k, q) if "keys" in kernel else (q, k)
        for first in range(0, own, owned):
            if causal:
                other_here = q - first if "keys" in kernel else min(k, first + owned)
            else:
                other_here = other
            total += owned * _up(other_here, step)
    return total


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def products(rows: int, gpu: str) -> float:
    """Of the vocabulary loss, forward and backward, in 16 bits: 3, and what is computed twice."""
    from ofa_kernels.cross_entropy_ops_triton import DEVICE_SHARE, tile_shape

    tokens, columns = tile_shape(rows, VOCAB, 2560, 2, None, int(GPUS[gpu].memory) // DEVICE_SHARE)
    return 4 - min(tokens, rows) * min(columns, VOCAB) / (rows * VOCAB)


def attention(size: str, kind: str, examples: list[tuple[int, int]], label: str) -> Iterator[Work]:
    """Per pair and head 6 d FLOP forward; backward 10 d queries, 12 d keys. dlogits of the row: written, read once.

    Additions to the row: one for each head and diagonal of the positions of ROW_ROWS queries, if examples share theirs.
    """
    heads, d, _ = SIZES[size]
    width, lengths, row = heads * d, tuple(examples), kind != "cross"
    queries, keys = (sum(lengths) for lengths in zip(*examples, strict=True))
    pairs = real_pairs(examples, kind == "decoder")
    yield Work(
        f"attention {kind}, {label}, forward", size, queries, 6 * d * heads * pairs,
        2 * width * (2 * queries + 2 * keys) + 4 * heads * queries,
        ((f"attention forward, {kind}", d, lengths, heads),),
    )  # fmt: skip
    content = 2 * width * (5 * queries + 2 * keys)  # queries kernel
    content += 2 * width * (2 * queries + 5 * keys)  # keys kernel
    sums = 2 * width * (queries + keys)  # positions
    loops = [(f"attention {name}, {kind}", d, lengths, heads) for name in ["queries", "keys"] + ["row"] * row]
    places = max(q for q, _ in examples) * max(k for _, k in examples)
    yield Work(
        f"attention {kind}, {label}, backward", size, queries, 22 * d * heads * pairs,
        content + sums + 16 * heads * queries, tuple(loops),
        atomics=heads * places / ROW_ROWS * row, more_bytes=2 * 2 * heads * pairs * row,
    )  # fmt: skip


def norms(size: str, rows: int) -> Iterator[Work]:
    """Values read and written, two bytes each. Beyond them: partial sums of parameters' gradients, written and read."""
    heads, d, ffn = SIZES[size]
    for name, kernel, width, forward, backward in (
        ("layer norm", "layer norm", heads * d, 2, 3),
        ("residual + dropout + layer norm", "add + drop + layer norm", heads * d, 4, 5),
        ("gelu + layer norm", "gelu + layer norm", ffn, 2, 5 if ffn >= 8192 else 3),
    ):
        split = [", rows", ", weights"] if "gelu" in name and ffn >= 8192 else [""]
        parts = 7 if len(split) > 1 else min(-(-rows // 4), 132 * max(1, 16 * 512 // width))
        for direction, values, kernels, more in (
            ("forward", forward, [f"{kernel} forward"], 0),
            ("backward", backward, [f"{kernel} backward{part}" for part in split], 2 * 4 * 2 * parts * width),
        ):
            loops = tuple((each, width, (), rows * width) for each in kernels)
            yield Work(f"{name}, {direction}", size, rows, 0, 2 * values * rows * width, loops, more_bytes=more)


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
    """Per GPU: microseconds at best, the share of that which may be expected, and what holds it up."""
    print(
        f"| {'operator':44} | size | rows | GFLOP | MB | tiles / pairs | atomics | "
        + " | ".join(f"{gpu} us at best | expected | by" for gpu in GPUS) + " |"
    )  # fmt: skip
    print("|" + "---|" * (7 + 3 * len(GPUS)))
    for work in table():
        waste = work.waste("H200") if counted() else None
        cells = [f"{work.flops / 1e9:.1f}", f"{work.bytes / 1e6:.0f}", f"{waste:.2f}" if waste else "", _count(work)]
        for gpu in GPUS:
            best, bounds = work.seconds(gpu), work.bounds(gpu)
            held = max(bounds, key=bounds.__getitem__) if bounds else ""
            cells += [f"{best * 1e6:.0f}", f"{best / bounds[held]:.0%}" if bounds else "", held]
        print(f"| {work.operator:44} | {work.size} | {work.rows} | {' | '.join(cells)} |")


def print_instructions(workers: int) -> None:
    """What INSTRUCTIONS holds, of the kernels as they are: builds each kernel that the table names, for every GPU."""
    from compile_gate import compile_cases, compile_one

    named = {(kernel, size) for work in table() for kernel, size, *_ in work.loops}
    wanted = [
        (False, i, its.arch)
        for its in GPUS.values()
        for i, case in enumerate(compile_cases(False, its.arch))
        if (case.kernel, case.size) in named and str(case.dtype) == "torch.bfloat16"
    ]
    with ProcessPoolExecutor(workers) as pool:
        built = list(pool.map(compile_one, *zip(*wanted, strict=True)))
    each = {f"{one.kernel}, {one.size}, {one.arch}": one.instructions_each for one in built}
    made = "python kernels/bench.py --roofline --json > kernels/instructions.json"
    print(json.dumps({"made": made, "each": each}, indent=1))


def _count(work: Work) -> str:
    return f"{work.atomics / 1e6:.1f} M" if work.atomics else ""

"""Times of every operator beside its alternatives, at OFA's own shapes: `python kernels/bench.py`.

p50 (p20 to p80) of forward and of forward + backward, the rate that comes of it, its share of the ceiling measured in
the same run (16-bit products, or a copy), and the memory beyond the inputs at its largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import contenders
import roofline
import torch
from contenders import Contender
from torch import Tensor

MIN_REPEATS, BUDGET_S = 5, 0.5


@dataclass(frozen=True)
class Measured:
    operator: str
    size: str
    rows: int
    contender: str
    forward_us: tuple[float, float, float]
    """p20, p50, p80; so is `both_us`, forward and backward."""
    both_us: tuple[float, float, float]
    rate: float
    """TFLOP/s of products, TB/s of what has none; of forward and backward."""
    share: float
    """Of the ceiling."""
    peak_MiB: float
    """0 on a CPU, where nobody counts."""


@dataclass(frozen=True)
class Case:
    operator: str
    size: str
    rows: int
    flops: float
    bytes: float
    make: Callable[[Tensor], list[Contender]]


def cases(small: bool) -> Iterator[Case]:
    """OFA's shapes; small: a few tiny ones, which a CPU can do."""
    for size in ["base"] if small else roofline.SIZES:
        heads, dim, ffn = roofline.SIZES[size]
        lengths = {kind: [(9, 9), (5, 5)] if kind != "cross" else [(4, 9), (3, 5)] for kind in roofline.MIX}
        groups = [(kind, "mix", lengths[kind] if small else examples) for kind, examples in roofline.MIX.items()]
        if not small:
            groups.append(("encoder", "8 x 980", roofline.LONG["encoder"]))
        for kind, label, examples in groups:
            yield _attention_case(size, heads, dim, kind, label, examples)
        rows = 16 if small else sum(queries for queries, _ in roofline.MIX["encoder"])
        for kind, width in (("norm", heads * dim), ("residual + norm", heads * dim), ("gelu + norm", ffn)):
            values = {"norm": 5, "residual + norm": 9, "gelu + norm": 5}[kind]
            yield Case(kind, size, rows, 0, 2 * values * rows * width, _norm_maker(kind, rows, width))
        tokens, vocab = (12, 50) if small else (sum(q for q, _ in roofline.MIX["decoder"]), roofline.VOCAB)
        work = 6 * tokens * vocab * heads * dim
        yield Case("vocabulary loss", size, tokens, work, 0, _loss_maker(tokens, heads * dim, vocab))


def _attention_case(size: str, heads: int, dim: int, kind: str, label: str, examples: contenders.Lengths) -> Case:
    works = roofline.attention(size, kind, list(examples), label)

    def make(like: Tensor) -> list[Contender]:
        return contenders.attentions(heads, dim, examples, causal=kind == "decoder", like=like)

    rows = sum(queries for queries, _ in examples)
    return Case(f"attention {kind}, {label}", size, rows, sum(work.flops for work in works), 0, make)


def _norm_maker(kind: str, rows: int, width: int) -> Callable[[Tensor], list[Contender]]:
    return lambda like: contenders.norms(kind, rows, width, like)


def _loss_maker(rows: int, width: int, vocab: int) -> Callable[[Tensor], list[Contender]]:
    return lambda like: contenders.losses(rows, width, vocab, like)


def measure(case: Case, like: Tensor, ceilings: tuple[float, float]) -> Iterator[Measured]:
    """Every contender that can run; one that has no memory for it is left out with a line on standard output."""
    for contender in case.make(like):
        try:
            forward, _ = _timed(lambda: contender.run(), like)  # noqa: B023
            both, peak_MiB = _timed(lambda: _forward_and_backward(contender), like)  # noqa: B023
        except torch.cuda.OutOfMemoryError:
            print(f"{case.operator} {case.size}: {contender.name} runs out of memory")
            continue
        work, ceiling = (case.flops, ceilings[0]) if case.flops else (case.bytes, ceilings[1])
        rate = work / (both[1] * 1e-6)
        yield Measured(
            case.operator, case.size, case.rows, contender.name, forward, both, rate / 1e12, rate / ceiling, peak_MiB
        )


def _forward_and_backward(contender: Contender) -> None:
    for leaf in contender.leaves:
        leaf.grad = None
    out = contender.run()
    out.backward(torch.ones_like(out))


def _timed(action: Callable[[], object], like: Tensor) -> tuple[tuple[float, float, float], float]:
    """((p20, p50, p80) in microseconds, peak memory beyond what was there in MiB)."""
    for _ in range(2):
        action()
    before = 0
    if like.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times: list[float] = []
    until = time.perf_counter() + BUDGET_S
    while len(times) < MIN_REPEATS or time.perf_counter() < until:
        times.append(_once(action, like))
    peak = torch.cuda.max_memory_allocated() - before if like.is_cuda else 0
    fifths = statistics.quantiles(times, n=5)
    return (fifths[0], statistics.median(times), fifths[3]), peak / 2**20


def _once(action: Callable[[], object], like: Tensor) -> float:
    """Microseconds; on a GPU between two events, with the cache of the device cleared before."""
    if not like.is_cuda:
        started = time.perf_counter()
        action()
        return (time.perf_counter() - started) * 1e6
    torch.empty(2**28, dtype=torch.uint8, device=like.device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def ceilings(like: Tensor, side: int) -> tuple[float, float]:
    """(FLOP/s of a product of side x side matrices, bytes/s of a copy), the best that this run sees."""
    a, b = (torch.randn(side, side, device=like.device).to(like.dtype) for _ in range(2))
    c = torch.empty_like(a)
    product, _ = _timed(lambda: torch.mm(a, b, out=c), like)
    copy, _ = _timed(lambda: c.copy_(a), like)
    return 2 * side**3 / (product[0] * 1e-6), 2 * a.numel() * a.element_size() / (copy[0] * 1e-6)


def run(device: str, small: bool) -> list[Measured]:
    like = torch.zeros((), device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    limits = ceilings(like, 8192 if device == "cuda" else 256)
    return [measured for case in cases(small) for measured in measure(case, like, limits)]


def table(results: list[Measured]) -> str:
    lines = [
        "| operator | size | rows | by | forward us (p20-p80) | both us (p20-p80) | T/s | of ceiling | MiB |",
        "|" + "---|" * 9,
    ]
    for each in results:
        forward, both = (f"{t[1]:.0f} ({t[0]:.0f}-{t[2]:.0f})" for t in (each.forward_us, each.both_us))
        lines.append(
            f"| {each.operator} | {each.size} | {each.rows} | {each.contender} | {forward} | {both} | "
            f"{each.rate:.3g} | {100 * each.share:.0f} % | {each.peak_MiB:.0f} |"
        )
    return "\n".join(lines)


def rows(results: list[Measured]) -> list[dict[str, object]]:
    """The machine-readable form."""
    return [asdict(each) for each in results]

"""Times of every operator beside its alternatives, at OFA's own shapes: `python kernels/bench.py`.

Time of the device: p50 (p20 to p80) between two events of forward and of forward + backward, the launches queued behind
a sleeping kernel, so that a host that is slower than the device does not show; caches are cleared before. Time of the
host: until the call returns, everything issued. Of both the larger counts in a step. Then the rate that comes of it,
its share of the ceiling measured in the same run (16-bit products, or a copy), and the memory beyond the inputs.

This runs in a process of its own (`speed_watch.py`), which may hang or die of one contender.
"""

from __future__ import annotations

import functools
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
FLUSH_BYTES = 2**28
"""Written before each repeat: more than a cache holds."""
LONGEST_SLEEP_S = 0.02


@dataclass(frozen=True)
class Filter:
    """What is measured; a text must be contained, an empty tuple takes all."""

    only: tuple[str, ...] = ()
    """Of operators."""
    size: tuple[str, ...] = ()
    """Names of sizes, whole."""
    case: tuple[str, ...] = ()
    """Of the examples' label: mix, 8 x 980."""
    contender: tuple[str, ...] = ()
    """Names of contenders, whole or up to a comma: `sdpa` is `sdpa, dense bias`."""

    def takes(self, case: Case) -> bool:
        found = _contains(case.operator, self.only) and _contains(case.label, self.case)
        return found and (not self.size or case.size in self.size)

    def takes_contender(self, name: str) -> bool:
        return not self.contender or any(name == part or name.startswith(f"{part},") for part in self.contender)


def _contains(text: str, parts: tuple[str, ...]) -> bool:
    return not parts or any(part in text for part in parts)


@dataclass(frozen=True)
class Measured:
    operator: str
    size: str
    rows: int
    contender: str
    forward_us: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """p20, p50, p80 on the device; so is `both_us`, forward and backward."""
    both_us: tuple[float, float, float] = (0.0, 0.0, 0.0)
    host_us: tuple[float, float] = (0.0, 0.0)
    """p50 until the calls returned, forward and both; on a CPU as on the device."""
    rate: float = 0.0
    """TFLOP/s of products, TB/s of what has none; of forward and backward."""
    share: float = 0.0
    """Of the ceiling."""
    peak_MiB: float = 0.0
    """0 on a CPU, where nobody counts."""
    problem: str = ""
    """Why there is no measurement, in a line."""


@dataclass(frozen=True)
class Case:
    operator: str
    size: str
    rows: int
    flops: float
    bytes: float
    make: Callable[[Tensor], list[Contender]]
    label: str = "mix"


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
    return Case(f"attention {kind}, {label}", size, rows, sum(work.flops for work in works), 0, make, label)


def _norm_maker(kind: str, rows: int, width: int) -> Callable[[Tensor], list[Contender]]:
    return lambda like: contenders.norms(kind, rows, width, like)


def _loss_maker(rows: int, width: int, vocab: int) -> Callable[[Tensor], list[Contender]]:
    return lambda like: contenders.losses(rows, width, vocab, like)


def measure(case: Case, contender: Contender, like: Tensor, ceilings: tuple[float, float]) -> Measured:
    """One contender; what it raises is told in place of the times."""
    what = (case.operator, case.size, case.rows, contender.name)
    try:
        forward, forward_host, _ = _timed(contender.run, like)
        both, both_host, peak_MiB = _timed(lambda: _forward_and_backward(contender), like)
    except Exception as error:  # whatever it is, the others are still to come
        return Measured(*what, problem=_told(error))
    work, ceiling = (case.flops, ceilings[0]) if case.flops else (case.bytes, ceilings[1])
    rate = work / (both[1] * 1e-6) if contender.same else 0.0
    return Measured(
        *what, forward, both, (forward_host, both_host), rate=rate / 1e12, share=rate / ceiling, peak_MiB=peak_MiB
    )


def _told(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _forward_and_backward(contender: Contender) -> None:
    out = contender.run()
    torch.autograd.grad(out, contender.leaves, _ones(out.shape, out.dtype, out.device))


@functools.cache
def _ones(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def _timed(action: Callable[[], object], like: Tensor) -> tuple[tuple[float, float, float], float, float]:
    """((p20, p50, p80) on the device, p50 on the host, both in microseconds, peak MiB beyond what was there)."""
    host_s = 0.0
    for _ in range(3):
        host_s = _issued(action)
    peak_MiB = _peak_MiB(action) if like.is_cuda else 0.0
    pairs: list[tuple[float, float]] = []
    until = time.perf_counter() + BUDGET_S
    while len(pairs) < MIN_REPEATS or time.perf_counter() < until:
        pairs.append(_once(action, like, host_s))
    device, host = zip(*pairs, strict=True)
    fifths = statistics.quantiles(device, n=5)
    return (fifths[0], statistics.median(device), fifths[3]), statistics.median(host), peak_MiB


def _issued(action: Callable[[], object]) -> float:
    """Seconds until the call returns."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _peak_MiB(action: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _once(action: Callable[[], object], like: Tensor, host_s: float) -> tuple[float, float]:
    """(on the device, on the host) in microseconds. host_s: about what the host takes to issue it."""
    if not like.is_cuda:
        took = _issued(action) * 1e6
        return took, took
    _flush_buffer(like.device).zero_()
    torch.cuda._sleep(int(_ticks_per_s() * min(2 * host_s + 1e-4, LONGEST_SLEEP_S)))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    issued = _issued(action)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3, issued * 1e6


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


@functools.cache
def _ticks_per_s() -> float:
    """Of the clock that `torch.cuda._sleep` counts."""
    ticks = 10_000_000
    torch.cuda._sleep(ticks)
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(ticks)
    torch.cuda.synchronize()
    return ticks / (time.perf_counter() - began)


def ceilings(like: Tensor, side: int) -> tuple[float, float]:
    """(FLOP/s of a product of side x side matrices, bytes/s of a copy), the best that this run sees."""
    a, b = (torch.randn(side, side, device=like.device).to(like.dtype) for _ in range(2))
    c = torch.empty_like(a)
    product, *_ = _timed(lambda: torch.mm(a, b, out=c), like)
    copy, *_ = _timed(lambda: c.copy_(a), like)
    return 2 * side**3 / (product[0] * 1e-6), 2 * a.numel() * a.element_size() / (copy[0] * 1e-6)


def run(device: str, small: bool, wanted: Filter, skip: int = 0) -> Iterator[tuple[int, Measured]]:
    """(number, contender) as each begins, with no time in it, then as it ends; numbers from 0 on, those from `skip` on.

    Where the inputs of a case cannot be made, that counts as one contender.
    """
    like = torch.zeros((), device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    limits, number = None, -1
    for case in filter(wanted.takes, cases(small)):
        try:
            found = case.make(like)
        except Exception as error:
            number += 1
            if number >= skip:
                yield number, Measured(case.operator, case.size, case.rows, "inputs", problem=_told(error))
            continue
        for contender in found:
            if not wanted.takes_contender(contender.name):
                continue
            number += 1
            if number < skip:
                continue
            yield number, Measured(case.operator, case.size, case.rows, contender.name)
            limits = limits or ceilings(like, 8192 if device == "cuda" else 256)
            yield number, measure(case, contender, like, limits)
            _ones.cache_clear()


HEAD = (
    "| operator | size | rows | by | forward us (p20-p80) | both us (p20-p80) | host us | T/s | of ceiling | MiB |\n"
    + "|" + "---|" * 10
)  # fmt: skip
"""Of the table whose lines are `line`'s."""


def line(each: Measured) -> str:
    what = f"| {each.operator} | {each.size} | {each.rows} | {each.contender} |"
    if each.problem:
        return f"{what} {each.problem} | | | | | |"
    forward, both = (f"{t[1]:.0f} ({t[0]:.0f}-{t[2]:.0f})" for t in (each.forward_us, each.both_us))
    host = f"{each.host_us[0]:.0f}, {each.host_us[1]:.0f}"
    return f"{what} {forward} | {both} | {host} | {each.rate:.3g} | {100 * each.share:.0f} % | {each.peak_MiB:.0f} |"


RULES = {"attention": "`plan_attention`", "vocabulary": "`PAYS_TOKENS`"}
"""By an operator's first word, where "auto" hands shapes to torch; that of norms is `MIN_ELEMENTS`, `MAX_WIDTH`."""


def slower(results: list[Measured]) -> list[str]:
    """A line for each operator and size at which ours, forward + backward, is not the fastest of what was measured.

    Whichever is later counts, the device or the host; variants of ours that compute less do not.
    """
    found: list[str] = []
    for own in (each for each in results if each.contender == "ofa-ds"):
        others = [
            each for each in results if (each.operator, each.size) == (own.operator, own.size) and not each.problem
            and not each.contender.startswith("ofa-ds")
        ]  # fmt: skip
        if not others:
            continue
        best = min(others, key=_counts)
        rule = RULES.get(own.operator.split()[0], "`MIN_ELEMENTS`, `MAX_WIDTH`")
        if own.problem:
            found.append(f"* {own.operator}, {own.size}: FAILS; hand the shape to torch in {rule}")
        elif _counts(own) > _counts(best):
            times = f"{_counts(own) / _counts(best):.2f} times {best.contender}'s time"
            found.append(f"* {own.operator}, {own.size}: {times}; mend it, or hand the shape to torch in {rule}")
    return found


def _counts(each: Measured) -> float:
    return max(each.both_us[1], each.host_us[1])


def row(each: Measured) -> dict[str, object]:
    """The machine-readable form."""
    return asdict(each)

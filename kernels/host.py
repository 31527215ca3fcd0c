"""What a call costs the host, with launches left out: `python kernels/bench.py --host`. Needs no GPU.

Ours and torch's own calls take turns in one process, on tensors so small that the work itself costs nothing, and the
CPU time of the thread is counted, so that a busy machine disturbs little. Compare ratios; microseconds are this CPU's.
Operations are what torch dispatches: those that run a kernel on a GPU, and those that only allocate or view.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ofa_kernels import _launch, attention, cross_entropy, layer_norm

FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "detach", "view", "_unsafe_view", "t", "transpose", "permute",
    "expand", "slice", "select", "unsqueeze", "squeeze", "alias", "as_strided", "split", "split_with_sizes", "unbind",
    "unsafe_split_with_sizes", "_reshape_alias", "lift_fresh", "promote_types",
}  # fmt: skip
"""Operators that start no kernel."""


class Operations(TorchDispatchMode):
    """Names of the operators that torch dispatches inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def working(self) -> list[str]:
        return [name for name in self.names if name not in FREE]


class Launches:
    """Counts launches in place of doing them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.count += 1


@contextlib.contextmanager
def stubbed() -> Iterator[Launches]:
    """Every operator chooses its kernel, on the CPU too, and no kernel starts: results are whatever memory holds."""
    from triton.runtime.jit import KernelInterface

    launches, choose = Launches(), _launch.use_triton

    def always(kernel: str, *others: Any, **options: Any) -> bool:
        return choose("triton" if kernel == "auto" else kernel, *others, **options)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", lambda kernel, grid: launches))
        stack.enter_context(mock.patch.object(_launch, "interpreting", lambda: True))
        for module in (attention, cross_entropy, layer_norm):
            stack.enter_context(mock.patch.object(module, "use_triton", always))
        yield launches


@dataclass(frozen=True)
class Pair:
    """One operator: ours, and what torch has for it. The first leaves are the ones that both have."""

    name: str
    ours: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    torch: Callable[[], Tensor] | None = None
    torch_leaves: Sequence[Tensor] = ()
    budget_us: float | None = None
    """Of our forward and backward."""


def _leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).requires_grad_()


def attention_pair(name: str, *, relative: bool, causal: bool, heads: int = 4, dim: int = 16) -> Pair:
    """One layer's attention. The plan, the positional vectors and SDPA's dense bias are there already."""
    queries, own = (attention.Tokens(torch.tensor([0, 5, 9]), torch.arange(9) % 5, 5) for _ in range(2))
    keys = queries if relative else own
    index = torch.arange(5)
    codes = attention.RelativeCodes(index + 4, index, 9) if relative else None
    plan = attention.plan_attention(queries, keys, relative=codes, causal=causal, kernel="triton")
    q, k, v = (_leaf(9, heads * dim) for _ in range(3))
    vectors = [x.detach().requires_grad_() for x in _wide_vectors(5, heads * dim)]
    positions = (*vectors, *(x.detach().bfloat16() for x in vectors))
    row, head_scale = _leaf(heads, 9) if relative else None, _leaf(heads)
    leaves = [x for x in (q, k, v, *vectors, row, head_scale) if x is not None]
    bias = torch.zeros(1, heads, 9, 9, dtype=torch.bfloat16)

    def ours() -> Tensor:
        return attention.attention((q, k, v), plan, positions, row, head_scale, scale=0.1, dropout=0.0)

    def plain() -> Tensor:
        split = (x.view(1, 9, heads, dim).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*split, attn_mask=bias, scale=0.1).transpose(1, 2)
        return (out * head_scale[:, None]).reshape(9, heads * dim)

    return Pair(name, ours, leaves, plain, (q, k, v, head_scale), budget_us=600)


def _wide_vectors(num: int, width: int) -> list[Tensor]:
    return [_leaf(num, width, dtype=torch.float32) for _ in range(2)]


def plan_pair() -> Pair:
    """All three kinds of attention of a batch, as the model plans them."""
    offsets, index = torch.tensor([0, 5, 9]), torch.arange(5)

    def ours() -> Tensor:
        encoder, decoder = (attention.Tokens(offsets, torch.arange(9) % 5, 5) for _ in range(2))
        codes = attention.RelativeCodes(index + 4, index, 9)
        for queries, keys, own in ((encoder, encoder, codes), (decoder, decoder, codes), (decoder, encoder, None)):
            plan = attention.plan_attention(queries, keys, relative=own, causal=own is not None, kernel="triton")
        return plan.queries.offsets

    return Pair("three plans, once a batch", ours, ())


def pairs() -> list[Pair]:
    x, residual, weight, bias = _leaf(9, 64), _leaf(9, 64), _leaf(64), _leaf(64)
    hidden, vocabulary, target = _leaf(9, 64), _leaf(50, 64), torch.arange(9) + 4

    def add() -> Tensor:
        z, y = layer_norm.add_layer_norm(residual, x, weight, bias, dropout=0.1)
        return z + y

    def plain_add() -> Tensor:
        z = residual + F.dropout(x, 0.1)
        return z + plain_norm(z)

    def plain_loss() -> Tensor:
        return F.cross_entropy((hidden @ vocabulary.T).float(), target, reduction="none", label_smoothing=0.1)

    def plain_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (64,), weight, bias)

    norm = (x, weight, bias)
    return [
        attention_pair("attention, encoder", relative=True, causal=False),
        attention_pair("attention, decoder", relative=True, causal=True),
        attention_pair("attention, cross", relative=False, causal=False),
        Pair("norm", lambda: layer_norm.layer_norm(*norm), norm, lambda: plain_norm(x), norm, 150),
        Pair("gelu + norm", lambda: layer_norm.gelu_layer_norm(*norm), norm, lambda: plain_norm(F.gelu(x)), norm, 150),
        Pair("residual + dropout + norm", add, (residual, *norm), plain_add, (residual, *norm)),
        Pair(
            "vocabulary loss",
            lambda: cross_entropy.linear_cross_entropy(hidden, vocabulary, target, label_smoothing=0.1)[0],
            (hidden, vocabulary), plain_loss, (hidden, vocabulary),
        ),
        plan_pair(),
    ]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    name: str
    forward_us: float
    both_us: float
    torch_forward_us: float | None
    torch_both_us: float | None
    launches: tuple[int, int]
    """In the forward, in the backward; so are the other two."""
    working: tuple[int, int]
    """Operations that run something on a GPU."""
    free: tuple[int, int]
    budget_us: float | None


def counted(pair: Pair) -> tuple[list[int], list[Operations]]:
    """(launches, operations) of ours, each for forward and backward."""
    with stubbed() as launches:
        with Operations() as forward:
            out = pair.ours()
        first = launches.count
        upstream = torch.ones_like(out)
        with Operations() as backward:
            if pair.leaves:
                torch.autograd.grad(out, pair.leaves, upstream)
        return [first, launches.count - first], [forward, backward]


def measure(pair: Pair, rounds: int = 40, calls: int = 10) -> Cost:
    launches, operations = counted(pair)
    with stubbed():
        runs = [_run(pair.ours, pair.leaves, backward) for backward in (False, True)]
        if pair.torch is not None:
            runs += [_run(pair.torch, pair.torch_leaves, backward) for backward in (False, True)]
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, taken in zip(runs, times, strict=True):
                begun = time.thread_time_ns()
                for _ in range(calls):
                    run()
                taken.append((time.thread_time_ns() - begun) / calls / 1e3)
    medians = [statistics.median(taken) for taken in times]
    return Cost(
        pair.name, *medians, *[None] * (4 - len(medians)), tuple(launches),
        tuple(len(each.working()) for each in operations),
        tuple(len(each.names) - len(each.working()) for each in operations), pair.budget_us,
    )  # fmt: skip


def _run(call: Callable[[], Tensor], leaves: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    if not (backward and leaves):
        return call
    upstream = torch.ones_like(call())
    return lambda: torch.autograd.grad(call(), leaves, upstream)


def table(costs: Sequence[Cost]) -> str:
    lines = [
        "| operator | forward / both, us | torch's own | ratio | budget | launches | operations | allocations, views |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for each in costs:
        theirs, ratio = "", ""
        if each.torch_both_us is not None:
            theirs = f"{each.torch_forward_us:.0f} / {each.torch_both_us:.0f}"
            ratio = f"{each.both_us / each.torch_both_us:.1f}"
        counts = (f"{a} + {b}" for a, b in (each.launches, each.working, each.free))
        lines.append(
            f"| {each.name} | {each.forward_us:.0f} / {each.both_us:.0f} | {theirs} | {ratio} | "
            f"{'' if each.budget_us is None else each.budget_us} | {' | '.join(counts)} |"
        )
    return "\n".join(lines)


def run() -> list[Cost]:
    with stubbed():
        every = pairs()
    return [measure(pair) for pair in every]

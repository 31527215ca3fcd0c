"""What a traced window of steps spent its time on: a table by kind of work, by kernel, by operator. Text for people."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

NS_PER_MS = 1e6
ROWS = 60
"""Kernels, or operators, that a table has at most; the others are one row."""
_NAME = 90
"""Characters of a name: those of templates run to thousands."""

_KINDS = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|barrier|broadcast_?coalesced"),
    ("vocabulary loss", r"cross_?entropy|nll|log_softmax|_Loss"),
    ("attention", r"attention|flash|softmax"),
    ("convolution", r"conv|im2col|col2im|winograd|max_?pool"),
    ("norm", r"ofa_kernels::(add_)?norm|layer_?norm|batch_?norm|_(Add)?Norm"),
    ("matrix product", r"gemm|cutlass|cublas|nvjet|wgmma|xmma|::(mm|addmm|bmm|baddbmm|linear|matmul|dot|mv)\b"),
    ("optimizer", r"multi_tensor|adam|foreach|lerp|addcdiv|addcmul"),
    ("copy", r"memcpy|memset|copy|::(to|clone|contiguous|cat|stack|zero_|fill_|zeros|pin_memory)\b"),
    ("look-up", r"index|gather|scatter|embedding|sort|unique|nonzero|masked|take"),
    ("elementwise", r"elementwise|vectorized|reduce|::(add|mul|div|sub|gelu|sum|mean|where|lt|gt|eq|isfinite)\w*\b"),
    (
        "view, new memory",
        r"::(view|_?reshape|_unsafe_view|slice|transpose|t|permute|as_strided|expand|select|narrow)\b|"
        r"::(unsqueeze|squeeze|unbind|unfold|flatten|detach|alias|lift_fresh|resize_|set_|split\w*|empty\w*|new_\w+)\b",
    ),
    ("autograd, hooks", r"autograd|Backward|Function"),
    ("launch, wait", r"^cuda|^hip|^cu[A-Z]"),
)
"""Kinds of work and what their names have in common; the first that fits counts."""
_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KINDS)


class Span(NamedTuple):
    """One traced event."""

    name: str
    start_ns: int
    duration_ns: int
    lane: tuple[int, int]
    """Thread of the host, or (device, stream): spans of one lane lie one after another or one in another."""
    on_device: bool


def spans_of(events: Iterable[Any]) -> list[Span]:
    """Of the tracer's raw events; people's own marks and what waits beside a thread are no work of its own.

    A kernel is named with the operator that launched it: our own kernels share names.
    """
    events = [event for event in events if not event.is_user_annotation() and not event.is_async()]
    on_device = [not str(event.device_type()).endswith(".CPU") for event in events]
    operators: dict[int, str] = {}
    if any(on_device):
        for event, is_kernel in zip(events, on_device, strict=True):
            if not is_kernel and not event.name().startswith("cu"):
                operators[event.correlation_id()] = event.name()
    found = []
    for event, is_kernel in zip(events, on_device, strict=True):
        name = event.name()
        if is_kernel:
            lane = (event.device_index(), event.device_resource_id())
            operator = operators.get(event.linked_correlation_id() or -1)
            name = f"{name} of {operator}" if operator else name
        else:
            lane = (-1, event.start_thread_id())
        found.append(Span(name, event.start_ns(), event.duration_ns(), lane, is_kernel))
    return found


def kind_of(name: str) -> str:
    """`matrix product` of a kernel's or an operator's name; `other` where none of the known kinds fits."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def self_ns(spans: Sequence[Span]) -> list[int]:
    """Of each span, its duration less that of the spans directly in it."""
    own = [span.duration_ns for span in spans]
    lanes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, span in enumerate(spans):
        lanes[span.lane].append(i)
    for members in lanes.values():
        members.sort(key=lambda i: (spans[i].start_ns, -spans[i].duration_ns))
        around: list[int] = []
        for i in members:
            start = spans[i].start_ns
            while around and spans[around[-1]].start_ns + spans[around[-1]].duration_ns <= start:
                around.pop()
            if around:
                own[around[-1]] -= spans[i].duration_ns
            around.append(i)
    return [max(0, each) for each in own]


def busy_ns(spans: Iterable[Span]) -> int:
    """Time in which at least one of them ran."""
    total, end = 0, -1
    for start, duration in sorted((span.start_ns, span.duration_ns) for span in spans):
        total += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def table(events: Iterable[Any], *, title: str, num_steps: int, wall_ns: float) -> str:
    """title: what was traced. wall_ns: how long its steps took."""
    spans = spans_of(events)
    pace = f"{num_steps} steps, {wall_ns / num_steps / NS_PER_MS:.2f} ms a step while traced"
    lines = [title, f"{pace} (tracing slows a step down: compare shares, not with step_ms of metrics.jsonl)", ""]
    device = [span for span in spans if span.on_device]
    host = [span for span in spans if not span.on_device]
    if device:
        lines.append(f"The accelerator was busy {busy_ns(device) / wall_ns:.1%} of the time.\n")
        lines += _tables("kernel", device, [span.duration_ns for span in device], num_steps)
    own = self_ns(host)
    lines.append(f"Operators of the host took {sum(own) / wall_ns:.1%} of the time, over all its threads: what is left")
    lines.append("is Python, and waiting.\n")
    lines += _tables("operator of the host (its own time)", host, own, num_steps)
    return "\n".join(lines) + "\n"


def _tables(what: str, spans: Sequence[Span], times_ns: Sequence[int], num_steps: int) -> list[str]:
    by_kind = _summed(spans, times_ns, lambda name: kind_of(name))
    by_name = _summed(spans, times_ns, lambda name: name)
    return [*_rows("kind of work", by_kind, num_steps), "", *_rows(what, by_name, num_steps), ""]


def _summed(spans: Sequence[Span], times_ns: Sequence[int], key: Callable[[str], str]) -> dict[str, list[float]]:
    """(ns, calls) of each key, the longest first."""
    keys: dict[str, str] = {}
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for span, time_ns in zip(spans, times_ns, strict=True):
        if span.name not in keys:
            keys[span.name] = key(span.name)
        entry = sums[keys[span.name]]
        entry[0] += time_ns
        entry[1] += 1
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def _rows(what: str, sums: dict[str, list[float]], num_steps: int) -> list[str]:
    total = sum(time_ns for time_ns, _ in sums.values()) or 1.0
    lines = [f"{'ms a step':>11} {'share':>7} {'calls a step':>13} {'us a call':>11}  {what}"]
    shown, left = list(sums.items())[:ROWS], list(sums.items())[ROWS:]
    if left:
        rest = [sum(values[i] for _, values in left) for i in (0, 1)]
        shown.append((f"({len(left)} others)", rest))
    for name, (time_ns, calls) in shown:
        text = name if len(name) <= _NAME else f"{name[: _NAME - 3]}..."
        lines.append(
            f"{time_ns / num_steps / NS_PER_MS:>11.3f} {time_ns / total:>7.1%} {calls / num_steps:>13.1f} "
            f"{time_ns / calls / 1000:>11.1f}  {text}"
        )
    return lines

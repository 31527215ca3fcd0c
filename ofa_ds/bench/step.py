"""`bench step`: forward + backward of tiny on one thread, beside the original's way of computing.

Two shapes. `pair`: batch 2, 256 px, 32 source and 16 target tokens. `mixed`: one pretraining micro-batch, 16
vision-language + 2 text + 1 image + 1 detection examples. The original runs the mixed one as two padded passes
(docs/ofa.md, Tasks: mix): each example with a picture of its own, the text-only ones with a zero picture, all texts
padded to the longest of their pass. Its time is that of `padded`, which computes the same losses from the same weights
in the original's way: in the same process and in turns with ours, so that a busy machine slows both. The time that the
original itself needed for the pair (ORIGINAL_PAIR_S) was recorded on another machine. FLOPs are counted in the warm-up.
Both ways run with our malloc settings (`keep_freed_memory`), which the original does not have.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ofa_ds.batch import Batch, pack
from ofa_ds.bench.padded import PaddedBatch, PaddedOFA, pad
from ofa_ds.data.example import Example
from ofa_ds.engine.host_memory import keep_freed_memory
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.model.products import without_onednn
from ofa_ds.terms import PAD_ID

ORIGINAL_PAIR_S = 1.008
"""Original OFA tiny on another machine, 1 thread: batch 2, 256 px, 32 / 16 tokens."""
VOCAB_SIZE = 59457
CODE_START = 50265
MATMUL_SIZE = 1024


def example(
    rng: np.random.Generator, *, side: int, source: int, target: int, task: str = "caption", sample: int = 0
) -> Example:
    """Random tokens and pixels. side 0: no picture; sample 0: all patches."""
    low, high = (CODE_START, CODE_START + 8192) if task == "image_infilling" else (4, CODE_START)
    ids = rng.integers(low, high, target)
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8) if side else None
    patches = np.sort(rng.choice((side // 16) ** 2, sample, replace=False)) if sample else None
    tokens = rng.integers(4, CODE_START, source)
    return Example(
        task=task, source=tokens, target=ids, prev=ids, image=image, patches=patches, code=task == "image_infilling"
    )


def pair_examples() -> list[Example]:
    rng = np.random.default_rng(0)
    return [example(rng, side=256, source=32, target=16) for _ in range(2)]


VISION_LANGUAGE_LENGTHS = ((9, 12), (21, 2), (12, 2), (17, 2), (21, 5), (15, 11), (9, 12), (21, 2)) * 2
"""(source, target) tokens of 16 examples: caption, matching, question, matching, grounding and region rows."""
EXTRA_LENGTHS = (
    ("text_infilling", 200, 257),
    ("text_infilling", 200, 257),
    ("image_infilling", 11, 257),
    ("detection", 10, 41),
)


def mixed_examples() -> tuple[list[Example], list[Example]]:
    """The original's two passes: two examples show each vision-language picture; the rest has 256 px or no picture."""
    rng = np.random.default_rng(0)
    first: list[Example] = []
    for i, (source, target) in enumerate(VISION_LANGUAGE_LENGTHS):
        new = example(rng, side=384, source=source, target=target, sample=196)
        first.append(replace(new, image=first[-1].image) if i % 2 else new)
    second = [
        example(rng, side=0 if task == "text_infilling" else 256, source=source, target=target, task=task)
        for task, source, target in EXTRA_LENGTHS
    ]
    return first, second


def packed_step(model: OFA, batch: Batch) -> Callable[[], None]:
    """Ours: one forward + backward of a packed batch."""

    def run() -> None:
        model.zero_grad()
        model(batch)[0].sum().backward()

    return run


def padded_step(model: OFA, passes: list[PaddedBatch]) -> Callable[[], None]:
    """The original's: a forward of each pass, then one backward; each loss is divided by its own targets."""
    padded = PaddedOFA(model)

    def run() -> None:
        model.zero_grad()
        with without_onednn():
            sum(padded(batch) / (batch.target != PAD_ID).sum() for batch in passes).backward()

    return run


def count_flops(run: Callable[[], None]) -> int:
    """FLOPs of the convolutions and matrix products in one run."""

    def baddbmm_flops(_: object, a_shape: Sequence[int], b_shape: Sequence[int], **__: object) -> int:
        return 2 * math.prod(a_shape) * b_shape[-1]

    def linear_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]

    # The counter knows neither the form of baddbmm that writes into its argument nor oneDNN's linear layer.
    more = {torch.ops.aten.baddbmm_: baddbmm_flops}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        more[torch.ops.mkldnn._linear_pointwise] = linear_flops
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        run()
    return counter.get_total_flops()


@dataclass(frozen=True, slots=True)
class Timing:
    seconds: list[float]
    gflop: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best_s(self) -> float:
        return min(self.seconds)


def time_in_turns(
    shape: str, ours: Callable[[], None], original: Callable[[], None], repeats: int
) -> tuple[Timing, Timing]:
    """Warm up both (and count their FLOPs), then time ours, the original's way, ours, ..."""
    runs = (("ofa-ds", ours), ("the original's way", original))
    gflop, seconds = [], [[], []]
    for name, run in runs:
        progress(f"{shape}: {name}, warming up")
        gflop.append(count_flops(run) / 1e9)
    for i in range(repeats):
        for times, (name, run) in zip(seconds, runs, strict=True):
            progress(f"{shape}: {name}, {i + 1} of {repeats}")
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return Timing(seconds[0], gflop[0]), Timing(seconds[1], gflop[1])


def matmul_rate() -> float:
    """GFLOP/s of the best of ten fp32 products of 1024 x 1024 matrices."""
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / min(seconds) / 1e9


def bench_step(pair_repeats: int, mixed_repeats: int) -> dict[str, float]:
    """Seconds, GFLOP and ratios ours / the original's way; one thread, fp32, train mode."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as every training process on a CPU does
    torch.manual_seed(0)
    model = OFA(preset("tiny", vocab_size=VOCAB_SIZE)).train()
    pair, (first, second) = pair_examples(), mixed_examples()
    steps = {
        "pair": (pack(pair, [(256, 256)], 16, 42), [pad(pair, 256)], pair_repeats),
        "mixed": (
            pack([*first, *second], [(384, 384), (256, 256)], 16, 42),
            [pad(first, 384), pad(second, 256)],
            mixed_repeats,
        ),
    }
    result = {"matmul_gflop_per_s": matmul_rate(), "pair_original_s": ORIGINAL_PAIR_S}
    for shape, (packed, passes, repeats) in steps.items():
        ours, padded = time_in_turns(shape, packed_step(model, packed), padded_step(model, passes), repeats)
        for name, timing in ((shape, ours), (f"{shape}_padded", padded)):
            result |= {f"{name}_s": timing.median_s, f"{name}_best_s": timing.best_s, f"{name}_gflop": timing.gflop}
        result[f"{shape}_ratio"] = ours.median_s / padded.median_s
        result[f"{shape}_best_ratio"] = ours.best_s / padded.best_s
    result["matmul_gflop_per_s"] = max(result["matmul_gflop_per_s"], matmul_rate())
    progress("")
    return result


def progress(text: str) -> None:
    """One line on standard error that the next one overwrites; a line each where it is not a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def table(result: dict[str, float]) -> str:
    lines = [f"{'':34} {'median s':>9} {'best s':>9} {'GFLOP':>7} {'GFLOP/s':>8}"]
    for shape in ("pair", "mixed"):
        for name, who in ((shape, "ofa-ds"), (f"{shape}_padded", "the original's way, here")):
            median_s, best_s, gflop = (result[f"{name}_{column}"] for column in ("s", "best_s", "gflop"))
            lines.append(f"{shape:6} {who:27} {median_s:9.3f} {best_s:9.3f} {gflop:7.0f} {gflop / best_s:8.0f}")
        if shape == "pair":
            lines.append(f"{shape:6} {'the original, its machine':27} {result['pair_original_s']:9.3f}   (recorded)")
        ratio, best_ratio = result[f"{shape}_ratio"], result[f"{shape}_best_ratio"]
        lines.append(f"{shape:6} {'ofa-ds / original, here':27} {ratio:8.2f}x {best_ratio:8.2f}x")
    rate = result["matmul_gflop_per_s"]
    lines.append(f"a {MATMUL_SIZE} x {MATMUL_SIZE} product runs at {rate:.0f} GFLOP/s here (one thread, fp32)")
    return "\n".join(lines)

"""`python -m ofa_ds.bench step`: forward + backward of tiny, beside the original at the same shapes.

Two shapes. `pair`: batch 2, 256 px, 32 source and 16 target tokens, for which the original's time is recorded
(ORIGINAL_PAIR_S). `mixed`: one pretraining micro-batch, 16 vision-language + 2 text + 1 image + 1 detection examples.
The original runs the mixed one as two padded passes (spec 02 section 8): each example with a picture of its own, the
text-only ones with a zero picture, all texts padded to the longest of their pass. Its time there is derived: the FLOPs
of the two padded passes, counted on our model by torch's FlopCounterMode, divided by the FLOP rate that the original
reached on the recorded shapes (the 256 px one for the second pass, the 384 px one with 196 patches for the first).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ofa_ds.data.batch import Batch, pack
from ofa_ds.data.tasks import Example
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.processes import keep_freed_memory

ORIGINAL_PAIR_S = 1.008
"""Original OFA tiny, 1 thread: batch 2, 256 px, 32 / 16 tokens."""
ORIGINAL_SAMPLED_S = 1.850
"""The same at 384 px with 196 sampled patches."""
VOCAB_SIZE = 59457
CODE_START = 50265


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


def pair_batch() -> Batch:
    rng = np.random.default_rng(0)
    return pack([example(rng, side=256, source=32, target=16) for _ in range(2)], [(256, 256)], 16, 42)


def sampled_batch() -> Batch:
    rng = np.random.default_rng(0)
    return pack([example(rng, side=384, source=32, target=16, sample=196) for _ in range(2)], [(384, 384)], 16, 42)


VISION_LANGUAGE_LENGTHS = ((9, 12), (21, 2), (12, 2), (17, 2), (21, 5), (15, 11), (9, 12), (21, 2)) * 2
"""(source, target) tokens of 16 examples: caption, matching, question, matching, grounding and region rows."""
EXTRA_LENGTHS = (
    ("text_infilling", 200, 257),
    ("text_infilling", 200, 257),
    ("image_infilling", 11, 257),
    ("detection", 10, 41),
)


def mixed_batch() -> Batch:
    """As we run it: 8 pictures for 16 vision-language examples, nothing padded, no picture for text."""
    rng = np.random.default_rng(0)
    examples = []
    for i, (source, target) in enumerate(VISION_LANGUAGE_LENGTHS):
        new = example(rng, side=384, source=source, target=target, sample=196)
        shared = new.image if i % 2 == 0 else examples[-1].image  # both examples of a row show one picture
        examples.append(Example(**{**_fields(new), "image": shared}))
    for task, source, target in EXTRA_LENGTHS:
        examples.append(
            example(rng, side=0 if task == "text_infilling" else 256, source=source, target=target, task=task)
        )
    return pack(examples, [(384, 384), (256, 256)], 16, 42)


def padded_passes() -> tuple[Batch, Batch]:
    """As the original runs it: two batches, each padded to its own longest, one picture an example."""
    rng = np.random.default_rng(0)
    source, target = (max(lengths) for lengths in zip(*VISION_LANGUAGE_LENGTHS, strict=True))
    first = [example(rng, side=384, source=source, target=target, sample=196) for _ in VISION_LANGUAGE_LENGTHS]
    source, target = (max(lengths) for lengths in list(zip(*EXTRA_LENGTHS, strict=True))[1:])
    second = [example(rng, side=256, source=source, target=target) for _ in EXTRA_LENGTHS]
    return pack(first, [(384, 384)], 16, 42), pack(second, [(256, 256)], 16, 42)


def _fields(value: Example) -> dict[str, object]:
    return {name: getattr(value, name) for name in Example.__dataclass_fields__}


def forward_backward(model: OFA, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(batch)[0].sum().backward()

    return run


def count_flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def seconds(run: Callable[[], None], repeats: int) -> list[float]:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def bench_step(repeats: int) -> dict[str, float]:
    """Medians in seconds, one thread, fp32, train mode; ratios to the original."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as every training process on a CPU does
    torch.manual_seed(0)
    model = OFA(preset("tiny", vocab_size=VOCAB_SIZE)).train()
    pair, mixed = forward_backward(model, pair_batch()), forward_backward(model, mixed_batch())
    pair_s, mixed_s = seconds(pair, repeats), seconds(mixed, max(repeats // 2, 1))
    flops = {
        "pair": count_flops(pair),
        "sampled": count_flops(forward_backward(model, sampled_batch())),
        "mixed": count_flops(mixed),
    }
    first, second = (count_flops(forward_backward(model, batch)) for batch in padded_passes())
    original_mixed_s = first * ORIGINAL_SAMPLED_S / flops["sampled"] + second * ORIGINAL_PAIR_S / flops["pair"]
    return {
        "pair_s": statistics.median(pair_s),
        "pair_original_s": ORIGINAL_PAIR_S,
        "mixed_s": statistics.median(mixed_s),
        "mixed_original_s": original_mixed_s,
        "mixed_ratio": statistics.median(mixed_s) / original_mixed_s,
        "mixed_gflop": flops["mixed"] / 1e9,
        "mixed_original_gflop": (first + second) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ofa_ds.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("step",), help="step: forward + backward of tiny on one thread")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = bench_step(options.repeats)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{'shape':8} {'ofa-ds s':>9} {'original s':>11}")
    mixed_s, padded_s, ratio = (result[f"mixed_{name}"] for name in ("s", "original_s", "ratio"))
    print(f"{'pair':8} {result['pair_s']:9.3f} {result['pair_original_s']:11.3f}   recorded")
    print(f"{'mixed':8} {mixed_s:9.3f} {padded_s:11.3f}   derived: {ratio:.2f}x")
    print(f"mixed: {result['mixed_gflop']:.0f} GFLOP, padded passes: {result['mixed_original_gflop']:.0f} GFLOP")


if __name__ == "__main__":
    main()

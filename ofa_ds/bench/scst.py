"""Time of the parts of an SCST micro-batch, and of its second forward beside one with an encoding a hypothesis.

On one thread, with rewards of captions as long as COCO's: what a model without training says is rewarded with nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ofa_ds.batch import Batch, pack
from ofa_ds.bench.cider import altered_captions, drawn_captions
from ofa_ds.data.document_frequency import count_ngrams
from ofa_ds.data.example import Example
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.model.config import ModelConfig, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.cider import CiderD
from ofa_ds.train.scst import beside_others, with_hypotheses

SEARCH = GenerationConfig(beams=5, max_len_b=16, no_repeat_ngram=3)
COUNTED = 2000
"""Pictures whose captions give the document frequencies."""


def bench_scst(
    repeats: int = 3, *, pictures: int = 4, side: int = 256, config: ModelConfig | None = None
) -> dict[str, Any]:
    """{"pictures", "side", "search_s", "reward_s", "second_s", "copies_s": medians, "loss", "loss_of_copies"}."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = config or preset("tiny", vocab_size=59457, activation_checkpointing=False)
        return _bench(repeats, pictures, side, config)
    finally:
        torch.set_num_threads(threads)


def _bench(repeats: int, pictures: int, side: int, config: ModelConfig) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    model = OFA(config)
    examples = [_example(rng, side) for _ in range(pictures)]
    batch = _packed(examples, side, config)
    references = [drawn_captions(rng, SEARCH.beams) for _ in range(pictures)]
    scorer = CiderD(count_ngrams([drawn_captions(rng, SEARCH.beams) for _ in range(COUNTED)]))
    times: dict[str, list[float]] = {"search": [], "reward": [], "second": [], "copies": []}
    losses: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        times[name].append(time.perf_counter() - began)
        return result

    for _ in range(repeats):
        found = timed("search", lambda: generate(model.eval(), batch, SEARCH))
        captions = [altered_captions(rng, each) for each in references]
        scores = timed("reward", lambda captions=captions: [*map(scorer.scores, captions, references)])
        tokens = [[hypothesis.tokens for hypothesis in hypotheses] for hypotheses in found]
        pairs = zip(scores, tokens, strict=True)
        rewards = [reward for each, own in pairs for reward in beside_others(each[: len(own)])]
        spoken = with_hypotheses(batch, tokens, rewards)
        runs = [(example, each) for example, own in zip(examples, tokens, strict=True) for each in own]
        copies = _packed([_saying(*run) for run in runs], side, config)
        for name, given in (("second", spoken), ("copies", copies)):
            weighed = dataclasses.replace(given, loss_weight=spoken.loss_weight)
            losses[name] = timed(name, lambda weighed=weighed: _step(model.train(), weighed))
    medians = {f"{name}_s": statistics.median(each) for name, each in times.items()}
    return {"pictures": pictures, "side": side, **medians, "loss": losses["second"], "loss_of_copies": losses["copies"]}


def _example(rng: np.random.Generator, side: int) -> Example:
    return Example(
        task="caption_scst", source=np.array([0, 10, 11, 12, 13, 14, 15, 2]), target=np.array([2]), prev=np.array([0]),
        image=rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
    )  # fmt: skip


def _saying(example: Example, tokens: list[int]) -> Example:
    return dataclasses.replace(example, target=np.array(tokens), prev=np.array([0, *tokens[:-1]]))


def _packed(examples: list[Example], side: int, config: ModelConfig) -> Batch:
    return pack(examples, [(side, side)], config.patch_size, config.image_bucket_size)


def _step(model: OFA, batch: Batch) -> float:
    """Forward and backward; pictures go through the backbone once in either way."""
    loss_M, _, _ = model(batch)
    loss = (loss_M * batch.loss_weight).sum()
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


def table(result: dict[str, Any]) -> str:
    rows = (
        ("search, 5 beams", result["search_s"]), ("rewards", result["reward_s"]),
        ("second forward and backward", result["second_s"]),
        ("the same, each hypothesis encoded by itself", result["copies_s"]),
    )  # fmt: skip
    lines = [f"SCST of {result['pictures']} pictures of {result['side']} px, one thread"]
    lines += [f"{name:45}{seconds:8.3f} s" for name, seconds in rows]
    lines.append(f"encoded once: x {result['copies_s'] / result['second_s']:.2f}; losses {result['loss']:.6f} and "
                 f"{result['loss_of_copies']:.6f}")  # fmt: skip
    return "\n".join(lines)

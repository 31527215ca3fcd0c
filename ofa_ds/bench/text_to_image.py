"""`bench text_to_image`: 24 pictures of one caption, 1,024 codes each, beside the same sampling written plainly.

tiny with OFA's vocabulary, top-k 256. Ours: the caption once through the encoder, all samples as rows of one batch with
caches, logits of the codes alone. Plainly: each step runs all tokens so far and takes the logits of the last one over
the whole vocabulary; all samples together, or one after the other. That would take an hour: steps of some lengths are
timed, and the sum over all lengths is that of the lines between them. One after the other is one sample, times 24.

In one process by turns, so that a busy machine slows both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofa_ds.batch import Batch, pack
from ofa_ds.bench.generate import told
from ofa_ds.bench.padded import PaddedOFA
from ofa_ds.bench.padded_generation import PaddedState, previous, repeated
from ofa_ds.bench.step import CODE_START, VOCAB_SIZE, progress
from ofa_ds.data.example import Example
from ofa_ds.engine.host_memory import peak_resident_bytes
from ofa_ds.inference.draws import SeededDraw
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.model.products import without_onednn

SAMPLES, SIDE, CAPTION_TOKENS = 24, 256, 22
CODES = (CODE_START, CODE_START + 8192)
SHARES = (0.0, 0.25, 0.5, 1.0)
"""Of the whole length, where a step without caches is timed."""


class UncachedCodes:
    """What `generate` asks of a model: no caches, padded, each sample with a memory of its own."""

    def __init__(self, model: OFA) -> None:
        self.model, self.padded = model, PaddedOFA(model)

    def start_decoding(self, batch: Batch, beams: int = 1, *, read: object = None) -> PaddedState:
        """batch: of one text."""
        encoded = self.model.encode(batch)
        states_S1D, position_1SD = encoded.memory_ND[:, None], encoded.position_UD[encoded.position_N][None]
        memory = (states_S1D, torch.zeros(1, len(states_S1D), dtype=torch.bool), position_1SD)
        return PaddedState(torch.empty(beams, 0, dtype=torch.int64), repeated(memory, beams))

    def decode_step(self, tokens_R: Tensor, state: PaddedState, id_range: tuple[int, int] | None = None) -> Tensor:
        state.tokens_RL = torch.cat([state.tokens_RL, tokens_R[:, None]], 1)
        hidden_RD = self.padded.decode(previous(state.tokens_RL, code=True), *state.memory)[-1]
        return self.model.logits(hidden_RD, id_range)


def model_of(size: str, side: int) -> OFA:
    torch.manual_seed(0)
    return OFA(preset(size, vocab_size=VOCAB_SIZE, code_image_size=side)).eval().requires_grad_(False)


def caption(model: OFA, tokens: int = CAPTION_TOKENS) -> Batch:
    source = np.array([0, *np.random.default_rng(0).integers(4, CODE_START, tokens - 2), 2])
    none = np.array([0])
    example = Example(task="text_to_image", source=source, target=none, prev=none, code=True)
    return pack([example], [], model.config.patch_size, model.config.image_bucket_size)


def config_of(samples: int, side: int) -> GenerationConfig:
    num = (side // 8) ** 2
    return GenerationConfig(
        beams=samples, min_len=num, max_len_b=num, gen_code=True, constraint_range=CODES, sampling=True, top_k=256
    )


@torch.no_grad()
def plain_seconds(model: OFA, batch: Batch, samples: int, lengths: Sequence[int]) -> list[tuple[float, float]]:
    """(seconds, seconds of the processor) of a step without caches that has so many tokens to run."""
    plain, found = UncachedCodes(model), []
    for length in lengths:
        progress(f"without caches: {samples} sample(s), {length} tokens")
        state = plain.start_decoding(batch, samples)
        state.tokens_RL = torch.randint(*CODES, (samples, length - 1), generator=torch.Generator().manual_seed(length))
        with without_onednn():
            start, worked = time.perf_counter(), time.process_time()
            plain.decode_step(torch.zeros(samples, dtype=torch.int64), state)
            found.append((time.perf_counter() - start, time.process_time() - worked))
    return found


def whole(lengths: Sequence[int], seconds: Sequence[float], steps: int) -> float:
    """Of so many steps, each a token longer, by the lines between those timed; after the last as that one."""
    return float(np.interp(np.arange(1, steps + 1), lengths, seconds).sum())


def bench_painting(threads: int, repeats: int, *, size: str, samples: int, side: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    model = model_of(size, side)
    batch, config = caption(model), config_of(samples, side)
    ours: list[tuple[float, float]] = []
    for i in range(repeats):
        progress(f"text to image, {threads} threads: ofa-ds, {i + 1} of {repeats}")
        start, worked = time.perf_counter(), time.process_time()
        generate(model, batch, config, draw=SeededDraw(range(samples)))
        ours.append((time.perf_counter() - start, time.process_time() - worked))
    peak = peak_resident_bytes() / 2**20
    result = {"threads": threads, "samples": samples, "codes": config.max_len_b, "peak_MiB": peak, **told("ours", ours)}
    steps = config.max_len_b + 1
    lengths = sorted({1 + round(share * (config.max_len_b - 1)) for share in SHARES})
    plain_seconds(model, batch, 1, lengths[:1])
    for name, together, times in (("together", samples, 1), ("alone", 1, samples)):
        seconds, worked = zip(*plain_seconds(model, batch, together, lengths), strict=True)
        result |= told(name, [(times * whole(lengths, seconds, steps), times * whole(lengths, worked, steps))])
    return result


def bench_text_to_image(
    repeats: int, *, threads: Sequence[int] = (1, 2), size: str = "tiny", samples: int = SAMPLES, side: int = SIDE
) -> dict[str, Any]:
    runs = [bench_painting(each, repeats, size=size, samples=samples, side=side) for each in threads]
    progress("")
    return {"size": size, "side": side, "runs": runs}


def table(result: dict[str, Any]) -> str:
    lines = []
    for each in result["runs"]:
        lines.append(
            f"{each['samples']} pictures of {each['codes']} codes, {result['size']}, {each['threads']} thread(s); "
            f"peak {each['peak_MiB']:.0f} MiB"
        )
        lines.append(f"{'':44} {'median s':>9} {'cpu s':>9} {'pictures/s':>11} {'times (cpu)':>12}")
        for name, what in (
            ("ours", "ofa-ds: caches, codes alone"), ("together", "without caches, one batch (extrapolated)"),
            ("alone", "without caches, one by one (extrapolated)"),
        ):  # fmt: skip
            seconds, worked = each[f"{name}_s"], each[f"{name}_cpu_s"]
            rate, times = each["samples"] / seconds, worked / each["ours_cpu_s"]
            lines.append(f"  {what:42} {seconds:9.1f} {worked:9.1f} {rate:11.4f} {times:11.1f}x")
    return "\n".join(lines)

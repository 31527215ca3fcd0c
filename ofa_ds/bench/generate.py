"""`bench generate`: captions by beams, and the scores of all answers of a list, beside the original's way.

Captions: 64 pictures of 256 px, tiny, 5 beams, 16 tokens, no three tokens twice; ours with caches over packed batches,
beside the same search without caches (each step runs all tokens so far), padded, each beam with a memory of its own,
with logits of all positions, as the original's generator has them then, or of the last one only.

Candidates: questions about a picture, a model of base's size, a list of 3,129 answers that share their beginnings as
real ones do; ours as one tree, beside the original's loop over chunks of 20 answers, each a row with a memory of its
own and logits of the whole vocabulary. Of the loop some chunks are timed and all are counted: chunks of one length have
the same FLOPs. Both times have the encoder in them, the FLOPs are the decoder's.

In one process by turns, so that a busy machine slows both.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofa_ds.batch import Batch, pack
from ofa_ds.bench.padded import PaddedBatch, PaddedOFA, pad
from ofa_ds.bench.padded_generation import CHUNK, UncachedModel, chunked_scores, chunks_of
from ofa_ds.bench.step import CODE_START, VOCAB_SIZE, count_flops, progress
from ofa_ds.data.example import Example
from ofa_ds.engine.host_memory import keep_freed_memory
from ofa_ds.inference.candidate_scores import candidate_scores
from ofa_ds.inference.generate import GenerationConfig, Hypothesis, generate
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.model.products import without_onednn
from ofa_ds.tasks.candidates import Candidates

PICTURES, PICTURES_A_BATCH, CAPTION_SIDE = 64, 32, 256
CAPTION_TOKENS, QUESTION_TOKENS = 9, 12
"""Of the sources, bos and eos included: " what does the image describe?", a question."""
CAPTIONS = GenerationConfig(beams=5, max_len_b=16, no_repeat_ngram=3)
NUM_ANSWERS, ANSWER_SIDE = 3129, 480
ANSWER_LENGTHS = (0.575, 0.246, 0.160, 0.015, 0.004)
"""Share of answers with 1, 2, ... tokens: of 1,926 answers to questions about COCO pictures."""


def asked(num: int, side: int, source: int, seed: int = 0) -> list[Example]:
    """Random pictures; sources as long as each other, that differ but for bos and eos."""
    rng = np.random.default_rng(seed)
    bos = np.array([0])
    return [
        Example(
            task="caption", source=np.array([0, *rng.integers(4, CODE_START, source - 2), 2]), target=bos, prev=bos,
            image=rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        )
        for _ in range(num)
    ]  # fmt: skip


def answer_list(num: int = NUM_ANSWERS, seed: int = 0) -> Candidates:
    """Distinct answers of random tokens; longer ones begin with frequent words, as real ones do."""
    rng = np.random.default_rng(seed)
    frequent = rng.permutation(CODE_START - 4)[: num // 4] + 4
    ids: dict[tuple[int, ...], None] = {}
    while len(ids) < num:
        length = 1 + int(rng.choice(len(ANSWER_LENGTHS), p=ANSWER_LENGTHS))
        rest = rng.integers(4, CODE_START, length - 1).tolist()
        common = int(frequent[int(len(frequent) * rng.random() ** 2)])
        ids[(int(rng.integers(4, CODE_START)) if length == 1 else common, *rest)] = None
    return Candidates(answers=tuple(map(str, range(num))), ids=tuple(ids))


def packed(model: OFA, examples: Sequence[Example], side: int) -> Batch:
    return pack(examples, [(side, side)], model.config.patch_size, model.config.image_bucket_size)


def random_model(size: str) -> OFA:
    torch.manual_seed(0)
    return OFA(preset(size, vocab_size=VOCAB_SIZE)).eval().requires_grad_(False)


def in_turns(what: str, runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, seconds of the processor) of each run, by turns; each has run before."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for i in range(repeats):
        for name, run in runs.items():
            progress(f"{what}: {name}, {i + 1} of {repeats}")
            start, worked = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - start, time.process_time() - worked))
    return times


def told(name: str, times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Median, best, and the median of what the processor worked: on a machine with other work, which it waits for."""
    seconds, worked = zip(*times, strict=True)
    best = {f"{name}_s": statistics.median(seconds), f"{name}_best_s": min(seconds)}
    return best | {f"{name}_cpu_s": statistics.median(worked)}


def bench_captions(threads: int, repeats: int) -> dict[str, float]:
    """Seconds for all pictures, ours and without caches and packing; the share that have the same best caption."""
    torch.set_num_threads(threads)
    model, examples = random_model("tiny"), asked(PICTURES, CAPTION_SIDE, CAPTION_TOKENS)
    parts = [examples[at : at + PICTURES_A_BATCH] for at in range(0, PICTURES, PICTURES_A_BATCH)]
    batches = [packed(model, part, CAPTION_SIDE) for part in parts]
    padded = [pad(part, CAPTION_SIDE) for part in parts]
    found: dict[str, list[list[Hypothesis]]] = {}

    def ours() -> None:
        found["ours"] = [each for batch in batches for each in generate(model, batch, CAPTIONS)]

    def theirs(name: str, last_only: bool) -> None:
        with without_onednn():
            models = [UncachedModel(model, each, last_only=last_only) for each in padded]
            pairs = zip(models, batches, strict=True)
            found[name] = [each for plain, batch in pairs for each in generate(plain, batch, CAPTIONS)]

    runs = {"ours": ours, **{name: partial(theirs, name, last) for name, last in (("all", False), ("last", True))}}
    in_turns(f"captions, {threads} threads, warming up", {"ours": ours}, 1)
    times = in_turns(f"captions, {threads} threads", runs, repeats)
    pairs = [zip(found["ours"], found[name], strict=True) for name in ("all", "last")]
    same = [a[0].tokens == b[0].tokens for pair in pairs for a, b in pair]
    result = {"threads": threads, "same": sum(same) / len(same)}
    for name, each in times.items():
        result |= told(name, each)
    return result


def bench_candidates(threads: int, repeats: int, num_questions: int, num_chunks: int) -> dict[str, float]:
    """Seconds and decoder FLOPs of all answers to the questions, ours and by the original's loop; how far apart."""
    torch.set_num_threads(threads)
    model, candidates = random_model("base"), answer_list()
    examples = asked(num_questions, ANSWER_SIDE, QUESTION_TOKENS)
    prompts = [example.source[1:-1].tolist() for example in examples]
    batch, padded = packed(model, examples, ANSWER_SIDE), PaddedOFA(model)
    rows = pad(examples, ANSWER_SIDE)
    count = -(-NUM_ANSWERS // CHUNK)
    which = sorted({int(place) for place in np.linspace(0, count - 1, min(num_chunks, count)).round()})
    chunks = chunks_of(prompts, candidates, VOCAB_SIZE, which)
    loop: list[tuple[float, ...]] = []
    found: dict[str, Tensor] = {}

    def ours() -> None:
        found["ofa-ds"] = candidate_scores(model, batch, prompts, candidates)

    @torch.no_grad()
    def theirs() -> None:
        with without_onednn():
            begin = time.perf_counter(), time.process_time()
            memory = padded.encode(rows)
            middle = time.perf_counter(), time.process_time()
            found["loop"] = chunked_scores(padded, memory, chunks)
            end = time.perf_counter(), time.process_time()
            share = len(which) / count
            loop.append(tuple(b - a + (c - b) / share for a, b, c in zip(begin, middle, end, strict=True)))

    progress("candidates: counting")
    flops = decoder_flops(model, batch, padded, prompts, candidates, rows)
    runs = {"ofa-ds": ours, "the original's loop": theirs}
    in_turns("candidates, warming up", runs, 1)
    loop.clear()
    seconds = in_turns("candidates", runs, repeats)["ofa-ds"]
    columns = [c for chunk in which for c in range(chunk * CHUNK, min((chunk + 1) * CHUNK, NUM_ANSWERS))]
    return {
        "threads": threads, "questions": num_questions, "chunks": len(which), "all_chunks": count,
        **told("ours", seconds), **told("loop", loop), **flops,
        "apart": float((found["ofa-ds"][:, columns] - found["loop"]).abs().max()),
    }  # fmt: skip


@torch.no_grad()
def decoder_flops(
    model: OFA, batch: Batch, padded: PaddedOFA, prompts: list[list[int]], candidates: Candidates, rows: PaddedBatch
) -> dict[str, float]:
    """GFLOP of both without the encoder's, by torch's counter; of the loop, a chunk of each length."""
    encoder = count_flops(lambda: model.encode(batch))
    ours = count_flops(lambda: candidate_scores(model, batch, prompts, candidates)) - encoder
    starts = range(0, NUM_ANSWERS, CHUNK)
    shapes = [(len(part), max(map(len, part))) for part in (candidates.ids[at : at + CHUNK] for at in starts)]
    memory = padded.encode(rows)
    loop = 0
    for shape, times in collections.Counter(shapes).items():
        (chunk,) = chunks_of(prompts, candidates, VOCAB_SIZE, [shapes.index(shape)])
        loop += times * count_flops(lambda chunk=chunk: chunked_scores(padded, memory, [chunk]))
    return {"ours_gflop": ours / 1e9, "loop_gflop": loop / 1e9}


def bench_generate(repeats: int, questions: int, chunks: int, what: str = "both") -> dict[str, Any]:
    keep_freed_memory()
    result: dict[str, Any] = {}
    if what in ("both", "captions"):
        result["captions"] = [bench_captions(threads, repeats) for threads in (1, 2)]
    if what in ("both", "candidates"):
        result["candidates"] = [bench_candidates(1, repeats, questions, chunks)]
    progress("")
    return result


def table(result: dict[str, Any]) -> str:
    head = f"{'':52} {'median s':>9} {'best s':>8} {'cpu s':>8}"
    lines = []
    for each in result.get("captions", []):
        title = f"captions of {PICTURES} pictures, tiny, {CAPTION_SIDE} px, 5 beams, {each['threads']} thread(s)"
        lines += [title, head, _row("ofa-ds: caches, packed", each, "ours")]
        for name, what in (("all", "all positions"), ("last", "the last position")):
            lines.append(_row(f"without either, logits of {what}", each, name))
            lines.append(_ratio(each, name))
        lines.append(f"  the same caption for {each['same']:.0%}")
    for each in result.get("candidates", []):
        what = f"{NUM_ANSWERS} answers to {each['questions']} question(s), base, {ANSWER_SIDE} px"
        lines += [f"{what}, {each['threads']} thread(s)", head]
        lines.append(_row(f"ofa-ds: one tree, {each['ours_gflop']:.0f} GFLOP of the decoder", each, "ours"))
        chunks = f"{each['chunks']} of {each['all_chunks']} chunks timed"
        lines.append(_row(f"the loop, {each['loop_gflop']:.0f} GFLOP, {chunks}", each, "loop"))
        lines.append(_ratio(each, "loop"))
        flops = each["loop_gflop"] / each["ours_gflop"]
        lines.append(f"  {flops:.0f}x the FLOPs; scores at most {each['apart']:.1e} apart")
    return "\n".join(lines)


COLUMNS = ("s", "best_s", "cpu_s")


def _row(what: str, each: dict[str, float], name: str) -> str:
    median, best, worked = (each[f"{name}_{column}"] for column in COLUMNS)
    return f"  {what:50} {median:9.2f} {best:8.2f} {worked:8.2f}"


def _ratio(each: dict[str, float], name: str) -> str:
    ratios = (each[f"{name}_{column}"] / each[f"ours_{column}"] for column in COLUMNS)
    return f"  {'':50} {next(ratios):8.1f}x {next(ratios):7.1f}x {next(ratios):7.1f}x"

"""How a model answers: every candidate scored, or a search with beams (docs/downstream.md, How answers are found)."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

from ofa_ds.data.example import Example
from ofa_ds.inference.candidate_scores import candidate_scores
from ofa_ds.inference.draws import SeededDraw
from ofa_ds.inference.generate import GenerationConfig, Hypothesis, generate
from ofa_ds.inference.loaded_model import LoadedModel, Told, batches, untold
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.tasks.context import PIXELS_PER_CODE
from ofa_ds.tasks.kind import Decoding, Task

MAX_TOGETHER = 64
"""Samples that are rows of one batch: of 1,024 codes each, a large model keeps about 100 MB for each in fp32."""


def answer(
    loaded: LoadedModel, examples: Sequence[Example], task: Task, *, candidates: Candidates | None = None,
    decoding: Decoding | None = None, told: Told = untold,
) -> list[list[int]]:  # fmt: skip
    """Token ids of the answer to each example, without bos, decoder prompt and eos; all of the downstream `task`.

    candidates: the possible answers (`Context.candidates`); None leaves the answers open. decoding: in place of the
    task's own. Where it says `candidates`, each one is scored and the best is taken, the first of equal ones; else
    beams search, and with candidates they stay among them. An answer is empty where nothing was found.
    Raises ValueError: a prompt and the longest answer together are longer than the model's positions.
    """
    decoding = decoding or task.decoding
    answers: list[list[int]] = []
    room = decoding.beams * _num_codes(loaded) if decoding.codes else 0
    for part in batches(examples, loaded.model.config.patch_size, room):
        if decoding.candidates and candidates is not None:
            prompts = [example.prompt.tolist() for example in part]
            best = candidate_scores(loaded.model, loaded.pack(part), prompts, candidates).argmax(1).tolist()
            answers += [list(candidates.ids[place]) for place in best]
        elif decoding.codes:
            answers += [hypotheses[0].tokens[:-1] for hypotheses in _painted(loaded, part, decoding)]
        else:
            answers += _searched(loaded, part, decoding, candidates)
        told(len(part))
    return answers


def samples(
    loaded: LoadedModel, examples: Sequence[Example], task: Task, number: int, told: Told = untold
) -> list[list[list[int]]]:
    """Of each example so many runs of image codes, as the `task` draws them; the first is its `answer`."""
    found: list[list[list[int]]] = []
    for part in batches(examples, loaded.model.config.patch_size, min(number, MAX_TOGETHER) * _num_codes(loaded)):
        runs: list[list[list[int]]] = [[] for _ in part]
        for first in range(0, number, MAX_TOGETHER):
            decoding = dataclasses.replace(task.decoding, beams=min(MAX_TOGETHER, number - first))
            for run, hypotheses in zip(runs, _painted(loaded, part, decoding, first), strict=True):
                run += [each.tokens[:-1] for each in sorted(hypotheses, key=lambda each: each.beam)]
        found += runs
        told(len(part))
    return found


def codes_config(loaded: LoadedModel, **options: Any) -> GenerationConfig:
    """A whole run of image codes, and nothing else: as many as data.code_image_size has, among those there are.

    Raises ValueError where the model has places for a picture of another size, or none for any.
    """
    vocab, side, own = loaded.vocab, loaded.recipe.data.code_image_size, loaded.model.config
    if own.use_ofasys or vocab.num_codes < 1:
        raise ValueError(f"{loaded.path or 'the model'}: has no image codes, so that it cannot paint")
    if side != own.code_image_size:
        raise ValueError(
            f"data.code_image_size {side}: the model has places for the codes of {own.code_image_size} x "
            f"{own.code_image_size} pixels; leave it out"
        )
    num = _num_codes(loaded)
    return GenerationConfig(
        min_len=num, max_len_b=num, gen_code=True, constraint_range=(vocab.code_start, vocab.bin_start), **options
    )


def _num_codes(loaded: LoadedModel) -> int:
    return (loaded.recipe.data.code_image_size // PIXELS_PER_CODE) ** 2


def _painted(
    loaded: LoadedModel, examples: Sequence[Example], decoding: Decoding, first: int = 0
) -> list[list[Hypothesis]]:
    """Of each example the samples from number `first` on; their seeds follow from the row's id and the number alone."""
    config = codes_config(loaded, beams=decoding.beams, sampling=decoding.top_k > 0, top_k=decoding.top_k)
    numbers = range(first, first + decoding.beams)
    seeds = [zlib.crc32(f"{example.row_id}/{number}".encode()) for example in examples for number in numbers]
    draw = SeededDraw(seeds) if config.sampling else None
    return generate(loaded.model, loaded.pack(examples), config, draw=draw)


def _searched(
    loaded: LoadedModel, examples: Sequence[Example], decoding: Decoding, candidates: Candidates | None
) -> list[list[int]]:
    """The best hypothesis of each example."""
    prompts = [example.prompt.tolist() for example in examples]
    room = loaded.model.config.max_positions + 1 - max(map(len, prompts))
    if room < 1:
        raise ValueError(f"a prompt of {max(map(len, prompts))} tokens leaves no position of the decoder for an answer")
    config = GenerationConfig(
        beams=decoding.beams, min_len=decoding.min_len, max_len_b=min(decoding.max_len, room),
        no_repeat_ngram=decoding.no_repeat_ngram, len_penalty=decoding.len_penalty, normalize=decoding.normalize,
        only_range=(loaded.vocab.bin_start, loaded.vocab.size) if decoding.bins_only else None,
    )  # fmt: skip
    trie = candidates.trie if candidates is not None else None
    found = generate(loaded.model, loaded.pack(examples), config, prompts=prompts, trie=trie)
    return [hypotheses[0].tokens[:-1] if hypotheses else [] for hypotheses in found]

"""How a model answers: every candidate scored, or a search with beams (docs/downstream.md, How answers are found)."""

from __future__ import annotations

from collections.abc import Sequence

from ofa_ds.data.example import Example
from ofa_ds.inference.candidate_scores import candidate_scores
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.inference.loaded_model import LoadedModel, Told, batches, untold
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.tasks.kind import Decoding, Task


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
    for part in batches(examples, loaded.model.config.patch_size):
        if decoding.candidates and candidates is not None:
            prompts = [example.prompt.tolist() for example in part]
            best = candidate_scores(loaded.model, loaded.pack(part), prompts, candidates).argmax(1).tolist()
            answers += [list(candidates.ids[place]) for place in best]
        else:
            answers += _searched(loaded, part, decoding, candidates)
        told(len(part))
    return answers


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

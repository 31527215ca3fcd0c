"""The one way to an answer: every candidate, beams among them, or beams over all texts, after the decoder prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ofa_ds.config import ModelOptions, Recipe
from ofa_ds.data.example import Example
from ofa_ds.data.vocab import load_vocab
from ofa_ds.inference.answering import answer
from ofa_ds.inference.candidate_scores import candidate_scores
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.tasks.task import DOWNSTREAM

VOCAB = Path(__file__).parents[1] / "fixtures/checkpoint_0f884a0/vocab"
SIDE = 32


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    vocab = load_vocab(VOCAB)
    config = preset("nano", vocab_size=vocab.size, dim=32, ffn_dim=64, num_heads=2, init_std=0.4)
    return LoadedModel(model=OFA(config).eval(), vocab=vocab, recipe=Recipe(model=ModelOptions(preset="nano")))


def asked(*prompts: list[int]) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(
            task="vqa", source=np.array([0, *rng.integers(4, 200, 4 + e), 2]), target=np.array([2]),
            prev=np.array([0]), prompt=np.array(prompt, np.int64),
            image=rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
        )
        for e, prompt in enumerate(prompts)
    ]  # fmt: skip


EXAMPLES = asked([10, 11, 12], [], [13], [14, 2])
IDS = ((30,), (30, 31), (40, 41, 42), (50, 2, 51), (60, 61))
LIST = Candidates(answers=tuple(map(str, IDS)), ids=IDS)


def test_the_best_candidate_is_the_answer_and_the_first_of_equal_ones(loaded: LoadedModel) -> None:
    found = answer(loaded, EXAMPLES, DOWNSTREAM["vqa"], candidates=LIST)
    prompts = [example.prompt.tolist() for example in EXAMPLES]
    scores = candidate_scores(loaded.model, loaded.pack(EXAMPLES), prompts, LIST)
    assert found == [list(IDS[place]) for place in scores.argmax(1).tolist()]
    twice = Candidates(answers=(*LIST.answers, *LIST.answers), ids=IDS + IDS)
    assert answer(loaded, EXAMPLES, DOWNSTREAM["vqa"], candidates=twice) == found


def test_answers_do_not_depend_on_how_many_go_together_and_it_is_told_how_far_it_is(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, open_beams = DOWNSTREAM["vqa"], dataclasses.replace(DOWNSTREAM["vqa"].decoding, candidates=False, max_len=5)
    for decoding, candidates in ((None, LIST), (open_beams, LIST), (open_beams, None)):
        steps: list[int] = []
        options = {"candidates": candidates, "decoding": decoding}
        together = answer(loaded, EXAMPLES, task, **options, told=steps.append)
        assert steps == [len(EXAMPLES)]
        with monkeypatch.context() as patch:
            patch.setattr("ofa_ds.inference.loaded_model.MAX_TOKENS_A_BATCH", 1)
            assert answer(loaded, EXAMPLES, task, **options, told=steps.append) == together
        assert steps[1:] == [1] * len(EXAMPLES)


def test_beams_stay_inside_the_list_where_there_is_one_and_are_free_where_there_is_none(loaded: LoadedModel) -> None:
    task, beams = DOWNSTREAM["vqa"], dataclasses.replace(DOWNSTREAM["vqa"].decoding, candidates=False, max_len=6)
    assert all(tuple(ids) in IDS for ids in answer(loaded, EXAMPLES, task, candidates=LIST, decoding=beams))
    free = answer(loaded, EXAMPLES, task, decoding=beams)
    assert all(len(ids) <= 6 and 2 not in ids for ids in free)
    assert any(tuple(ids) not in IDS for ids in free)


def test_a_grounding_answer_is_four_bins_whatever_the_model_prefers(loaded: LoadedModel) -> None:
    for ids in answer(loaded, EXAMPLES, DOWNSTREAM["refcoco"]):
        assert len(ids) == 4 and all(loaded.vocab.is_bin(token) for token in ids)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_an_error_with_its_length(loaded: LoadedModel) -> None:
    room = loaded.model.config.max_positions
    short = answer(loaded, asked([9] * room), DOWNSTREAM["caption"])
    assert len(short[0]) <= 1
    with pytest.raises(ValueError, match=f"a prompt of {room + 1} tokens leaves no position"):
        answer(loaded, asked([9] * (room + 1)), DOWNSTREAM["caption"])

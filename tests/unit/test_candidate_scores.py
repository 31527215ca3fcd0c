"""Scores of a list of answers out of one tree are those of each answer alone, fed token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ofa_ds.batch import Batch, pack
from ofa_ds.data.example import Example
from ofa_ds.inference import candidate_scores as scoring
from ofa_ds.inference.candidate_scores import candidate_scores
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks import candidates as lists
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.terms import BOS_ID, EOS_ID

VOCAB = 220
IMAGE_SIZE = 32
OPTIONS = {
    "official": {},
    "6B": {"use_ofasys": True, "share_attn_bias": True, "entangle_position_embedding": True},
}
LISTS = st.lists(st.lists(st.integers(4, 8), min_size=1, max_size=5), min_size=1, max_size=14, unique_by=tuple)
PROMPTS = st.lists(st.lists(st.integers(2, 40), max_size=6), min_size=2, max_size=3)


@pytest.fixture(scope="module", params=OPTIONS)
def model(request: pytest.FixtureRequest) -> OFA:
    torch.manual_seed(1)
    config = preset("nano", vocab_size=VOCAB, dim=32, ffn_dim=64, num_heads=2, init_std=0.4, **OPTIONS[request.param])
    return OFA(config).double().eval()


def batch_of(model: OFA, num: int) -> Batch:
    """Sources of unlike lengths; the second has no picture."""
    rng = np.random.default_rng(num)
    examples = []
    for e in range(num):
        image = None if e == 1 else rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
        source = np.array([0, *rng.integers(4, VOCAB, 3 + 2 * e), 2])
        examples.append(Example(task="vqa", source=source, target=np.array([2]), prev=np.array([0]), image=image))
    return pack(examples, [(IMAGE_SIZE, IMAGE_SIZE)], model.config.patch_size, model.config.image_bucket_size)


def one_by_one(
    model: OFA, batch: Batch, prompts: Sequence[Sequence[int]], candidates: Candidates, some: Sequence[Sequence[int]]
) -> Tensor:
    """[E, some]: each of some candidates is a row of its example that is fed token after token, the prompt too."""
    end = [EOS_ID] if candidates.ends else []
    rows = [([BOS_ID, *prompt], [*ids, *end], ids) for prompt in prompts for ids in some]
    state = model.start_decoding(batch, beams=len(some))
    score_R = torch.zeros(len(rows), dtype=torch.float64)
    for step in range(max(len(prompt) + len(target) - 1 for prompt, target, _ in rows)):
        tokens = [(prompt + target + [EOS_ID] * 99)[step] for prompt, target, _ in rows]
        logits_RV = model.decode_step(torch.tensor(tokens), state)
        for row, (prompt, target, ids) in enumerate(rows):
            place = step - len(prompt) + 1
            if 0 <= place < len(target):
                allowed = candidates.trie.next(ids[:place])
                score_R[row] += logits_RV[row, target[place]] - logits_RV[row, allowed].logsumexp(0)
    return score_R.view(len(prompts), -1)


def candidates_of(ids: list[list[int]], ends: bool = True) -> Candidates:
    return Candidates(answers=tuple(map(str, ids)), ids=tuple(map(tuple, ids)), ends=ends)


@settings(max_examples=15, deadline=None)
@given(LISTS, PROMPTS, st.booleans(), st.integers(1, 4), st.sampled_from([1, 3, 16384]))
def test_scores_are_those_of_each_candidate_alone_whatever_goes_through_together(
    model: OFA, ids: list[list[int]], prompts: list[list[int]], ends: bool, together: int, following: int
) -> None:
    candidates, batch = candidates_of(ids, ends), batch_of(model, len(prompts))
    expected = one_by_one(model, batch, prompts, candidates, candidates.ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "MAX_VERTICES_A_PASS", together)
        for module in (scoring, lists):
            patch.setattr(module, "MAX_FOLLOWING", following)
        found = candidate_scores(model, batch, prompts, candidates)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_example_has_the_same_scores_alone_and_among_others_with_other_prompts(model: OFA) -> None:
    candidates = candidates_of([[4], [4, 5], [6, 7, 8], [6, 9]])
    prompts = [[10, 11, 12], [], [13]]
    together = candidate_scores(model, batch_of(model, 3), prompts, candidates)
    assert (together.exp().sum(1) - 1).abs().max() < 1e-9  # all that the list allows, so that probabilities sum to 1
    for others in ([[20] * 5], [[]]):
        found = candidate_scores(model, batch_of(model, 3), [*prompts[:2], *others], candidates)
        torch.testing.assert_close(found[:2], together[:2], rtol=1e-9, atol=1e-9)


def test_beams_that_read_a_prompt_find_what_beams_that_are_forced_along_it_find(model: OFA) -> None:
    prompts = [[10, 11, 12], [], [13]]
    batch = batch_of(model, 3)
    read = generate(model, batch, GenerationConfig(beams=3, max_len_b=4, normalize=False), prompts=prompts)
    for e, prompt in enumerate(prompts):
        config = GenerationConfig(
            beams=3, max_len_b=4 + len(prompt), normalize=False, min_len=1 + len(prompt) * bool(prompt)
        )
        forced = generate(model, batch, config, prefix=[prompt] * 3)[e]
        assert [[*prompt, *h.tokens] for h in read[e]] == [h.tokens for h in forced]
        less = [f.score - sum(f.positional_scores[: len(prompt)]) for f in forced]
        assert [h.score for h in read[e]] == pytest.approx(less, rel=1e-9)


def test_an_eos_inside_a_prompt_ends_nothing(model: OFA) -> None:
    config = GenerationConfig(beams=2, max_len_b=3)
    for best, *_ in generate(model, batch_of(model, 2), config, prompts=[[9, 2], [2]]):
        assert len(best.tokens) >= 2 and best.tokens[-1] == EOS_ID


def test_what_is_longer_than_the_models_positions_is_an_error_with_both_numbers(model: OFA) -> None:
    room = model.config.max_positions + 2
    candidates = candidates_of([[4, 5, 6], [4, 5, 7]])
    batch = batch_of(model, 2)
    candidate_scores(model, batch, [[9] * (room - 3), []], candidates)
    with pytest.raises(ValueError, match=f"step {room} is past the {room} positions"):
        candidate_scores(model, batch, [[9] * (room - 2), []], candidates)


def test_a_hundred_thousand_candidates_are_scored(model: OFA) -> None:
    rng = np.random.default_rng(0)
    ids = list({tuple(rng.integers(4, VOCAB, length).tolist()): None for length in rng.integers(1, 9, 120_000)})
    candidates, prompts = candidates_of(ids[:100_000]), [[10, 11], []]
    assert len(candidates.ids) == 100_000
    found = candidate_scores(model, batch_of(model, 2), prompts, candidates)
    assert (found.exp().sum(1) - 1).abs().max() < 1e-9
    some = range(0, len(candidates.ids), 9973)
    expected = one_by_one(model, batch_of(model, 2), prompts, candidates, [candidates.ids[c] for c in some])
    torch.testing.assert_close(found[:, some], expected, rtol=1e-9, atol=1e-9)


def test_low_precision_scores_are_near_those_of_full_precision(model: OFA) -> None:
    candidates = candidates_of([[4], [4, 5], [6, 7, 8], [6, 9]])
    expected = candidate_scores(model, batch_of(model, 3), [[10], [], [13]], candidates)
    low = OFA(model.config).eval()
    low.load_state_dict(model.state_dict())
    found = candidate_scores(low.bfloat16(), batch_of(model, 3), [[10], [], [13]], candidates)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.5
    single = candidate_scores(low.float(), batch_of(model, 3), [[10], [], [13]], candidates)
    assert (single - expected).abs().max() < 0.5

"""Generation on a language model that is a table: what follows depends on the example and the last token alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ofa_ds.inference.draws import SeededDraw
from ofa_ds.inference.generate import BOS_ID, GenerationConfig, Trie, generate
from ofa_ds.terms import PAD_ID
from ofa_ds.train.criteria import EOS_ID

VOCAB = 12
NUM_EXAMPLES = 3


class TableState:
    def __init__(self, example_R: Tensor) -> None:
        self.example_R = example_R

    def reorder(self, index_R: Tensor) -> None:
        self.example_R = self.example_R[index_R]


class TableModel:
    """Logits [E, V, V]: row of the last token. Counts its steps and rows."""

    def __init__(self, num_examples: int = NUM_EXAMPLES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(num_examples, VOCAB, VOCAB, generator=generator, dtype=torch.float64)
        self.rows: list[int] = []

    def start_decoding(self, batch: SimpleNamespace, beams: int = 1, *, read: None = None) -> TableState:
        return TableState(batch.which.repeat_interleave(beams))

    def decode_step(self, tokens_R: Tensor, state: TableState) -> Tensor:
        assert len(tokens_R) == len(state.example_R)
        self.rows.append(len(tokens_R))
        return self.table[state.example_R, tokens_R]


def batch_of(*examples: int) -> SimpleNamespace:
    return SimpleNamespace(
        which=torch.tensor(examples),
        num_examples=len(examples),
        source_position=torch.arange(4),
        decoder_offsets=torch.arange(len(examples) + 1),
    )


ALL = batch_of(*range(NUM_EXAMPLES))


def test_one_beam_takes_the_most_probable_token_until_eos_or_the_limit() -> None:
    model = TableModel()
    found = generate(model, ALL, GenerationConfig(beams=1, max_len_b=6))
    for example, (hypothesis,) in enumerate(found):
        last, expected, scores = BOS_ID, [], []
        while last != EOS_ID:
            logp = model.table[example, last].log_softmax(-1)
            logp[PAD_ID] = -torch.inf
            if not expected:
                logp[EOS_ID] = -torch.inf
            last = int(logp.argmax()) if len(expected) < 6 else EOS_ID
            expected.append(last)
            scores.append(logp[last].item())
        assert hypothesis.tokens == expected
        assert hypothesis.positional_scores == pytest.approx(scores)
        assert hypothesis.score == pytest.approx(sum(scores) / len(scores))


def test_an_example_gets_the_same_hypotheses_alone_and_among_others_that_end_earlier() -> None:
    config = GenerationConfig(beams=3, max_len_b=9)
    together = generate(TableModel(), ALL, config)
    for example in range(NUM_EXAMPLES):
        (alone,) = generate(TableModel(), batch_of(example), config)
        assert [h.tokens for h in alone] == [h.tokens for h in together[example]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in together[example]])


def test_rows_of_finished_examples_leave_the_batch() -> None:
    model = TableModel()
    model.table[0, :, EOS_ID] = 50.0
    model.table[1:, :, EOS_ID] = -50.0
    generate(model, ALL, GenerationConfig(beams=2, min_len=0, max_len_b=7))
    assert model.rows[0] == 2 * NUM_EXAMPLES and model.rows[-1] == 2 * (NUM_EXAMPLES - 1)


def test_scores_sink_and_the_number_of_hypotheses_is_that_of_the_beams() -> None:
    for hypotheses in generate(TableModel(), ALL, GenerationConfig(beams=4, max_len_b=8)):
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert len(hypotheses) == 4 and scores == sorted(scores, reverse=True)
        assert len({tuple(hypothesis.tokens) for hypothesis in hypotheses}) == 4


def test_no_ngram_comes_twice() -> None:
    model = TableModel()
    model.table[:, :, 5] = 20.0
    model.table[:, :, EOS_ID] = -20.0
    (best, *_), *_ = generate(model, ALL, GenerationConfig(beams=2, max_len_b=9, no_repeat_ngram=2))
    pairs = list(zip(best.tokens, best.tokens[1:], strict=False))
    assert len(pairs) == 9 and len(set(pairs)) == len(pairs)
    (free, *_), *_ = generate(model, ALL, GenerationConfig(beams=2, max_len_b=9))
    assert free.tokens == [5] * 9 + [EOS_ID]


def test_hypotheses_begin_with_the_prefix_of_their_example() -> None:
    prefix = [[7, 8], [], [9]]
    found = generate(TableModel(), ALL, GenerationConfig(beams=3, max_len_b=6), prefix=prefix)
    for tokens, hypotheses in zip(prefix, found, strict=True):
        assert len(hypotheses) == 3
        assert all(hypothesis.tokens[: len(tokens)] == tokens for hypothesis in hypotheses)
    with pytest.raises(ValueError, match="want a prefix without eos for each of 3 examples"):
        generate(TableModel(), ALL, GenerationConfig(), prefix=[[7]])


def test_a_trie_admits_its_answers_only_and_their_probabilities_sum_to_one() -> None:
    answers = [[4, 5], [4], [6, 7, 8]]
    found = generate(TableModel(), ALL, GenerationConfig(beams=5, max_len_b=6, len_penalty=0), trie=Trie(answers))
    for hypotheses in found:
        assert sorted(hypothesis.tokens for hypothesis in hypotheses) == sorted([*answer, EOS_ID] for answer in answers)
        assert sum(torch.tensor(h.score).exp().item() for h in hypotheses) == pytest.approx(1)


def test_only_a_range_may_come_and_its_probabilities_stay_those_among_all_ids() -> None:
    model = TableModel()
    model.table[:, :, 5] = 20.0  # outside the range, and all but certain
    config = GenerationConfig(beams=3, min_len=4, max_len_b=4, only_range=(8, 12), normalize=False)
    for example, hypotheses in enumerate(generate(model, ALL, config)):
        for hypothesis in hypotheses:
            assert [8 <= token < 12 for token in hypothesis.tokens] == [True] * 4 + [False]
            pairs = zip([BOS_ID, *hypothesis.tokens], hypothesis.tokens, strict=False)
            expected = sum(model.table[example, last].log_softmax(-1)[token].item() for last, token in pairs)
            assert hypothesis.score == pytest.approx(expected)


def test_a_trie_lists_what_may_follow() -> None:
    trie = Trie([[4, 5], [4], [6]])
    assert trie.next([]) == [4, 6] and trie.next([4]) == [EOS_ID, 5] and trie.next([4, 5]) == [EOS_ID]
    assert trie.next([9]) == [EOS_ID] and trie.next([9, 9]) == [EOS_ID]


def samples(config: GenerationConfig, seed: int) -> list[list[int]]:
    seeds = range(seed * config.beams, (seed + 1) * config.beams)
    found = generate(TableModel(1), batch_of(0), config, draw=SeededDraw(seeds))
    return [hypothesis.tokens for hypothesis in found[0]]


def test_samples_follow_the_distribution_and_their_seeds() -> None:
    config = GenerationConfig(beams=4000, sampling=True, max_len_b=1, min_len=0)
    drawn = samples(config, seed=3)
    assert drawn == samples(config, seed=3) and drawn != samples(config, seed=4)
    logp = TableModel(1).table[0, BOS_ID].log_softmax(-1)
    logp[PAD_ID] = -torch.inf
    expected = logp.softmax(-1)
    share = torch.bincount(torch.tensor([tokens[0] for tokens in drawn]), minlength=VOCAB) / len(drawn)
    assert (share - expected).abs().max() < 0.03


def test_top_k_and_top_p_leave_the_improbable_out() -> None:
    logits = TableModel(1).table[0, BOS_ID]
    logits[PAD_ID] = -torch.inf
    order = logits.argsort(descending=True)
    common = {"beams": 500, "sampling": True, "max_len_b": 1, "min_len": 0}
    top_k = {tokens[0] for tokens in samples(GenerationConfig(top_k=3, **common), seed=0)}
    assert top_k == set(order[:3].tolist())
    assert {tokens[0] for tokens in samples(GenerationConfig(top_p=1e-6, **common), seed=0)} == {int(order[0])}


def test_samples_score_their_log_probability_and_end_once() -> None:
    config = GenerationConfig(beams=20, sampling=True, max_len_b=5, normalize=False)
    model = TableModel(1)
    (found,) = generate(model, batch_of(0), config, draw=SeededDraw(range(20)))
    assert len(found) == 20
    for hypothesis in found:
        assert hypothesis.tokens.count(EOS_ID) == 1 and hypothesis.tokens[-1] == EOS_ID
        previous = [BOS_ID, *hypothesis.tokens[:-1]]
        logp = [model.table[0, a].log_softmax(-1)[b].item() for a, b in zip(previous, hypothesis.tokens, strict=True)]
        assert hypothesis.score == pytest.approx(sum(logp))


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    models = [TableModel(seed=1), TableModel(seed=2)]
    (best,), *_ = generate(models, ALL, GenerationConfig(beams=1, max_len_b=1))
    mean = sum(model.table[0, BOS_ID].softmax(-1) for model in models) / 2
    assert best.positional_scores[0] == pytest.approx(mean.log()[best.tokens[0]].item())


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k and top_p choose among samples"):
        GenerationConfig(top_k=3)
    with pytest.raises(ValueError, match="exclude each other"):
        GenerationConfig(sampling=True, top_k=3, top_p=0.5)
    with pytest.raises(ValueError, match="beams >= 1"):
        GenerationConfig(beams=0)
    with pytest.raises(ValueError, match="12 beams want a vocabulary larger than that, got 12 ids"):
        generate(TableModel(), ALL, GenerationConfig(beams=VOCAB))

"""The benchmark of generation: the original's way on a model of ours finds what ours finds, and the table says so."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from ofa_ds.bench import __main__ as command
from ofa_ds.bench import generate as bench
from ofa_ds.bench.generate import answer_list, asked, packed
from ofa_ds.bench.padded import PaddedOFA, pad
from ofa_ds.bench.padded_generation import UncachedModel, chunked_scores, chunks_of
from ofa_ds.inference.candidate_scores import candidate_scores
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.model.config import ModelConfig, ResNetConfig, preset
from ofa_ds.model.ofa import OFA

SIDE, VOCAB = 64, 60000
SMALL = preset(
    "tiny", vocab_size=VOCAB, dim=16, ffn_dim=24, num_heads=2, encoder_layers=2, decoder_layers=2, init_std=0.2,
    backbone=ResNetConfig(depths=(1, 1, 1)), token_bucket_size=8, image_bucket_size=6, code_image_size=32,
    max_positions=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> OFA:
    torch.manual_seed(0)
    return OFA(SMALL).double().eval()


def padded_of(examples: list[object]) -> object:
    batch = pad(examples, SIDE)
    return dataclasses.replace(batch, images=batch.images.double())


@pytest.mark.parametrize("last_only", [False, True])
def test_the_search_without_caches_finds_the_hypotheses_of_the_search_with_them(model: OFA, last_only: bool) -> None:
    examples = [*asked(2, SIDE, 5), *asked(1, SIDE, 8, seed=1)]
    config = GenerationConfig(beams=3, max_len_b=6, no_repeat_ngram=3)
    ours = generate(model, packed(model, examples, SIDE), config)
    theirs = generate(
        UncachedModel(model, padded_of(examples), last_only=last_only), packed(model, examples, SIDE), config
    )
    for a, b in zip(ours, theirs, strict=True):
        assert [h.tokens for h in a] == [h.tokens for h in b]
        assert [h.score for h in a] == pytest.approx([h.score for h in b], rel=1e-5)  # uint8 pixels: fp32 or fp64


def test_the_loop_over_chunks_gives_the_scores_of_the_tree(model: OFA) -> None:
    examples, candidates = [*asked(1, SIDE, 5), *asked(1, SIDE, 8, seed=1)], answer_list(50)
    prompts = [example.source[1:-1].tolist() for example in examples]
    padded = PaddedOFA(model)
    with torch.no_grad():
        memory = padded.encode(padded_of(examples))
    found = chunked_scores(padded, memory, chunks_of(prompts, candidates, VOCAB))
    expected = candidate_scores(model, packed(model, examples, SIDE), prompts, candidates)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    some = chunked_scores(padded, memory, chunks_of(prompts, candidates, VOCAB, [2]))
    torch.testing.assert_close(some, found[:, 40:])


def test_the_list_shares_its_beginnings_as_a_list_of_real_answers_does() -> None:
    """1,926 answers to questions about COCO pictures: 4,331 vertices, 1,361 first tokens, 263 vertices to compute."""
    candidates = answer_list(1926)
    trie = candidates.trie
    assert len(set(candidates.ids)) == 1926
    assert len(trie.token_V) == pytest.approx(4331, rel=0.1)
    assert trie.num_children_V[0] == pytest.approx(1361, rel=0.1)
    assert len(candidates.plan.needed) == pytest.approx(263, rel=0.25)


def test_the_command_tells_times_flops_and_how_near_the_results_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(size: str, **changes: object) -> ModelConfig:
        assert size in ("tiny", "base")
        return dataclasses.replace(SMALL, **changes)

    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "preset", small)
    for name, value in {
        "PICTURES": 3, "PICTURES_A_BATCH": 2, "CAPTION_SIDE": SIDE, "ANSWER_SIDE": SIDE, "NUM_ANSWERS": 50,
        "VOCAB_SIZE": 400, "CODE_START": 390, "answer_list": lambda: answer_list(50),
        "CAPTIONS": GenerationConfig(beams=2, max_len_b=3),
    }.items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(sys, "argv", ["bench", "generate", "--repeats", "1", "--json"])
    command.main()
    result = json.loads(capsys.readouterr().out)
    torch.set_num_threads(threads)
    (scores,) = result["candidates"]
    assert scores["apart"] < 1e-4 and scores["chunks"] == scores["all_chunks"] == 3
    assert scores["loop_gflop"] > 5 * scores["ours_gflop"] > 0
    assert [each["threads"] for each in result["captions"]] == [1, 2]
    assert all(each["same"] > 0.6 and each["ours_s"] > 0 for each in result["captions"])
    text = bench.table(result)
    assert "captions of 3 pictures" in text and "one tree" in text and "3 of 3 chunks timed" in text

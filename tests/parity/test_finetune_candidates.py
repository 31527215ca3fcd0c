"""Scores of all candidates, labels and constrained beam search against what the original's evaluation recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapter
import numpy as np
import pytest
import torch

from ofa_ds.batch import Batch
from ofa_ds.inference.candidate_scores import candidate_scores
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.candidates import Candidates, Trie
from ofa_ds.terms import EOS_ID, PAD_ID
from ofa_ds.train.criteria import Criterion, criterion_loss

DTYPE = torch.float64
FILE = "finetune/allcand.npz"
PICTURES = ("vqa", "snli_ve", "image_classify")


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> OFA:
    model = OFA(adapter.MICRO).to(DTYPE).eval().requires_grad_(False)
    adapter.load(model, adapter.stored_weights(golden_dir, "micro_state.npz"))
    return model


def batch_of(arrays: dict[str, np.ndarray], case: str) -> Batch:
    prefix = f"{case}/in/"
    inputs = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    for name in PICTURES:
        if case.startswith(name):
            inputs["patch_images"] = arrays[f"patch_images/{name}"]
    return adapter.pack_padded(inputs, adapter.MICRO, dtype=DTYPE)[0]


def prompts_of(meta: dict[str, Any], arrays: dict[str, np.ndarray], case: str) -> list[list[int]]:
    """What follows bos; of GLUE, which is answered at once, all that the decoder is given."""
    given = meta["cases"][case].get("decoder_prompts")
    if given is None:
        rows = arrays[f"{case}/in/prev_output_tokens"].tolist()
        given = [row[:1] for row in rows] if not case.startswith("glue") else rows
    return [[token for token in row[1:] if token != PAD_ID] for row in given]


def candidates_of(meta: dict[str, Any], arrays: dict[str, np.ndarray], case: str) -> Candidates:
    if case.startswith("glue"):
        ids = [[token] for token in arrays[f"{case}/out/label_ids"].tolist()]
        return Candidates(answers=tuple(map(str, ids)), ids=tuple(map(tuple, ids)), ends=False)
    if case.startswith("snli_ve"):
        number = {word: int(token) for token, word in meta["vocabulary"].items()}
        answers = meta["cases"][case]["answers"]
        return Candidates(answers=tuple(answers), ids=tuple((number[answer],) for answer in answers))
    ids = [tuple(token for token in row if token != PAD_ID) for row in arrays["answers_ids"].tolist()]
    return Candidates(answers=tuple(meta["answers"]), ids=tuple(ids))


@pytest.mark.golden(FILE)
def test_every_candidate_has_the_score_of_the_original_and_the_first_best_is_taken(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], model: OFA
) -> None:
    cases = [case for case in meta["cases"] if f"{case}/out/scores" in arrays]
    assert len(cases) >= 3
    for case in cases:
        prompts, candidates = prompts_of(meta, arrays, case), candidates_of(meta, arrays, case)
        scores = candidate_scores(model, batch_of(arrays, case), prompts, candidates)
        np.testing.assert_allclose(scores.numpy(), arrays[f"{case}/out/scores"], rtol=1e-9, atol=1e-9, err_msg=case)
        best = scores.argmax(1).tolist()
        assert best == arrays[f"{case}/out/argmax"].tolist(), case
        assert [candidates.answers[place] for place in best] == [r["answer"] for r in meta["cases"][case]["results"]]


@pytest.mark.golden(FILE)
def test_labels_without_eos_rank_as_the_logits_of_the_original_at_the_last_position(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], model: OFA
) -> None:
    cases = [case for case in meta["cases"] if case.startswith("glue")]
    assert len(cases) >= 2
    for case in cases:
        prompts, candidates = prompts_of(meta, arrays, case), candidates_of(meta, arrays, case)
        scores = candidate_scores(model, batch_of(arrays, case), prompts, candidates)
        logits = torch.from_numpy(arrays[f"{case}/out/label_logits"])
        np.testing.assert_allclose(scores, logits.log_softmax(1), rtol=1e-9, atol=1e-9, err_msg=case)
        best = arrays[f"{case}/out/label_ids"][scores.argmax(1)]
        assert best.tolist() == arrays[f"{case}/out/argmax_id"].tolist(), case


KINDS = ("beam_trie", "beam_unconstrained", "beam_zero_shot")


def searches(
    meta: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Iterator[tuple[str, str, list[list[int]], GenerationConfig, Trie | None, list[list[dict[str, Any]]]]]:
    """(case, kind, prompts, settings, trie, recorded hypotheses) of every recorded search."""
    for case, recorded in meta["cases"].items():
        for kind in (kind for kind in KINDS if kind in recorded):
            options, prompts = recorded[kind]["generator"], prompts_of(meta, arrays, case)
            if kind == "beam_zero_shot":  # which is given none
                prompts = [[] for _ in prompts]
            config = GenerationConfig(
                beams=options["beam"], normalize=not options["unnormalized"], max_len_b=options["max_len_b"],
                temperature=options["temperature"], zero_shot=options["zero_shot"],
            )  # fmt: skip
            trie = candidates_of(meta, arrays, case).trie if options["trie"] else None
            yield case, kind, prompts, config, trie, recorded[kind]["hypotheses"]


@pytest.mark.golden(FILE)
def test_beams_with_a_forced_prompt_find_the_hypotheses_and_scores_of_the_original(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], model: OFA
) -> None:
    seen = 0
    for case, kind, prompts, config, trie, recorded in searches(meta, arrays):
        if any(EOS_ID in prompt for prompt in prompts):
            continue  # see the test of the prompt that ends in eos
        found = generate(model, batch_of(arrays, case), config, prefix=prompts, trie=trie)
        for hypotheses, expected in zip(found, recorded, strict=True):
            assert [h.tokens for h in hypotheses] == [e["tokens"] for e in expected], (case, kind)
            scores = [e["score"] for e in expected]
            np.testing.assert_allclose([h.score for h in hypotheses], scores, rtol=1e-9, atol=1e-9)
        seen += 1
    assert seen >= 3


@pytest.mark.golden(FILE)
def test_beams_that_have_read_a_prompt_give_the_answers_of_the_original_and_their_scores_less_the_prompt(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], model: OFA
) -> None:
    """Inside the trie, where no limit cuts: the original's limit counts the prompt."""
    seen = 0
    for case, kind, prompts, config, trie, recorded in searches(meta, arrays):
        if kind != "beam_trie" or any(EOS_ID in prompt for prompt in prompts):
            continue
        found = generate(model, batch_of(arrays, case), config, prompts=prompts, trie=trie)
        for prompt, hypotheses, expected in zip(prompts, found, recorded, strict=True):
            assert [[*prompt, *h.tokens] for h in hypotheses] == [e["tokens"] for e in expected], (case, kind)
            less = np.array([e["score"] for e in expected]) - [h.score for h in hypotheses]
            np.testing.assert_allclose(less, less[0], rtol=1e-9, atol=1e-9)
        seen += 1
    assert seen >= 2


@pytest.mark.golden(FILE)
def test_a_prompt_that_ends_in_eos_has_an_answer_where_the_originals_is_always_empty(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], model: OFA
) -> None:
    """Fault of the original: the forced eos of the prompt `src` ends every hypothesis of its beam search."""
    seen = 0
    for case, kind, prompts, config, trie, recorded in searches(meta, arrays):
        if kind != "beam_trie" or not all(EOS_ID in prompt for prompt in prompts):
            continue
        assert all(e["tokens"] == prompt for prompt, each in zip(prompts, recorded, strict=True) for e in each[:1])
        candidates = candidates_of(meta, arrays, case)
        found = generate(model, batch_of(arrays, case), config, prompts=prompts, trie=trie)
        for hypotheses, scores in zip(found, arrays[f"{case}/out/scores"], strict=True):
            for hypothesis in hypotheses:  # each an answer of the list, with the score that the original's loop gave it
                place = candidates.ids.index(tuple(hypothesis.tokens[:-1]))
                assert hypothesis.score == pytest.approx(scores[place], rel=1e-9), case
            assert len(hypotheses) >= 1
        seen += 1
    assert seen >= 1


@pytest.mark.golden(FILE)
def test_constrained_training_has_the_loss_and_gradients_of_the_original(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], golden_dir: Path
) -> None:
    cases = [case for case in meta["cases"] if f"{case}/train_loss_ls0.1" in arrays]
    assert len(cases) >= 5
    for case in cases:
        model = OFA(adapter.MICRO).to(DTYPE).eval()
        adapter.load(model, adapter.stored_weights(golden_dir, "micro_state.npz"))
        batch = batch_of(arrays, case)
        target = torch.from_numpy(arrays[f"{case}/in/target"])
        masks = torch.from_numpy(arrays[f"{case}/in/constraint_masks"])
        conf = arrays.get(f"{case}/in/conf")
        options = {"conf_B": None if conf is None else torch.from_numpy(conf), "constraint_mask_BLV": masks}
        hidden = model.decode(batch, model.encode(batch))
        rows = batch.decoder_offsets.diff().tolist()
        padded = torch.nn.utils.rnn.pad_sequence(list(model.logits(hidden).split(rows)), batch_first=True)
        padded = torch.nn.functional.pad(padded, (0, 0, 0, target.shape[1] - padded.shape[1]))
        for smoothing in ("0", "0.1"):
            loss = criterion_loss(padded, target, Criterion(label_smoothing=float(smoothing)), **options)
            for kind, value in (("loss", loss.loss), ("nll", loss.nll)):
                recorded = arrays[f"{case}/train_{kind}_ls{smoothing}"].item()
                assert value.item() == pytest.approx(recorded, rel=1e-9), (case, kind, smoothing)
        assert loss.num_tokens == arrays[f"{case}/train_sample_size"].item()
        loss.loss.backward()
        parameters = dict(model.named_parameters())
        norms = [parameters[name].grad.norm().item() for name in meta["gradnorm_names"][case]]
        np.testing.assert_allclose(norms, arrays[f"{case}/train_gradnorm_ls0.1"], rtol=1e-7, atol=1e-9, err_msg=case)

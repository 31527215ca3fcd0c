"""CIDEr-D, the SCST loss and whole SCST steps against what the original's scorer and criterion recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import adapter
import numpy as np
import pytest
import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.data.document_frequency import DocumentFrequency, caption_words
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.cider import CiderD
from ofa_ds.terms import EOS_ID, PAD_ID
from ofa_ds.train.criteria import Criterion, Loss, criterion_loss
from ofa_ds.train.loss import group_counts, group_sums
from ofa_ds.train.scst import beside_others, with_hypotheses

DTYPE = torch.float64
TOLERANCE = 1e-9
FILE = "finetune/scst.npz"


def frequency_of(meta: dict[str, Any]) -> DocumentFrequency:
    counts = {tuple(name.split()): count for name, count in meta["document_frequency"]}
    return DocumentFrequency(images=meta["ref_len"], counts=counts)


@pytest.mark.golden(FILE)
def test_every_recorded_caption_has_the_originals_reward(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    scorer = CiderD(frequency_of(meta["cider"]))
    for pair, reward in zip(meta["cider"]["pairs"], arrays["cider/reward"], strict=True):
        assert " ".join(caption_words(pair["candidate"])) == pair["wrapped_candidate"].strip()
        assert scorer.scores([pair["candidate"]], pair["refs"])[0] == pytest.approx(reward, rel=TOLERANCE), pair


@pytest.mark.golden(FILE)
def test_the_scorer_gives_the_originals_scores_of_words_as_they_are(
    arrays: dict[str, np.ndarray], meta: dict[str, Any]
) -> None:
    scorer = CiderD(frequency_of(meta["cider"]))
    for pair, score in zip(meta["cider"]["pairs"], arrays["cider/validation_score"], strict=True):
        found = scorer.word_scores([tuple(pair["candidate"].split())], [tuple(ref.split()) for ref in pair["refs"]])
        assert found[0] == pytest.approx(score, rel=TOLERANCE, abs=1e-12), pair


def reward_loss(arrays: dict[str, np.ndarray], case: str) -> tuple[Loss, Tensor]:
    """SCST's loss is the criterion's with rewards as confidence; pads count where the original was not told them."""
    logits = torch.from_numpy(arrays[f"{case}/in_logits"]).requires_grad_()
    target, reward = (torch.from_numpy(arrays[f"{case}/in_{name}"]) for name in ("target", "reward"))
    if case.endswith("no_pad_argument"):  # one more class, which nothing has, is the pad: all others move up
        none = torch.full_like(logits[..., :1], -1e4)
        shown = torch.cat([logits[..., :1], none, logits[..., 1:]], -1)
        return criterion_loss(shown, target + (target >= PAD_ID), Criterion(), conf_B=reward), logits
    return criterion_loss(logits, target, Criterion(), conf_B=reward), logits


@pytest.mark.golden(FILE)
def test_the_loss_of_rewarded_tokens_and_its_gradient_are_the_originals(arrays: dict[str, np.ndarray]) -> None:
    cases = sorted({key.rpartition("/")[0] for key in arrays if key.startswith("fn/")})
    assert cases
    for case in cases:
        loss, logits = reward_loss(arrays, case)
        assert loss.num_tokens == arrays[f"{case}/ntokens"], case
        if case.endswith("single_step"):
            continue
        loss.loss.backward()
        assert loss.loss.item() == pytest.approx(arrays[f"{case}/loss"].item(), rel=TOLERANCE), case
        np.testing.assert_allclose(logits.grad, arrays[f"{case}/grad_logits"], rtol=TOLERANCE, atol=1e-12, err_msg=case)


@pytest.mark.golden(FILE)
def test_captions_of_one_token_have_the_reward_of_their_own_and_not_the_originals_outer_product(
    arrays: dict[str, np.ndarray],
) -> None:
    case = "fn/loss_single_step"
    loss, logits = reward_loss(arrays, case)
    target, reward = (torch.from_numpy(arrays[f"{case}/in_{name}"]) for name in ("target", "reward"))
    nll = -logits.detach().log_softmax(-1).gather(-1, target[..., None])[:, 0, 0]
    counted = target[:, 0] != PAD_ID
    assert loss.loss.item() == pytest.approx((nll * reward)[counted].sum().item(), rel=TOLERANCE)
    assert arrays[f"{case}/loss"].item() == pytest.approx((nll[counted].sum() * reward.sum()).item(), rel=1e-6)


def model_of(arrays: dict[str, np.ndarray], golden_dir: Path, *, frozen: bool) -> OFA:
    """The micro model with the edits of its weights that make captions end."""
    mode = "frozen" if frozen else "batch"
    model = OFA(dataclasses.replace(adapter.MICRO, batch_norm=mode))
    adapter.load(model, adapter.stored_weights(golden_dir, "micro_state.npz"))
    with torch.no_grad():  # in fp32, as they were recorded
        model.encoder.embed_tokens.weight[EOS_ID] *= 1.6
        model.decoder.layer_norm.weight *= 0.6
        model.decoder.layer_norm.bias *= 0.6
    return model.to(DTYPE)


def batch_of(arrays: dict[str, np.ndarray]) -> Batch:
    inputs = {name: arrays[f"scst/in/{name}"] for name in ("src_tokens", "patch_images", "patch_masks")}
    inputs["prev_output_tokens"] = np.zeros((len(inputs["src_tokens"]), 1), np.int64)
    return adapter.pack_padded(inputs, adapter.MICRO, dtype=DTYPE)[0]


def hypotheses_of(arrays: dict[str, np.ndarray]) -> list[list[list[int]]]:
    """[picture][beam] tokens with eos."""
    sampled = arrays["scst/in/sampled_tokens"]
    per_picture = len(sampled) // len(arrays["scst/in/src_tokens"])
    rows = [[token for token in row if token != PAD_ID] for row in sampled.tolist()]
    return [rows[i : i + per_picture] for i in range(0, len(rows), per_picture)]


@pytest.mark.golden(FILE)
def test_all_hypotheses_of_the_beam_are_the_originals_samples(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], golden_dir: Path
) -> None:
    options = meta["scst"]["generator"]
    config = GenerationConfig(
        beams=options["beam"], max_len_b=options["max_len_b"], no_repeat_ngram=options["no_repeat_ngram_size"]
    )
    found = generate(model_of(arrays, golden_dir, frozen=True).eval(), batch_of(arrays), config)
    assert [[each.tokens for each in hypotheses] for hypotheses in found] == hypotheses_of(arrays)


def scores_of(meta: dict[str, Any]) -> list[list[float]]:
    scorer, strings = CiderD(frequency_of(meta["scst"])), meta["scst"]["sampled_strings"]
    beams = len(strings) // len(meta["scst"]["references"])
    return [scorer.scores(strings[i * beams : (i + 1) * beams], r) for i, r in enumerate(meta["scst"]["references"])]


def recorded_cases(arrays: dict[str, np.ndarray]) -> list[str]:
    return sorted({"/".join(key.split("/")[:2]) for key in arrays if key.startswith("scst/") and "/in/" not in key})


@pytest.mark.golden(FILE)
def test_scores_and_rewards_of_all_hypotheses_are_the_originals(
    arrays: dict[str, np.ndarray], meta: dict[str, Any]
) -> None:
    scores = scores_of(meta)
    rewards = [reward for each in scores for reward in beside_others(each)]
    for case in recorded_cases(arrays):
        np.testing.assert_allclose(np.concatenate(scores), arrays[f"{case}/scores"], rtol=TOLERANCE, err_msg=case)
        np.testing.assert_allclose(rewards, arrays[f"{case}/reward"], rtol=TOLERANCE, atol=1e-12, err_msg=case)
        assert sum(map(sum, scores)) == pytest.approx(arrays[f"{case}/log_score"].item(), rel=TOLERANCE)


@pytest.mark.golden(FILE)
def test_a_step_on_the_models_own_captions_has_the_originals_loss_and_gradients(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], golden_dir: Path
) -> None:
    """As training takes it: a picture is encoded once, where the original encodes it for each of its captions."""
    rewards = [reward for each in scores_of(meta) for reward in beside_others(each)]
    cases = [case for case in recorded_cases(arrays) if "constraint_range" not in meta["scst"]["cases"][case]["ctor"]]
    assert cases
    for case in cases:
        told = meta["scst"]["cases"][case]
        model = model_of(arrays, golden_dir, frozen=told["freeze_resnet"]).train()
        batch = with_hypotheses(batch_of(arrays), hypotheses_of(arrays), rewards, dtype=DTYPE)
        loss_M, nll_M, _ = model(batch)
        loss = group_sums(loss_M, batch).sum()
        loss.backward()
        assert loss.item() == pytest.approx(arrays[f"{case}/loss"].item(), rel=TOLERANCE), case
        assert int(group_counts(batch).sum()) == arrays[f"{case}/log_ntokens"], case
        recorded = arrays[f"{case}/target_logprob"]
        kept = arrays["scst/in/sampled_tokens"] != PAD_ID
        np.testing.assert_allclose(-nll_M.detach(), recorded[kept], rtol=TOLERANCE, err_msg=case)
        check_gradients(model, arrays, case, told["gradnorm_names"])


def check_gradients(model: OFA, arrays: dict[str, np.ndarray], case: str, names: list[str]) -> None:
    """The norm of every gradient, and three of them whole."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    largest = arrays[f"{case}/gradnorm"].max()
    for name, norm in zip(names, arrays[f"{case}/gradnorm"], strict=True):
        assert float(found[name].norm()) == pytest.approx(norm, rel=1e-8, abs=1e-12 * largest), f"{case} {name}"
    for key in (key for key in arrays if key.startswith(f"{case}/grad/")):
        grad, recorded = found[key.removeprefix(f"{case}/grad/")], torch.from_numpy(arrays[key])
        assert (grad - recorded).norm() <= TOLERANCE * recorded.norm(), key


@pytest.mark.golden(FILE)
def test_a_range_of_ids_and_the_gradient_of_every_logit_are_the_originals(
    arrays: dict[str, np.ndarray], meta: dict[str, Any], golden_dir: Path
) -> None:
    model = model_of(arrays, golden_dir, frozen=True).train()
    rewards = torch.tensor([reward for each in scores_of(meta) for reward in beside_others(each)], dtype=DTYPE)
    sampled = torch.from_numpy(arrays["scst/in/sampled_tokens"])
    kept = sampled != PAD_ID
    for case in [case for case in recorded_cases(arrays) if case.startswith("scst/bn_frozen")]:
        id_range = meta["scst"]["cases"][case]["ctor"].get("constraint_range")
        criterion = Criterion(constraint_range=tuple(map(int, id_range.split(","))) if id_range else None)
        batch = with_hypotheses(batch_of(arrays), hypotheses_of(arrays), rewards.tolist(), dtype=DTYPE)
        model.zero_grad()
        logits_BLV = torch.zeros(*sampled.shape, adapter.MICRO.vocab_size, dtype=DTYPE)
        logits_BLV = logits_BLV.masked_scatter(kept[..., None], model.logits(model.decode(batch, model.encode(batch))))
        logits_BLV.retain_grad()
        loss = criterion_loss(logits_BLV, sampled, criterion, conf_B=rewards)
        loss.loss.backward()
        assert loss.loss.item() == pytest.approx(arrays[f"{case}/loss"].item(), rel=TOLERANCE), case
        check_gradients(model, arrays, case, meta["scst"]["cases"][case]["gradnorm_names"])
        for name, value in (("logits_first5", logits_BLV.detach()), ("grad_logits_first5", logits_BLV.grad)):
            if f"{case}/{name}" in arrays:  # what follows a caption's end has no logits here
                first, recorded = kept[:5], torch.from_numpy(arrays[f"{case}/{name}"])
                np.testing.assert_allclose(value[:5][first], recorded[first], rtol=1e-8, atol=1e-11, err_msg=case)


@pytest.mark.golden(FILE)
def test_what_the_original_cannot_do_with_an_ignored_prefix_ours_does(
    arrays: dict[str, np.ndarray], meta: dict[str, Any]
) -> None:
    """Its ignore_prefix_size cuts the first rows of the batch instead of the first tokens, and fails."""
    failing = [case for case, told in meta["scst"]["cases"].items() if told["error"]]
    logits = torch.from_numpy(arrays["fn/loss_plain/in_logits"])
    target, reward = (torch.from_numpy(arrays[f"fn/loss_plain/in_{name}"]) for name in ("target", "reward"))
    for case in failing:
        ignored = meta["scst"]["cases"][case]["ctor"]["ignore_prefix_size"]
        loss = criterion_loss(logits, target, Criterion(ignore_prefix_tokens=ignored), conf_B=reward)
        rest = criterion_loss(logits[:, ignored:], target[:, ignored:], Criterion(), conf_B=reward)
        assert loss.loss.item() == pytest.approx(rest.loss.item(), rel=TOLERANCE)

"""The loss of fine-tuning on packed batches: what a step divides by, R-Drop, masks of what may come."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import random_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ofa_ds.batch import Batch, repeated
from ofa_ds.config import load_recipe
from ofa_ds.config.architecture import PRESETS
from ofa_ds.model.allowed_ids import allowed_mask
from ofa_ds.model.ofa import OFA
from ofa_ds.terms import PAD_ID
from ofa_ds.train.criteria import Criterion, criterion_loss, selected_loss
from ofa_ds.train.objective import TaskLoss, TokenLoss, criterion_of, objective_of

VOCAB = 40


class Alone:
    """One process without DeepSpeed: what an objective asks of an engine."""

    def __init__(self, dropout: float = 0.0, updates: int = 10) -> None:
        torch.manual_seed(0)
        config = dataclasses.replace(PRESETS["nano"], vocab_size=VOCAB, dropout=dropout, batch_norm="frozen")
        self.module = OFA(config).double()
        self.num_updates, self.device = updates, torch.device("cpu")

    def __call__(self, batch: Batch, *args: object, **options: object) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return self.module(batch, *args, **options)


def batch_of(seed: int, kinds: str = "vtt", *, constrained: bool = False) -> Batch:
    batch = random_batch((seed,), kinds=kinds, vocab_size=VOCAB, bucket=PRESETS["nano"].image_bucket_size)
    batch = dataclasses.replace(batch, loss_weight=batch.loss_weight * 0.7)
    if not constrained:
        return batch
    generator = torch.Generator().manual_seed(seed)
    mask_MV = torch.rand(len(batch.targets), VOCAB, generator=generator) < 0.3
    mask_MV[torch.arange(len(mask_MV)), batch.targets] = True
    mask_MV[batch.targets == PAD_ID] = False
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask_MV.sum(-1).cumsum(0)])
    return dataclasses.replace(batch, allowed_ids=mask_MV.nonzero()[:, 1], allowed_offsets=ends)


def padded(values_M: Tensor, batch: Batch, fill: float) -> Tensor:
    parts = values_M.split(batch.decoder_offsets.diff().tolist())
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=fill)


CRITERIA = {
    "plain": Criterion(),
    "smoothed, dropping both": Criterion(
        label_smoothing=0.1, drop_worst_ratio=0.2, drop_worst_after=5, drop_best_ratio=0.3
    ),
    "not yet dropping": Criterion(label_smoothing=0.1, drop_worst_ratio=0.2, drop_worst_after=10),
    "encouraging": Criterion(label_smoothing=0.1, encouraging=True, drop_worst_ratio=0.2),
    "R-Drop": Criterion(label_smoothing=0.1, rdrop_alpha=2.0, drop_best_ratio=0.2),
}


def loss_of(engine: Alone, criterion: Criterion, batch: Batch) -> tuple[Tensor, float]:
    objective = TaskLoss(criterion)
    (prepared,) = objective.prepare(engine, [batch])
    return objective.loss(engine, prepared, prepared.counts).loss, prepared.counts.item()


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("name", CRITERIA)
def test_loss_and_gradients_are_those_of_the_criterion_on_padded_logits(name: str, constrained: bool) -> None:
    criterion, engine, batch = CRITERIA[name], Alone(dropout=0.1), batch_of(1, constrained=constrained)
    gradients = []
    for packed in (True, False):
        engine.module.zero_grad()
        if packed:
            loss, count = loss_of(engine, criterion, batch)
        else:
            torch.manual_seed(3)
            seen = repeated(batch, criterion.copies)
            logits_MV = _all_logits(engine.module, seen)
            places_M = torch.arange(len(batch.targets))
            allowed = (batch.allowed_ids, batch.allowed_offsets, places_M, VOCAB)
            found = criterion_loss(
                padded(logits_MV, seen, 0.0), padded(batch.targets, batch, PAD_ID), criterion, update_num=10,
                conf_B=batch.loss_weight[batch.decoder_offsets[:-1].long()],
                constraint_mask_BLV=padded(allowed_mask(*allowed), batch, True) if constrained else None,
            )  # fmt: skip
            assert found.num_tokens == count
            loss = found.loss / found.num_tokens
        loss.backward()
        found_M = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        gradients.append((loss.item(), torch.cat([gradient.flatten() for gradient in found_M])))
    (ours, ours_grad), (theirs, theirs_grad) = gradients
    assert ours == pytest.approx(theirs, rel=1e-7)
    assert (ours_grad - theirs_grad).norm() <= 1e-7 * theirs_grad.norm()


def _all_logits(model: OFA, batch: Batch) -> Tensor:
    everywhere = dataclasses.replace(batch, targets=torch.full_like(batch.targets, PAD_ID + 1))
    return model(everywhere, logits=True)[0]


def test_rdrops_passes_differ_by_dropout_alone_and_cost_nothing_without_it() -> None:
    batch = batch_of(2)
    plain, doubled = Criterion(label_smoothing=0.1), Criterion(label_smoothing=0.1, rdrop_alpha=5.0)
    assert loss_of(Alone(), doubled, batch)[0].item() == pytest.approx(loss_of(Alone(), plain, batch)[0].item())
    assert loss_of(Alone(0.1), doubled, batch)[0] > loss_of(Alone(0.1), Criterion(label_smoothing=0.1), batch)[0]


@given(st.integers(0, 400), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 3))
@settings(deadline=None)
def test_what_divides_is_known_from_the_number_of_tokens_alone(num_tokens, worst, best, update) -> None:
    criterion = Criterion(drop_worst_ratio=worst, drop_worst_after=1, drop_best_ratio=best or None, drop_best_after=2)
    logits = torch.randn(1, num_tokens, 7, generator=torch.Generator().manual_seed(num_tokens))
    found = criterion_loss(logits, torch.full((1, num_tokens), 5), criterion, update_num=update)
    assert criterion.kept(num_tokens, update)[1] == found.num_tokens


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_batch_repeated_gives_every_example_as_often_and_holds_its_pictures_once(times: int) -> None:
    engine, batch = Alone(), batch_of(4, "vitd", constrained=True)
    seen = repeated(batch, times)
    assert seen.images is batch.images and seen.num_examples == times * batch.num_examples
    once, more = engine(batch)[0], engine(seen)[0]
    torch.testing.assert_close(more, once.repeat(times), rtol=1e-12, atol=1e-12)


def test_a_position_that_names_no_id_may_have_any() -> None:
    ids, offsets = torch.tensor([3, 5, 2]), torch.tensor([0, 2, 2, 3])
    mask = allowed_mask(ids, offsets, torch.tensor([0, 1]), 6)
    assert mask.tolist() == [[False, False, False, True, False, True], [True] * 6]


def test_the_recipe_chooses_the_objective_and_all_of_its_options() -> None:
    assert isinstance(objective_of(load_recipe("pretrain-nano")), TokenLoss)
    words = [
        "data.task.name=vqa", "optim.label_smoothing=0.1", "criterion.kind=encouraging", "criterion.log_end=0.5",
        "criterion.drop_worst_ratio=0.2", "criterion.drop_worst_after=7", "criterion.drop_best_ratio=0.05",
        "criterion.drop_best_after=8", "criterion.rdrop_alpha=1.5", "criterion.constraint_range=[10, 20]",
    ]  # fmt: skip
    recipe = load_recipe("pretrain-nano", words)
    assert isinstance(objective_of(recipe), TaskLoss)
    assert criterion_of(recipe) == Criterion(
        label_smoothing=0.1, encouraging=True, log_end=0.5, drop_worst_ratio=0.2, drop_worst_after=7,
        drop_best_ratio=0.05, drop_best_after=8, rdrop_alpha=1.5, constraint_range=(10, 20),
    )  # fmt: skip


# Faults of the original, by name -------------------------------------------


def test_rdrop_takes_batches_whose_optional_fields_are_absent_where_the_original_raises() -> None:
    """It repeats every field of the sample along the batch, None too."""
    batch = batch_of(5)
    assert not len(batch.allowed_ids)
    loss, count = loss_of(Alone(0.1), Criterion(rdrop_alpha=1.0), batch)
    assert loss.isfinite() and count == 2 * int((batch.targets != PAD_ID).sum())


def test_rdrop_among_listed_answers_is_finite_where_the_original_gives_nan() -> None:
    """Its divergence takes -inf from -inf at every class that may not come."""
    engine = Alone(0.1)
    loss, _ = loss_of(engine, Criterion(label_smoothing=0.1, rdrop_alpha=1.0), batch_of(6, constrained=True))
    loss.backward()
    gradients = [each.grad for each in engine.module.parameters() if each.grad is not None]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_masks_of_listed_answers_act_where_the_original_fails_on_a_tuple() -> None:
    """It assigns into the model's output, which is a tuple since January 2023: no task with a list trains."""
    free, listed = batch_of(7), batch_of(7, constrained=True)
    engine = Alone()
    assert loss_of(engine, Criterion(), listed)[0] < loss_of(engine, Criterion(), free)[0]


def test_the_encouraging_loss_with_rdrop_pairs_each_token_with_itself_where_the_original_pairs_by_rank() -> None:
    """It sorts the tokens of both passes by their loss before it halves them."""
    logits = torch.randn(8, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.tensor([4, 5, 6, 7] * 2)
    alone = Criterion(label_smoothing=0.1, encouraging=True)
    both = dataclasses.replace(alone, rdrop_alpha=1.0)
    first, second = logits.log_softmax(-1).chunk(2)
    divergence = 0.5 * ((first.exp() - second.exp()) * (first - second)).sum()
    ours = selected_loss(logits, target, both, update_num=1).loss
    torch.testing.assert_close(ours, selected_loss(logits, target, alone, update_num=1).loss + divergence)
    by_rank = selected_loss(logits, target, dataclasses.replace(both, drop_best_ratio=0.0), update_num=1).loss
    assert (by_rank - ours).abs() > 1e-3


def test_dropping_the_best_drops_them_where_the_originals_criterion_forgets_its_options() -> None:
    batch, engine = batch_of(8), Alone()
    kept, dropped = (loss_of(engine, Criterion(drop_best_ratio=ratio), batch) for ratio in (None, 0.3))
    assert dropped[1] < kept[1] and dropped[0] > kept[0]

"""Sums by loss group and by task, and the parts of the criteria that no recorded case covers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ofa_ds.terms import PAD_ID, TASKS
from ofa_ds.train.criteria import Criterion, criterion_loss
from ofa_ds.train.loss import TASK_SUMS, group_counts, group_sums, task_sums


@pytest.fixture
def batch() -> SimpleNamespace:
    """Three examples of 2, 3 and 1 targets; the second target of the middle one is pad."""
    return SimpleNamespace(
        targets=torch.tensor([5, 2, 7, PAD_ID, 2, 9]),
        decoder_offsets=torch.tensor([0, 2, 5, 6], dtype=torch.int32),
        loss_weight=torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 0.5]),
        task=torch.tensor([TASKS.index("caption"), TASKS.index("text_infilling"), TASKS.index("vqa")]),
        group=torch.tensor([0, 1, 0]),
    )


LOSS_M = torch.tensor([1.0, 2.0, 4.0, 100.0, 8.0, 16.0])


def test_group_sums_weigh_each_loss_and_leave_pads_out(batch: SimpleNamespace) -> None:
    assert group_sums(LOSS_M, batch).tolist() == [1 + 2 + 0.5 * 16, 2 * (4 + 8)]


def test_group_counts_count_targets_that_are_not_pad(batch: SimpleNamespace) -> None:
    assert group_counts(batch).tolist() == [3, 2]


def test_group_sums_give_each_token_its_weight_as_gradient_even_where_a_pad_loss_is_not_finite(
    batch: SimpleNamespace,
) -> None:
    loss_M = LOSS_M.clone().requires_grad_()
    group_sums(loss_M, batch).sum().backward()
    assert loss_M.grad.tolist() == [1, 1, 2, 0, 2, 0.5]
    assert group_sums(LOSS_M.masked_fill(LOSS_M == 100, torch.inf), batch).isfinite().all()


def test_task_sums_hold_unweighted_loss_nll_correct_and_count(batch: SimpleNamespace) -> None:
    correct_M = torch.tensor([True, False, True, True, True, False])
    sums = task_sums(LOSS_M, LOSS_M / 2, correct_M, batch)
    assert sums.shape == (len(TASKS), len(TASK_SUMS))
    assert sums[TASKS.index("caption")].tolist() == [3, 1.5, 1, 2]
    assert sums[TASKS.index("text_infilling")].tolist() == [12, 6, 2, 2]
    assert sums[TASKS.index("vqa")].tolist() == [16, 8, 0, 1]
    assert sums[TASKS.index("itm")].tolist() == [0, 0, 0, 0]


def logits_and_target() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    return logits, torch.randint(4, 11, (2, 5), generator=generator)


def test_drop_best_keeps_the_tokens_of_largest_loss() -> None:
    logits, target = logits_and_target()
    nll = -logits.log_softmax(-1).gather(-1, target[..., None]).flatten()
    out = criterion_loss(logits, target, Criterion(drop_best_ratio=0.3, drop_best_after=4), update_num=5)
    assert out.num_tokens == 7
    assert out.loss.item() == pytest.approx(nll.sort(descending=True).values[:7].sum().item())
    early = criterion_loss(logits, target, Criterion(drop_best_ratio=0.3, drop_best_after=4), update_num=4)
    assert early.num_tokens == 10


def test_rdrop_of_two_equal_halves_adds_nothing_and_of_different_ones_something_positive() -> None:
    logits, target = logits_and_target()
    alone = criterion_loss(logits, target, Criterion()).loss
    twice = torch.cat([logits, logits])
    assert criterion_loss(twice, target, Criterion(rdrop_alpha=1.0)).loss.item() == pytest.approx(2 * alone.item())
    other = torch.cat([logits, logits.flip(0)])
    without = criterion_loss(other, torch.cat([target, target]), Criterion()).loss
    assert criterion_loss(other, target, Criterion(rdrop_alpha=1.0)).loss > without


def test_positions_whose_classes_are_all_forbidden_do_not_disturb_the_gradient() -> None:
    logits, target = logits_and_target()
    logits.requires_grad_()
    mask = torch.ones(2, 5, 11, dtype=torch.bool)
    mask[:, 0] = False
    target[:, 0] = PAD_ID
    criterion_loss(logits, target, Criterion(label_smoothing=0.1), constraint_mask_BLV=mask).loss.backward()
    assert logits.grad.isfinite().all() and logits.grad[:, 0].abs().sum() == 0


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits, target = logits_and_target()
    assert criterion_loss(logits.bfloat16(), target, Criterion(label_smoothing=0.1)).loss.dtype == torch.float32


def test_wrong_shapes_and_contradicting_constraints_are_named() -> None:
    logits, target = logits_and_target()
    with pytest.raises(ValueError, match=r"want logits \[4, 5, V\], the batch twice for R-Drop, got \(2, 5, 11\)"):
        criterion_loss(logits, target, Criterion(rdrop_alpha=1.0))
    with pytest.raises(ValueError, match=r"constraint_range 6,12: want 4 <= start < end <= 11"):
        criterion_loss(logits, target, Criterion(constraint_range=(6, 12)))
    mask = torch.ones(2, 5, 11, dtype=torch.bool)
    with pytest.raises(ValueError, match="a constraint mask and a constraint_range"):
        criterion_loss(logits, target, Criterion(constraint_range=(6, 9)), constraint_mask_BLV=mask)

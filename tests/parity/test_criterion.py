"""The criteria on logits against every recorded case of the original's two criterion classes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter import stored_arrays
from torch import Tensor

from ofa_ds.train import criteria
from ofa_ds.train.criteria import Criterion, Loss, criterion_loss

FILE = "criterion.npz"
TOLERANCE = 1e-9


def criterion_of(meta: dict[str, Any]) -> Criterion:
    """Our options for the constructor arguments of the original's classes."""
    ctor = meta["ctor"]
    encouraging = "Encouraging" in meta["criterion"]
    id_range = ctor.get("constraint_range")
    return Criterion(
        label_smoothing=ctor["label_smoothing"],
        constraint_range=tuple(int(part) for part in id_range.split(",")) if id_range else None,
        ignore_prefix_tokens=ctor.get("ignore_prefix_size", 0),
        ignore_eos=ctor.get("ignore_eos", False),
        drop_worst_ratio=ctor.get("drop_worst_ratio", 0.0),
        drop_worst_after=ctor.get("drop_worst_after", 0),
        rdrop_alpha=ctor.get("reg_alpha", 1.0) if ctor.get("use_rdrop") else 0.0,
        encouraging=encouraging,
        log_end=ctor.get("log_end", 0.75),
        # The original's encouraging loss never hands its drop_best options on: the ratio is 0, which still sorts.
        drop_best_ratio=0.0 if encouraging else None,
    )


def run(case: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[list[Loss], list[Tensor]]:
    """Our loss of each sample of a case (the pretraining pair has two), and the logits that require gradients."""
    criterion, losses, logits = criterion_of(meta), [], []
    while f"{case}/in_logits_{len(logits)}" in arrays:
        i = len(logits)
        optional = {
            name: None if key not in arrays else torch.from_numpy(arrays[key])
            for name, key in (
                ("conf_B", f"{case}/in_conf_{i}"),
                ("constraint_mask_BLV", f"{case}/in_constraint_masks_{i}"),
            )
        }
        logits.append(torch.from_numpy(arrays[f"{case}/in_logits_{i}"]).double().requires_grad_())
        target = torch.from_numpy(arrays[f"{case}/in_target_{i}"])
        losses.append(criterion_loss(logits[i], target, criterion, update_num=meta["update_num"], **optional))
    assert losses, case
    return losses, logits


def forgets_targets(meta: dict[str, Any]) -> bool:
    """Whether the original pairs the kept tokens with the targets of others: its encouraging loss, where drop_worst
    selects among R-Drop's tokens, leaves the targets as they were. Ours does not."""
    criterion = criterion_of(meta)
    dropping = criterion.drop_worst_ratio > 0 and meta["update_num"] > criterion.drop_worst_after
    return criterion.encouraging and criterion.rdrop_alpha > 0 and dropping


def take_but_forget_targets_once() -> Callable[[criteria._Tokens, Tensor], criteria._Tokens]:
    """`_Tokens.take` with the original's mistake in its first call."""
    proper, calls = criteria._Tokens.take, []

    def take(tokens: criteria._Tokens, index: Tensor) -> criteria._Tokens:
        calls.append(index)
        return proper(tokens, index) if len(calls) > 1 else proper(tokens, index)._replace(target_N=tokens.target_N)

    return take


def check(case: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    losses, logits = run(case, meta, arrays)
    if len(losses) == 2:
        total = sum(part.loss / part.num_tokens for part in losses)
        nll = sum(part.nll / part.num_tokens for part in losses)
        sample_size = 1
    else:
        (part,) = losses
        total, nll = part.loss, part.nll
        num_sentences = logits[0].shape[0]
        sample_size = num_sentences if meta["ctor"].get("sentence_avg") else part.num_tokens
    total.backward()
    recorded = arrays.get(f"{case}/loss")
    if meta["error"] is not None or math.isnan(recorded):
        # The original raises or gives NaN here; docs/ofa.md, Training: criteria says what is meant.
        assert total.isfinite() and all(tensor.grad.isfinite().all() for tensor in logits), case
        return
    assert total.item() == pytest.approx(recorded.item(), rel=TOLERANCE), case
    assert nll.item() == pytest.approx(arrays[f"{case}/log_nll_loss"].item(), rel=TOLERANCE), case
    assert sample_size == arrays[f"{case}/sample_size"].item(), case
    for i, tensor in enumerate(logits):
        expected = torch.from_numpy(arrays[f"{case}/grad_logits_{i}"]).double()
        assert (tensor.grad - expected).norm() <= TOLERANCE * expected.norm(), f"{case}: gradient {i}"


@pytest.mark.golden(FILE)
def test_every_recorded_case_gives_the_loss_and_gradient_of_the_original(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = stored_arrays(golden_dir / FILE)
    cases = json.loads(arrays["meta"].item())
    failed = []
    for case, meta in cases.items():
        try:
            with monkeypatch.context() as patch:
                if forgets_targets(meta):
                    patch.setattr(criteria._Tokens, "take", take_but_forget_targets_once())
                check(case, meta, arrays)
        except AssertionError as error:
            failed.append(str(error).splitlines()[0])
    assert cases and not failed, "\n".join(failed)

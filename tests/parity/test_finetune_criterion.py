"""Further options of the original criteria: on padded logits, and on the packed batches of fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter import stored_arrays
from test_criterion import check, criterion_of, forgets_targets, take_but_forget_targets_once
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.config.architecture import PRESETS
from ofa_ds.model.ofa import OFA
from ofa_ds.terms import EOS_ID, PAD_ID, TASKS
from ofa_ds.train import criteria
from ofa_ds.train.criteria import Criterion, selected_loss
from ofa_ds.train.objective import TaskLoss

FILE = "finetune/criterion_more.npz"
FILES = {"fixtures/criterion.npz": "", FILE: "finetune/criterion_more_meta.json"}
TOLERANCE = 1e-9
FP32_SMOOTHING = 1e-7
"""Under a mask the original's eps_i has fp32 rounding in it, relative to the loss; the packed path has not."""


def read(root: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = stored_arrays(root / name)
    meta = json.loads((root / FILES[name]).read_text() if FILES[name] else arrays["meta"].item())
    return meta, arrays


class Logits:
    """An engine of a model that gives recorded logits: they are its states, its embedding is the identity."""

    def __init__(self, logits_RLV: Tensor, update_num: int) -> None:
        vocab = logits_RLV.shape[-1]
        config = dataclasses.replace(PRESETS["nano"], dim=vocab, num_heads=4, ffn_dim=8, vocab_size=vocab)
        self.model = OFA(config).double()
        self.model.encoder.embed_tokens.weight.data = torch.eye(vocab, dtype=torch.float64)
        self.logits, self.num_updates, self.device = logits_RLV, update_num, torch.device("cpu")

    def __call__(self, batch: Batch, label_smoothing: float = 0.0, **options: Any) -> tuple[Tensor, ...]:
        return self.model.losses(self.logits.flatten(0, 1), batch, label_smoothing, **options)


def packed(target_BL: Tensor, conf_B: Tensor | None, mask_BLV: Tensor | None) -> Batch:
    """The decoder side of a padded batch; pads are targets without a loss."""
    rows, length = target_BL.shape
    none, offsets = torch.empty(0, dtype=torch.int64), torch.arange(rows + 1, dtype=torch.int32)
    allowed = {}
    if mask_BLV is not None:
        mask_MV = mask_BLV.flatten(0, 1) & (target_BL.flatten() != PAD_ID)[:, None]
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), mask_MV.sum(-1).cumsum(0)])
        allowed = {"allowed_ids": mask_MV.nonzero()[:, 1], "allowed_offsets": ends}
    conf_B = torch.ones(rows) if conf_B is None else conf_B
    return Batch(
        images=(), image_holes=(), image_weight=(), patch_index=none, patch_position=none, patch_slot=none,
        source_tokens=none, source_position=none, source_slot=none, encoder_offsets=offsets * 0,
        num_patches=torch.zeros(rows, dtype=torch.int32), decoder_tokens=target_BL.flatten(),
        decoder_position=torch.arange(length).repeat(rows), decoder_offsets=offsets * length,
        targets=target_BL.flatten(), loss_weight=conf_B.repeat_interleave(length),
        code_mask=torch.zeros(rows, dtype=torch.bool), task=torch.full((rows,), TASKS.index("vqa")),
        group=torch.ones(rows, dtype=torch.int64), **allowed,
    )  # fmt: skip


def check_packed(case: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Loss / count and its gradient, as `TaskLoss` has them."""
    criterion = criterion_of(meta)
    target = torch.from_numpy(arrays[f"{case}/in_target_0"])
    if criterion.ignore_eos:
        target = target.masked_fill(target == EOS_ID, PAD_ID)
    target[:, : criterion.ignore_prefix_tokens] = PAD_ID
    given = {name: arrays.get(f"{case}/in_{name}_0") for name in ("conf", "constraint_masks")}
    batch = packed(target, *(None if each is None else torch.from_numpy(each) for each in given.values()))
    logits = torch.from_numpy(arrays[f"{case}/in_logits_0"]).double().requires_grad_()
    objective, engine = TaskLoss(criterion), Logits(logits, meta["update_num"])
    (prepared,) = objective.prepare(engine, [batch])
    counts = prepared.counts.clamp(min=1)
    loss = objective.loss(engine, prepared, counts).loss
    loss.backward()
    if not meta["ctor"].get("sentence_avg") and meta["error"] is None:
        assert prepared.counts.item() == arrays[f"{case}/sample_size"].item(), case
    recorded = arrays.get(f"{case}/loss")
    if meta["error"] is not None or math.isnan(recorded):
        assert loss.isfinite() and logits.grad.isfinite().all(), case
        return
    tolerance = FP32_SMOOTHING if given["constraint_masks"] is not None else TOLERANCE
    assert loss.item() * counts.item() == pytest.approx(recorded.item(), rel=tolerance), case
    expected = torch.from_numpy(arrays[f"{case}/grad_logits_0"]).double()
    assert (logits.grad * counts - expected).norm() <= tolerance * expected.norm(), f"{case}: gradient"


def failures(root: Path, name: str, how: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    cases, arrays = read(root, name)
    failed = []
    for case, meta in cases.items():
        if "function" in meta or f"{case}/in_logits_1" in arrays:
            continue
        try:
            with monkeypatch.context() as patch:
                if forgets_targets(meta):
                    patch.setattr(criteria._Tokens, "take", take_but_forget_targets_once())
                how(case, meta, arrays)
        except AssertionError as error:
            failed.append(str(error).splitlines()[0])
    assert cases
    return failed


@pytest.mark.golden(FILE)
def test_every_further_case_gives_the_loss_and_gradient_of_the_original(golden_root, monkeypatch):
    assert not failures(golden_root, FILE, check, monkeypatch)


@pytest.mark.golden(FILE)
def test_the_packed_criterion_of_training_gives_the_same_in_every_further_case(golden_root, monkeypatch):
    assert not failures(golden_root, FILE, check_packed, monkeypatch)


@pytest.mark.golden("criterion.npz")
def test_the_packed_criterion_of_training_gives_the_same_in_every_case_of_one_sample(golden_root, monkeypatch):
    name = "fixtures/criterion.npz" if (golden_root / "fixtures").is_dir() else "criterion.npz"
    monkeypatch.setitem(FILES, name, "")
    assert not failures(golden_root, name, check_packed, monkeypatch)


@pytest.mark.golden(FILE)
def test_drop_best_acts_as_the_originals_inner_function_means_it_and_its_criterion_forgets(golden_root):
    """The original's criterion takes drop_best_* and never hands them on."""
    cases, arrays = read(golden_root, FILE)
    inner = {case: meta["kwargs"] for case, meta in cases.items() if "function" in meta}
    for case, kwargs in inner.items():
        options = {name: kwargs[name] for name in kwargs if name.startswith("drop_")}
        criterion = Criterion(label_smoothing=kwargs["epsilon"], **options)
        logits = torch.from_numpy(arrays[f"{case}/in_logits"]).double().requires_grad_()
        target = torch.from_numpy(arrays[f"{case}/in_target"]).flatten()
        found = selected_loss(logits.flatten(0, -2), target, criterion, update_num=kwargs["update_num"])
        found.loss.backward()
        assert found.loss.item() == pytest.approx(arrays[f"{case}/loss"].item(), rel=TOLERANCE), case
        assert found.nll.item() == pytest.approx(arrays[f"{case}/nll_loss"].item(), rel=TOLERANCE), case
        assert found.num_tokens == arrays[f"{case}/ntokens"].item(), case
        expected = torch.from_numpy(arrays[f"{case}/grad_logits"]).double()
        assert (logits.grad - expected).norm() <= TOLERANCE * expected.norm(), case
    assert inner

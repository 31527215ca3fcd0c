"""Twelve updates of the micro model, and the learning rates, against those of the original's trainer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import adapter
import numpy as np
import pytest
import torch
from adapter import stored_arrays
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.config import KernelConfig
from ofa_ds.engine.schedule import polynomial_lr
from ofa_ds.model.ofa import OFA
from ofa_ds.train.loss import group_counts, group_sums

FILE = "train_trajectory.npz"
PAIR = ("case_c_partial_patch_masks.npz", "case_d2_code_mixed.npz")
BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.999), 1e-8, 0.01, 5.0


@dataclasses.dataclass
class OriginalAdam:
    """Adam of the original: weights decay apart, and eps is added before the bias correction of the second moment."""

    parameters: list[Tensor]

    def __post_init__(self) -> None:
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.num_updates = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.num_updates += 1
        corrections = [1 - beta**self.num_updates for beta in BETAS]
        for parameter, (first, second) in zip(self.parameters, self.moments, strict=True):
            if parameter.grad is None:
                continue
            first.lerp_(parameter.grad, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
            parameter.mul_(1 - WEIGHT_DECAY * lr)
            parameter.addcdiv_(first, second.sqrt() + EPS, value=-lr * corrections[1] ** 0.5 / corrections[0])


class TorchAdam:
    """The AdamW of torch, which adds eps after the correction."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.inner = torch.optim.AdamW(parameters, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)

    def step(self, lr: float) -> None:
        self.inner.param_groups[0]["lr"] = lr
        self.inner.step()


NOTHING_HERE = (
    "allowed_ids", "allowed_offsets", "encoder_of", "reference_bytes", "reference_offsets", "num_references"
)  # fmt: skip
"""Fields of fine-tuning."""


def joined(first: Batch, second: Batch) -> Batch:
    """One batch of the examples of both: loss group 0 and 1."""
    height, width = (side // adapter.MICRO.patch_size for side in first.images[0].shape[2:])
    num_patches, num_slots = len(first.images[0]) * height * width, int(first.encoder_offsets[-1])
    shifts = {"patch_index": num_patches, "patch_slot": num_slots, "source_slot": num_slots}
    values = {}
    for field in dataclasses.fields(Batch):
        one, two = getattr(first, field.name), getattr(second, field.name)
        if field.name in NOTHING_HERE:
            values[field.name] = one
        elif field.name.startswith("image"):
            values[field.name] = one + two
        elif field.name.endswith("offsets"):
            values[field.name] = torch.cat([one, two[1:] + one[-1]])
        else:
            shift = shifts.get(field.name)
            values[field.name] = torch.cat([one, two if shift is None else two + shift])
    values["group"] = torch.cat([torch.zeros(first.num_examples), torch.ones(second.num_examples)]).long()
    return Batch(**values)


def pack_pair(inputs: list[dict[str, np.ndarray]], patch_orders: np.ndarray | None, dtype: torch.dtype) -> Batch:
    first, _ = adapter.pack_padded(inputs[0], adapter.MICRO, dtype=dtype, patch_orders=patch_orders)
    second, _ = adapter.pack_padded(inputs[1], adapter.MICRO, dtype=dtype)
    return joined(first, second)


@pytest.mark.golden(FILE)
@pytest.mark.parametrize("tag", ["plain", "sampled_patches7_ls0.1"])
def test_twelve_updates_are_those_of_the_original(tag: str, golden_dir: Path) -> None:
    follow(tag, golden_dir, OriginalAdam, torch.float64, 1e-9)


@pytest.mark.golden(FILE)
def test_adamw_of_torch_in_fp32_stays_near_the_original(golden_dir: Path, chosen: KernelConfig) -> None:
    follow("sampled_patches7_ls0.1", golden_dir, TorchAdam, torch.float32, 1e-3, chosen)


def follow(
    tag: str,
    golden_dir: Path,
    optimizer: type,
    dtype: torch.dtype,
    tolerance: float,
    kernels: KernelConfig | None = None,
) -> None:
    """Train on the recorded pair; compare loss and gradient norm of each update, and the weights at the end."""
    stored = stored_arrays(golden_dir / FILE)
    recorded = {key.removeprefix(f"{tag}/"): value for key, value in stored.items() if tag in key}
    inputs = [
        {key.removeprefix("in/"): value for key, value in pair.items() if key.startswith("in/")}
        for pair in (stored_arrays(golden_dir / name) for name in PAIR)
    ]
    smoothing = float(match[1]) if (match := re.search(r"_ls([\d.]+)", tag)) else 0.0
    config = dataclasses.replace(adapter.MICRO, kernels=kernels or KernelConfig())
    model = OFA(config).to(dtype).train()
    adapter.load(model, adapter.stored_weights(golden_dir, "micro_state.npz"))
    parameters = list(model.parameters())
    adam = optimizer(parameters)
    for update, lr in enumerate(recorded["lr"].tolist()):
        orders = recorded["patch_orders"][update] if "patch_orders" in recorded else None
        batch = pack_pair(inputs, orders, dtype)
        counts = group_counts(batch)
        assert counts.tolist() == recorded["sample_sizes"][update].tolist()
        loss_M, _, _ = model(batch, smoothing)
        loss = (group_sums(loss_M, batch) / counts).sum()
        assert loss.item() == pytest.approx(recorded["loss"][update], rel=tolerance), update
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        assert norm.item() == pytest.approx(recorded["grad_norm_before_clip"][update], rel=10 * tolerance), update
        adam.step(lr)
    state = model.state_dict()
    for key in (key for key in recorded if key.startswith("final/")):
        value, expected = state[key.removeprefix("final/")], torch.from_numpy(recorded[key])
        assert (value - expected).norm() <= 10 * tolerance * expected.norm(), key


@pytest.mark.golden(FILE)
def test_learning_rates_are_those_of_the_original(golden_dir: Path) -> None:
    schedules = {key: value for key, value in stored_arrays(golden_dir / FILE).items() if key.startswith("lr/")}
    assert schedules
    for key, recorded in schedules.items():
        parts = dict(re.findall(r"(lr|total|ratio|power|end)(\d[\d.]*(?:e-?\d+)?)", key.removeprefix("lr/")))
        num_steps = int(parts["total"])
        for update, lr in enumerate(recorded.tolist()):
            ours = polynomial_lr(
                update,
                peak_lr=float(parts["lr"]),
                warmup_steps=int(num_steps * float(parts["ratio"])),
                num_steps=num_steps,
                end_lr=float(parts.get("end", 0)),
                power=float(parts.get("power", 1)),
            )
            assert ours == pytest.approx(lr, rel=1e-12), f"{key}: update {update}"

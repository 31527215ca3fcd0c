"""A whole training step on a GPU, forward to backward, with torch told to raise where the host waits for the device.

    TRITON_INTERPRET=0 python -m pytest tests/kernels/test_gpu_step.py -m gpu

On a CPU the same is looked for in test_no_waiting.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from training_step import arrived, config, engine_of

from ofa_ds.model.config import ResNetConfig
from ofa_ds.train.criteria import Criterion
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import Objective, TaskLoss, TokenLoss
from ofa_ds.train.step import train_step

pytestmark = pytest.mark.gpu

OBJECTIVES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "pretraining": (TokenLoss(0.1), {}),
    "constrained": (TaskLoss(Criterion(label_smoothing=0.1)), {"constrained": True, "prompt": 1}),
    "R-Drop": (TaskLoss(Criterion(label_smoothing=0.1, rdrop_alpha=1.0)), {"prompt": 1}),
}


@pytest.fixture(autouse=True)
def waiting_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backbone", ["stem", "ResNet"])
@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_bf16_waits_for_nothing(name: str, kernel: str, backbone: str) -> None:
    (objective, options), device = OBJECTIVES[name], torch.device("cuda", 0)
    model = config(kernel, dim=128, ffn_dim=256)
    if backbone == "ResNet":
        model = dataclasses.replace(model, backbone=ResNetConfig(depths=(1, 1, 1)), batch_norm="batch")
    engine = engine_of(
        model, device=device, dtype=torch.bfloat16, before_update=lambda: torch.cuda.set_sync_debug_mode("default")
    )
    window = Window(device)
    for mode in ("default", "error"):  # the first step compiles, and fills caches
        batches = [arrived(seed, model, **options) for seed in (1, 2)]
        torch.cuda.set_sync_debug_mode(mode)
        train_step(engine, batches, window, objective)
    assert window.num_counted == 2

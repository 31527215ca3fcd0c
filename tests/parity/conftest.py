"""Precision and kernels of the parity tests: `--kernels triton` runs them in fp32 with every kernel on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapter
import numpy as np
import pytest
import quick_interpreter  # noqa: F401
import torch
from cases import KERNELS_ON

from ofa_ds.config import KernelConfig


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest, kernels: str) -> torch.dtype:
    if kernels == "triton" and request.param == torch.float64:
        pytest.skip("kernels compute in fp32")
    return request.param


@pytest.fixture(scope="module")
def arrays(request: pytest.FixtureRequest, golden_root: Path) -> dict[str, np.ndarray]:
    """Those of the module's FILE."""
    return adapter.stored_arrays(golden_root / request.module.FILE)


@pytest.fixture(scope="module")
def meta(request: pytest.FixtureRequest, golden_root: Path) -> dict[str, Any]:
    """What stands beside them."""
    file = golden_root / request.module.FILE
    return json.loads(file.with_name(f"{file.stem}_meta.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chosen(kernels: str) -> KernelConfig:
    return KERNELS_ON if kernels == "triton" else KernelConfig()

"""Precision and kernels of the parity tests: `--kernels triton` runs them in fp32 with every kernel on."""

from __future__ import annotations

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
def chosen(kernels: str) -> KernelConfig:
    return KERNELS_ON if kernels == "triton" else KernelConfig()

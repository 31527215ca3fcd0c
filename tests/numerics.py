"""How far a result may be from a reference: the one place where tolerances are computed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative error against numbers recorded in float64."""


def relative_error(out: Tensor, exact: Tensor | np.ndarray, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of `exact` (or `floor`, if that is larger), both in float64."""
    exact = torch.as_tensor(exact).double()
    assert out.shape == exact.shape, f"shape {tuple(out.shape)}, want {tuple(exact.shape)}"
    if not exact.numel():
        return 0.0
    difference = (out.detach().double() - exact).norm().item()
    scale = max(exact.norm().item(), floor)
    return difference / scale if scale else difference


def assert_close(out: Tensor, exact: Tensor | np.ndarray, tolerance: float, what: str, floor: float = 0.0) -> None:
    """Fail with `what` and the error where `out` is further from `exact` than `tolerance`, relatively.

    Numbers recorded in float32 are only known to its precision.
    """
    if torch.as_tensor(exact).dtype == torch.float32:
        tolerance = max(tolerance, torch.finfo(torch.float32).eps)
    error = relative_error(out, exact, floor)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


def assert_as_accurate(out: Tensor, low: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """`out` may be at most `factor` times further from `exact` than plain torch at the same dtype is.

    out: the kernel; low: the reference run in the kernel's dtype; exact: the reference in float64.
    """
    error, budget = ((x.double() - exact.double()).abs().max().item() for x in (out, low))
    assert error <= factor * budget + 1e-6, f"max error {error:.3e}, budget {factor} x {budget:.3e}"

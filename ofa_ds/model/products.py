"""Linear layers on a CPU, by oneDNN where torch's BLAS leaves half of the processor idle.

torch computes fp32 products with Intel's MKL, which keeps to 256-bit instructions on AMD's processors: 97 GFLOP/s on a
core of an EPYC of the fifth generation, where oneDNN's 512-bit ones reach 215. What that does to a training step is in
`python -m ofa_ds.bench step`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_PRODUCT = 1 << 25
"""Multiplications from which on oneDNN pays: it then saves 0.4 ms a call, against milliseconds for each new shape."""
MIN_ROWS = 128
"""With fewer, padding to ROWS could cost a quarter and more of what is gained."""
ROWS = 32
"""Rows are padded to a multiple: oneDNN compiles each new shape, for milliseconds, and batches differ in length."""


_allowed = True


@contextmanager
def without_onednn() -> Iterator[None]:
    """Linear layers called inside are torch's own, forward and backward: what a benchmark compares with."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512 and torch has oneDNN's linear layer."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "AuthenticAMD" in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, min_rows: int | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N], as `torch.nn.functional.linear`.

    min_rows: from so many rows on by oneDNN, in place of MIN_ROWS.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= MIN_PRODUCT
        and x.numel() >= (min_rows or MIN_ROWS) * x.shape[-1]
        and _allowed
        and onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1])
        padded_RK = _padded(x_MK)
        ctx.save_for_backward(padded_RK, weight)
        ctx.shape = x.shape
        # Cut off the padding in place: of a view, autograd would not let a caller change a value.
        return _product(padded_RK, weight, bias).resize_(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded_RK, weight = ctx.saved_tensors
        grad_MN = grad.reshape(-1, grad.shape[-1])
        grad_RN = _padded(grad_MN)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _product(grad_RN, weight.t()).resize_(ctx.shape)
        if ctx.needs_input_grad[1]:
            dweight = _product(grad_RN.t(), padded_RK.t())
        if ctx.needs_input_grad[2]:
            dbias = grad_MN.sum(0)
        return dx, dweight, dbias


def _padded(x_MK: Tensor) -> Tensor:
    """The rows, and rows of zeros up to a multiple of ROWS."""
    num_rows = len(x_MK)
    if num_rows % ROWS == 0:
        return x_MK.contiguous()
    out_RK = x_MK.new_empty(-(-num_rows // ROWS) * ROWS, x_MK.shape[1])
    out_RK[:num_rows] = x_MK
    out_RK[num_rows:] = 0
    return out_RK


def _product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x weight^T + bias."""
    return torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, bias_N, "none", [], "")

"""The norms of OFA in the form that moves the fewest bytes.

    layer_norm(x)         y = (x - mean) * rstd * weight + bias,   rstd = (variance + eps)^-1/2
    gelu_layer_norm(x)    layer_norm(gelu(x)): the backward computes gelu again, only x and two numbers a row are kept
    add_layer_norm(r, x)  z = r + keep[example] * gamma * dropout(x),   y = layer_norm(z)
    add_branch(r, x)      z alone

Plain torch is the reference and the CPU path. The Triton kernels (`layer_norm_triton`) keep statistics in fp32, round
each result once, draw dropout masks again in the backward instead of keeping them and sum the gradients of parameters
in a fixed order.

Bytes at 16 bits, forward + backward, times rows x width: layer_norm 4 + 6, in torch 4 + 10; gelu_layer_norm 4 + 6 (from
width 8192 on 4 + 10), in torch 8 + 16; add_layer_norm with dropout 8 + 10, in torch 15 + 21. "auto" chooses by this
arithmetic; nothing here was measured on a GPU.

Shapes: N tokens, D channels, F channels of the feed-forward, E examples.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa_kernels._launch import KERNELS, use_triton

NORM_KERNELS = (*KERNELS, "apex")
"""What `kernel` may be: those of any operator, and the fused norm of NVIDIA's apex."""
MAX_WIDTH = 11264
"""Widest row that was compiled; "auto" gives wider ones to torch."""
MIN_ELEMENTS = 1 << 22
"""Below this "auto" gives a call to torch. Arithmetic, of host and device (README, Norms): forward and backward cost
the host 30 us (after GELU) to 120 us (with residual and dropout) more than torch's, and save an A100 14 and 18 bytes
an element, which are 30 us from 4.4 M elements of gelu_layer_norm and 120 us from 13 M of add_layer_norm on. Where the
device is behind the host, the host's time costs nothing: with a pretraining micro-batch that is so from about width
1024 (4.6 M elements) on. Decoding steps and the layers of base and below wait for the host."""


def layer_norm(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, *, eps: float = 1e-5, kernel: str = "auto") -> Tensor:
    """LayerNorm over the last axis -> [N, D] in x's dtype; weight and bias in x's dtype or fp32.

    kernel: one of NORM_KERNELS. float64 always runs in torch. Raises ValueError where shapes disagree or the kernel is
    unknown, RuntimeError where the kernel cannot run.
    """
    _check("layer_norm", x_ND, vectors_D=(weight_D, bias_D))
    chosen = _choose(kernel, x_ND)
    if chosen == "triton":
        return _triton_ops().normed(x_ND.contiguous(), weight_D.contiguous(), bias_D.contiguous(), eps, False)
    return _norm(chosen, x_ND, weight_D, bias_D, eps)


def gelu_layer_norm(
    x_NF: Tensor, weight_F: Tensor, bias_F: Tensor, *, eps: float = 1e-5, kernel: str = "auto"
) -> Tensor:
    """LayerNorm of the exact (erf) GELU of x -> [N, F] in x's dtype. The rest as in `layer_norm`."""
    _check("gelu_layer_norm", x_NF, vectors_D=(weight_F, bias_F))
    chosen = _choose(kernel, x_NF)
    if chosen == "triton":
        return _triton_ops().normed(x_NF.contiguous(), weight_F.contiguous(), bias_F.contiguous(), eps, True)
    return _norm(chosen, F.gelu(x_NF), weight_F, bias_F, eps)


def add_layer_norm(
    residual_ND: Tensor,
    x_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    *,
    eps: float = 1e-5,
    dropout: float = 0.0,
    gamma_D: Tensor | None = None,
    example_N: Tensor | None = None,
    keep_E: Tensor | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(z, LayerNorm(z)), both [N, D], with z as in `add_branch`, rounded to its dtype before the norm."""
    _check("add_layer_norm", x_ND, residual_ND, (weight_D, bias_D, gamma_D), (example_N, keep_E), dropout)
    chosen = _choose(kernel, x_ND)
    if chosen == "triton":
        return _triton_add(residual_ND, x_ND, (weight_D, bias_D, gamma_D), (example_N, keep_E), eps, dropout)
    z_ND = _add(residual_ND, x_ND, dropout, gamma_D, example_N, keep_E)
    return z_ND, _norm(chosen, z_ND, weight_D, bias_D, eps)


def add_branch(
    residual_ND: Tensor,
    x_ND: Tensor,
    *,
    dropout: float = 0.0,
    gamma_D: Tensor | None = None,
    example_N: Tensor | None = None,
    keep_E: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """residual + keep_E[example_N] * gamma * dropout(x) -> [N, D]; the rest as in `layer_norm`.

    dropout: probability; the mask comes from torch's default CPU generator, by a seed in the kernel. gamma_D: scale per
    channel, or None. example_N: int, row -> example. keep_E: fp32, drop-path's factor of each example, 0 or 1 / keep;
    None for none. The result has x's dtype, or the wider one where residual has another.
    """
    _check("add_branch", x_ND, residual_ND, (gamma_D,), (example_N, keep_E), dropout)
    fuses = dropout > 0 or gamma_D is not None or keep_E is not None  # a bare sum is torch's own
    if _choose(kernel, x_ND, pays=fuses) == "triton":
        return _triton_add(residual_ND, x_ND, (None, None, gamma_D), (example_N, keep_E), 0.0, dropout)[0]
    return _add(residual_ND, x_ND, dropout, gamma_D, example_N, keep_E)


def _check(
    name: str,
    x_ND: Tensor,
    residual_ND: Tensor | None = None,
    vectors_D: tuple[Tensor | None, ...] = (),
    drop_path: tuple[Tensor | None, Tensor | None] = (None, None),
    dropout: float = 0.0,
) -> None:
    """Raise ValueError where the arguments of an operator do not go together."""
    rows = [x_ND] if residual_ND is None else [residual_ND, x_ND]
    vectors = [each for each in vectors_D if each is not None]
    if x_ND.ndim != 2 or rows[0].shape != x_ND.shape or any(each.shape != x_ND.shape[1:] for each in vectors):
        got = ", ".join(str(tuple(each.shape)) for each in rows + vectors)
        raise ValueError(f"{name}: want {'x' if len(rows) == 1 else 'residual, x'} [N, D] and vectors [D], got {got}")
    example_N, keep_E = drop_path
    if (example_N is None) != (keep_E is None):
        raise ValueError(f"{name}: want both of example_N and keep_E or neither")
    if keep_E is not None and (example_N.shape != x_ND.shape[:1] or keep_E.ndim != 1 or keep_E.dtype != torch.float32):
        raise ValueError(
            f"{name}: want example_N [{x_ND.shape[0]}] and keep_E [E] in float32, got {tuple(example_N.shape)} and "
            f"{tuple(keep_E.shape)} in {str(keep_E.dtype).removeprefix('torch.')}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}: want 0 <= dropout < 1, got {dropout}")


def _choose(kernel: str, x_ND: Tensor, pays: bool = True) -> str:
    """Which implementation runs: "triton", "torch" or "apex"."""
    if kernel not in NORM_KERNELS:
        raise ValueError(f"kernel {kernel!r}: want one of {', '.join(NORM_KERNELS)}")
    if kernel == "apex":
        return "apex"
    pays = pays and x_ND.shape[1] <= MAX_WIDTH and x_ND.numel() >= MIN_ELEMENTS
    return "triton" if use_triton(kernel, x_ND, pays) and x_ND.dtype != torch.float64 else "torch"


def _triton_ops() -> ModuleType:
    from ofa_kernels import layer_norm_ops_triton  # needs triton, which only a chosen kernel does

    return layer_norm_ops_triton


def _triton_add(
    residual_ND: Tensor,
    x_ND: Tensor,
    vectors_D: tuple[Tensor | None, ...],
    drop_path: tuple[Tensor | None, Tensor | None],
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(z, its norm; empty without a weight)."""
    seed = torch.randint(1 << 31, (1,), device="cpu") if dropout else None  # checkpointing restores this generator
    dense = [None if each is None else each.contiguous() for each in (residual_ND, x_ND, *vectors_D, *drop_path)]
    return _triton_ops().added(*dense, seed, eps, dropout)


def _norm(chosen: str, x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LayerNorm by torch or apex, in x's dtype; both want the weights in the dtype they compute in."""
    dtype = torch.promote_types(x_ND.dtype, weight_D.dtype)
    wide_ND, weight_D, bias_D = x_ND.to(dtype), weight_D.to(dtype), bias_D.to(dtype)
    if chosen == "apex":
        y_ND = _apex_norm()(wide_ND, weight_D, bias_D, x_ND.shape[1:], eps)
    else:
        y_ND = F.layer_norm(wide_ND, x_ND.shape[1:], weight_D, bias_D, eps)
    return y_ND.to(x_ND.dtype)


def _apex_norm() -> Callable[..., Tensor]:
    """apex's function (x, weight, bias, shape, eps) -> y. The `apex` of the package index is another project."""
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError:
        fused_layer_norm_affine = None
    if fused_layer_norm_affine is None or importlib.util.find_spec("fused_layer_norm_cuda") is None:
        raise RuntimeError("kernel 'apex': no fused layer norm of NVIDIA's apex here; choose 'auto' or 'torch'")
    return fused_layer_norm_affine


def _add(
    residual_ND: Tensor,
    x_ND: Tensor,
    dropout: float,
    gamma_D: Tensor | None,
    example_N: Tensor | None,
    keep_E: Tensor | None,
) -> Tensor:
    """`add_branch` in plain torch, in the dtypes it is given."""
    if dropout:
        x_ND = F.dropout(x_ND, dropout)
    if gamma_D is not None:
        x_ND = x_ND * gamma_D
    if keep_E is not None:
        x_ND = x_ND * keep_E.to(x_ND.dtype)[example_N, None]
    return residual_ND + x_ND

"""Launches of the kernels in `layer_norm_triton` and their torch.library operators.

Two operators, each with the operator of its backward: the norm of x or gelu(x), and the residual sum with or without
its norm. Fake versions give shapes alone, so torch.compile and fake tensors see through them. Shapes as in the kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ofa_kernels import layer_norm_triton as kernels

ROWS_PER_PROGRAM = 4
"""At least this many in a backward, so that the partial sums stay small beside the rows."""
WARPS_PER_PROCESSOR = 16
"""Resident at 128 registers a thread, which is what the widest backward takes."""
DROPOUT_STEPS = 1 << 31
"""A dropout probability is rounded to this many steps."""


def _allocate(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Every output of a kernel comes from here, so that a test can poison and guard it."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def _backward_grid(x_NW: Tensor) -> int:
    """Programs of a backward: a function of the shape and the GPU alone, since it decides the order of the sums."""
    resident = _processors(x_NW) * max(1, WARPS_PER_PROCESSOR // kernels.warps(x_NW.shape[1]))
    return min(triton.cdiv(x_NW.shape[0], ROWS_PER_PROGRAM), resident)


def _constants(width: int) -> dict[str, int]:
    return {**kernels.parts(width), "num_warps": kernels.warps(width), "num_stages": 1}


def _branch(dropout: float, seed: Tensor | None) -> dict[str, Any]:
    return {
        "seed": 0 if seed is None else int(seed),
        "threshold": min(round(dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1),
        "scale": 1 / (1 - dropout),
        "DROPOUT": dropout > 0,
    }


def _parameter_dtype(*parameters_W: Tensor | None) -> torch.dtype:
    """Of their gradients, before each is cast to its own."""
    dtypes = [each.dtype for each in parameters_W if each is not None]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _each_gradient(dparameters_KW: Tensor, *parameters_W: Tensor | None) -> tuple[Tensor | None, ...]:
    rows = iter(dparameters_KW.unbind())
    return tuple(None if each is None else next(rows).to(each.dtype) for each in parameters_W)


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    """autograd hands over None for an output that nobody used, and any strides."""
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


@torch.library.custom_op("ofa_kernels::norm", mutates_args=())
def norm(x_NW: Tensor, weight_W: Tensor, bias_W: Tensor, eps: float, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, W] in x's dtype, mean [N], rstd [N]) of x or of gelu(x)."""
    num_rows, width = x_NW.shape
    y_NW = _allocate(x_NW, num_rows, width, dtype=x_NW.dtype)
    mean_N, rstd_N = (_allocate(x_NW, num_rows, dtype=torch.float32) for _ in range(2))
    if num_rows:
        with torch.cuda.device_of(x_NW):
            kernels.forward_kernel[(num_rows,)](
                x_NW, weight_W, bias_W, y_NW, mean_N, rstd_N, eps, GELU=gelu, **_constants(width)
            )
    return y_NW, mean_N, rstd_N


@norm.register_fake
def _(x_NW, weight_W, bias_W, eps, gelu):
    mean_N = x_NW.new_empty(x_NW.shape[:1], dtype=torch.float32)
    return x_NW.new_empty(x_NW.shape), mean_N, torch.empty_like(mean_N)


@torch.library.custom_op("ofa_kernels::norm_backward", mutates_args=())
def norm_backward(
    dy_NW: Tensor, x_NW: Tensor, weight_W: Tensor, mean_N: Tensor, rstd_N: Tensor, gelu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dx [N, W] in x's dtype, gradients of weight and bias [2, W] in dtype)."""
    num_rows, width = x_NW.shape
    dx_NW = _allocate(x_NW, num_rows, width, dtype=x_NW.dtype)
    if not num_rows:
        return dx_NW, x_NW.new_zeros((2, width), dtype=dtype)
    grid, split = _backward_grid(x_NW), width >= kernels.SPLIT_WIDTH
    column_blocks = triton.cdiv(width, kernels.COLUMNS)
    row_blocks = min(triton.cdiv(num_rows, kernels.ROWS), triton.cdiv(4 * _processors(x_NW), column_blocks))
    part_gKW = _allocate(x_NW, row_blocks if split else grid, 2, width, dtype=torch.float32)
    with torch.cuda.device_of(x_NW):
        kernels.backward_kernel[(grid,)](
            dy_NW, x_NW, weight_W, mean_N, rstd_N, dx_NW, None if split else part_gKW, num_rows,
            GELU=gelu, **_constants(width),
        )  # fmt: skip
        if split:
            kernels.weight_backward_kernel[(column_blocks, row_blocks)](
                dy_NW, x_NW, mean_N, rstd_N, part_gKW, num_rows,
                GELU=gelu, W=width, COLUMNS=kernels.COLUMNS, ROWS=kernels.ROWS, num_warps=4, num_stages=1,
            )  # fmt: skip
    return dx_NW, part_gKW.sum(0).to(dtype)


@norm_backward.register_fake
def _(dy_NW, x_NW, weight_W, mean_N, rstd_N, gelu, dtype):
    return x_NW.new_empty(x_NW.shape), x_NW.new_empty((2, x_NW.shape[1]), dtype=dtype)


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_NW, weight_W, bias_W, _, ctx.gelu = inputs
    _, mean_N, rstd_N = output
    ctx.save_for_backward(x_NW, weight_W, bias_W, mean_N, rstd_N)
    ctx.mark_non_differentiable(mean_N, rstd_N)
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, dy_NW: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x_NW, weight_W, bias_W, mean_N, rstd_N = ctx.saved_tensors
    dtype = _parameter_dtype(weight_W, bias_W)
    dx_NW, dparameters_KW = norm_backward(_dense(dy_NW, x_NW), x_NW, weight_W, mean_N, rstd_N, ctx.gelu, dtype)
    return dx_NW, *_each_gradient(dparameters_KW, weight_W, bias_W), None, None


norm.register_autograd(_norm_gradients, setup_context=_norm_context)


@torch.library.custom_op("ofa_kernels::add_norm", mutates_args=())
def add_norm(
    residual_NW: Tensor,
    x_NW: Tensor,
    weight_W: Tensor | None,
    bias_W: Tensor | None,
    gamma_W: Tensor | None,
    example_N: Tensor | None,
    keep_E: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z [N, W], its norm y [N, W], mean [N], rstd [N]); the last three are empty where weight is None.

    seed: [1] int64 on the CPU, below 2^31, or None without dropout.
    """
    num_rows, width = x_NW.shape
    dtype, normed_rows = torch.promote_types(residual_NW.dtype, x_NW.dtype), 0 if weight_W is None else num_rows
    z_NW = _allocate(x_NW, num_rows, width, dtype=dtype)
    y_NW = _allocate(x_NW, normed_rows, width, dtype=dtype)
    mean_N, rstd_N = (_allocate(x_NW, normed_rows, dtype=torch.float32) for _ in range(2))
    if num_rows:
        with torch.cuda.device_of(x_NW):
            outputs = (z_NW, y_NW, mean_N, rstd_N) if normed_rows else (z_NW, None, None, None)
            kernels.add_forward_kernel[(num_rows,)](
                residual_NW, x_NW, gamma_W, example_N, keep_E, weight_W, bias_W, *outputs,
                eps=eps, **_branch(dropout, seed), **_constants(width),
            )  # fmt: skip
    return z_NW, y_NW, mean_N, rstd_N


@add_norm.register_fake
def _(residual_NW, x_NW, weight_W, bias_W, gamma_W, example_N, keep_E, seed, eps, dropout):
    z_NW = x_NW.new_empty(x_NW.shape, dtype=torch.promote_types(residual_NW.dtype, x_NW.dtype))
    normed_rows = 0 if weight_W is None else x_NW.shape[0]
    mean_N = x_NW.new_empty((normed_rows,), dtype=torch.float32)
    return z_NW, z_NW.new_empty((normed_rows, x_NW.shape[1])), mean_N, torch.empty_like(mean_N)


@torch.library.custom_op("ofa_kernels::add_norm_backward", mutates_args=())
def add_norm_backward(
    dz_NW: Tensor,
    dy_NW: Tensor | None,
    z_NW: Tensor | None,
    weight_W: Tensor | None,
    mean_N: Tensor | None,
    rstd_N: Tensor | None,
    x_NW: Tensor | None,
    gamma_W: Tensor | None,
    example_N: Tensor | None,
    keep_E: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the sum [N, W] in z's dtype, dx [N, W], gradients of the parameters that are there [K, W] in dtype).

    The first is empty where it is dz itself, dx where it is the first: without norm, and without anything on x.
    """
    num_rows, width = dz_NW.shape
    sum_rows, x_rows, num_parameters = _add_norm_backward_shapes(dz_NW, weight_W, gamma_W, keep_E, dropout)
    dsum_NW = _allocate(dz_NW, sum_rows, width, dtype=dz_NW.dtype)
    dx_NW = _allocate(dz_NW, x_rows, width, dtype=x_dtype)
    if not num_rows:
        return dsum_NW, dx_NW, dz_NW.new_zeros((num_parameters, width), dtype=dtype)
    grid = _backward_grid(dz_NW)
    part_gKW = _allocate(dz_NW, grid, num_parameters, width, dtype=torch.float32)
    outputs = (each if each.numel() else None for each in (dsum_NW, dx_NW, part_gKW))
    with torch.cuda.device_of(dz_NW):
        kernels.add_backward_kernel[(grid,)](
            dz_NW, dy_NW, z_NW, weight_W, mean_N, rstd_N, x_NW, gamma_W, example_N, keep_E, *outputs,
            num_rows, K=num_parameters, **_branch(dropout, seed), **_constants(width),
        )  # fmt: skip
    return dsum_NW, dx_NW, part_gKW.sum(0).to(dtype)


def _add_norm_backward_shapes(
    dz_NW: Tensor, weight_W: Tensor | None, gamma_W: Tensor | None, keep_E: Tensor | None, dropout: float
) -> tuple[int, int, int]:
    """(rows of the gradient of the sum, rows of dx, gradients of parameters), as `add_norm_backward` returns them."""
    num_rows, normed = dz_NW.shape[0], weight_W is not None
    scaled = gamma_W is not None or keep_E is not None or dropout > 0
    return num_rows * normed, num_rows * scaled, 2 * normed + (gamma_W is not None)


@add_norm_backward.register_fake
def _(
    dz_NW, dy_NW, z_NW, weight_W, mean_N, rstd_N, x_NW, gamma_W, example_N, keep_E, seed, dropout, x_dtype, dtype
):  # fmt: skip
    sum_rows, x_rows, num_parameters = _add_norm_backward_shapes(dz_NW, weight_W, gamma_W, keep_E, dropout)
    width = dz_NW.shape[1]
    dx_NW = dz_NW.new_empty((x_rows, width), dtype=x_dtype)
    return dz_NW.new_empty((sum_rows, width)), dx_NW, dz_NW.new_empty((num_parameters, width), dtype=dtype)


def _add_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    residual_NW, x_NW, weight_W, bias_W, gamma_W, example_N, keep_E, seed, _, ctx.dropout = inputs
    z_NW, y_NW, mean_N, rstd_N = output
    statistics = (None, None, None) if weight_W is None else (z_NW, mean_N, rstd_N)
    read_x = None if gamma_W is None else x_NW  # only gamma's gradient reads it again
    ctx.save_for_backward(weight_W, bias_W, gamma_W, example_N, keep_E, seed, read_x, *statistics)
    ctx.residual_dtype, ctx.x_dtype, ctx.like_z = residual_NW.dtype, x_NW.dtype, (z_NW.shape, z_NW.dtype, z_NW.device)
    ctx.mark_non_differentiable(mean_N, rstd_N, *([y_NW] if weight_W is None else []))
    ctx.set_materialize_grads(False)


def _add_norm_gradients(ctx: Any, dz_NW: Tensor | None, dy_NW: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    weight_W, bias_W, gamma_W, example_N, keep_E, seed, x_NW, z_NW, mean_N, rstd_N = ctx.saved_tensors
    shape, dtype, device = ctx.like_z
    dz_NW = torch.zeros(shape, dtype=dtype, device=device) if dz_NW is None else dz_NW.contiguous()
    dsum_NW, dx_NW, dparameters_KW = add_norm_backward(
        dz_NW, None if weight_W is None else _dense(dy_NW, dz_NW), z_NW, weight_W, mean_N, rstd_N,
        x_NW, gamma_W, example_N, keep_E, seed, ctx.dropout,
        ctx.x_dtype, _parameter_dtype(weight_W, bias_W, gamma_W),
    )  # fmt: skip
    dsum_NW = dz_NW if weight_W is None else dsum_NW
    scaled = gamma_W is not None or keep_E is not None or ctx.dropout > 0
    dx_NW = dx_NW if scaled else dsum_NW.to(ctx.x_dtype)
    parameters = _each_gradient(dparameters_KW, weight_W, bias_W, gamma_W)
    return dsum_NW.to(ctx.residual_dtype), dx_NW, *parameters, *[None] * 5


add_norm.register_autograd(_add_norm_gradients, setup_context=_add_norm_context)

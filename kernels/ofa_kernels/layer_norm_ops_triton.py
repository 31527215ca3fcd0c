"""Launches of the kernels in `layer_norm_triton`, their autograd functions and, for torch.compile, their operators.

Two, each with its backward: the norm of x or gelu(x), and the residual sum with or without its norm. Eager calls go
through an `autograd.Function`, which costs the host a third of a torch.library operator; the operators are for graphs:
their fake versions give shapes alone. Shapes as in the kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ofa_kernels import layer_norm_triton as kernels
from ofa_kernels._launch import in_graph
from ofa_kernels._launch_triton import Constants, launch

ROWS_PER_PROGRAM = 4
"""At least this many in a backward, so that the partial sums stay small beside the rows."""
WARPS_PER_PROCESSOR = 16
"""Resident at 128 registers a thread, which is what the widest backward takes."""
DROPOUT_STEPS = 1 << 16
"""A dropout probability is rounded to this many steps, and what is kept scaled by what the rounded one leaves."""


def _allocate(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Every output of a kernel comes from here, so that a test can poison and guard it."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def _processors(x: Tensor) -> int:
    return _processors_of(x.device) if x.is_cuda else 3


@functools.cache
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _backward_grid(x_NW: Tensor) -> int:
    """Programs of a backward: a function of the shape and the GPU alone, since it decides the order of the sums."""
    num_rows, width = x_NW.shape
    resident = _processors(x_NW) * max(1, WARPS_PER_PROCESSOR // _constants(width)["num_warps"])
    return min(-(-num_rows // ROWS_PER_PROGRAM), resident)


@functools.cache
def _constants(width: int, **flags: int) -> Constants:
    return Constants(flags | kernels.parts(width) | {"num_warps": kernels.warps(width), "num_stages": 1})


def _branch(dropout: float, seed: Tensor | int | None) -> tuple[int, int, float]:
    """(seed, threshold, scale)."""
    threshold = min(round(dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1)
    return 0 if seed is None else int(seed), threshold, DROPOUT_STEPS / (DROPOUT_STEPS - threshold)


def _parameter_dtype(*parameters_W: Tensor | None) -> torch.dtype:
    """Of their gradients, before each is cast to its own."""
    return _wider(*{each.dtype for each in parameters_W if each is not None})


@functools.cache
def _wider(*dtypes: torch.dtype) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _each_gradient(dparameters_KW: Tensor, *parameters_W: Tensor | None) -> tuple[Tensor | None, ...]:
    rows = iter(dparameters_KW.unbind())
    return tuple(None if each is None else next(rows).to(each.dtype) for each in parameters_W)


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    """autograd hands over None for an output that nobody used, and any strides."""
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


def _sum(part_gKW: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, W] in dtype: torch would take a sum and a cast."""
    grid, num_parameters, width = part_gKW.shape
    out_KW, size = _allocate(part_gKW, num_parameters, width, dtype=dtype), num_parameters * width
    if size:
        with torch.cuda.device_of(part_gKW):
            blocks = -(-size // kernels.SUM_TILE["COLUMNS"])
            launch(kernels.sum_kernel, (blocks,), (part_gKW, out_KW, grid), _sum_constants(size))
    return out_KW


@functools.cache
def _sum_constants(size: int) -> Constants:
    return Constants(SIZE=size, **kernels.SUM_TILE, num_warps=kernels.SUM_WARPS, num_stages=1)


def norm(x_NW: Tensor, weight_W: Tensor, bias_W: Tensor, eps: float, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, W] in x's dtype, mean [N], rstd [N]) of x or of gelu(x)."""
    num_rows, width = x_NW.shape
    y_NW = _allocate(x_NW, num_rows, width, dtype=x_NW.dtype)
    mean_N, rstd_N = (_allocate(x_NW, num_rows, dtype=torch.float32) for _ in range(2))
    if num_rows:
        with torch.cuda.device_of(x_NW):
            arguments = (x_NW, weight_W, bias_W, y_NW, mean_N, rstd_N, eps)
            launch(kernels.forward_kernel, (num_rows,), arguments, _constants(width, GELU=gelu))
    return y_NW, mean_N, rstd_N


_norm_op = torch.library.custom_op("ofa_kernels::norm", norm, mutates_args=())


@_norm_op.register_fake
def _(x_NW, weight_W, bias_W, eps, gelu):
    mean_N = x_NW.new_empty(x_NW.shape[:1], dtype=torch.float32)
    return x_NW.new_empty(x_NW.shape), mean_N, torch.empty_like(mean_N)


def norm_backward(
    dy_NW: Tensor, x_NW: Tensor, weight_W: Tensor, mean_N: Tensor, rstd_N: Tensor, gelu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dx [N, W] in x's dtype, gradients of weight and bias [2, W] in dtype)."""
    num_rows, width = x_NW.shape
    dx_NW = _allocate(x_NW, num_rows, width, dtype=x_NW.dtype)
    if not num_rows:
        return dx_NW, x_NW.new_zeros((2, width), dtype=dtype)
    grid, split = _backward_grid(x_NW), width >= kernels.SPLIT_WIDTH
    column_blocks = -(-width // kernels.COLUMNS)
    row_blocks = min(-(-num_rows // kernels.ROWS), -(-4 * _processors(x_NW) // column_blocks))
    part_gKW = _allocate(x_NW, row_blocks if split else grid, 2, width, dtype=torch.float32)
    with torch.cuda.device_of(x_NW):
        arguments = (dy_NW, x_NW, weight_W, mean_N, rstd_N, dx_NW, None if split else part_gKW, num_rows)
        launch(kernels.backward_kernel, (grid,), arguments, _constants(width, GELU=gelu))
        if split:
            kernels.weight_backward_kernel[(column_blocks, row_blocks)](
                dy_NW, x_NW, mean_N, rstd_N, part_gKW, num_rows,
                GELU=gelu, W=width, COLUMNS=kernels.COLUMNS, ROWS=kernels.ROWS, num_warps=4, num_stages=1,
                enable_fp_fusion=True,
            )  # fmt: skip
    return dx_NW, _sum(part_gKW, dtype)


_norm_backward_op = torch.library.custom_op("ofa_kernels::norm_backward", norm_backward, mutates_args=())


@_norm_backward_op.register_fake
def _(dy_NW, x_NW, weight_W, mean_N, rstd_N, gelu, dtype):
    return x_NW.new_empty(x_NW.shape), x_NW.new_empty((2, x_NW.shape[1]), dtype=dtype)


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_NW, weight_W, bias_W, _, ctx.gelu = inputs
    _, mean_N, rstd_N = output
    ctx.save_for_backward(x_NW, weight_W, bias_W, mean_N, rstd_N)
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx: Any, dy_NW: Tensor | None, *_: Any, run: Any = _norm_backward_op) -> tuple[Tensor | None, ...]:
    x_NW, weight_W, bias_W, mean_N, rstd_N = ctx.saved_tensors
    dtype = _parameter_dtype(weight_W, bias_W)
    dx_NW, dparameters_KW = run(_dense(dy_NW, x_NW), x_NW, weight_W, mean_N, rstd_N, ctx.gelu, dtype)
    return dx_NW, *_each_gradient(dparameters_KW, weight_W, bias_W), None, None


_norm_op.register_autograd(_norm_gradients, setup_context=_norm_context)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = norm(*inputs)
        _norm_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NW: Tensor | None) -> tuple[Tensor | None, ...]:
        return _norm_gradients(ctx, dy_NW, run=norm_backward)


def normed(x_NW: Tensor, weight_W: Tensor, bias_W: Tensor, eps: float, gelu: bool) -> Tensor:
    """The norm of x or of gelu(x), [N, W] in x's dtype, with its gradients."""
    inputs = (x_NW, weight_W, bias_W, eps, gelu)
    return _norm_op(*inputs)[0] if in_graph(x_NW) else _Norm.apply(*inputs)


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

    seed: [1] int64 on the CPU, below 2^31, or None without dropout; an eager call has it as a number.
    """
    num_rows, width = x_NW.shape
    dtype, normed_rows = _wider(residual_NW.dtype, x_NW.dtype), 0 if weight_W is None else num_rows
    z_NW = _allocate(x_NW, num_rows, width, dtype=dtype)
    y_NW = _allocate(x_NW, normed_rows, width, dtype=dtype)
    mean_N, rstd_N = (_allocate(x_NW, normed_rows, dtype=torch.float32) for _ in range(2))
    if num_rows:
        with torch.cuda.device_of(x_NW):
            outputs = (z_NW, y_NW, mean_N, rstd_N) if normed_rows else (z_NW, None, None, None)
            arguments = (
                residual_NW, x_NW, gamma_W, example_N, keep_E, weight_W, bias_W, *outputs, *_branch(dropout, seed), eps
            )  # fmt: skip
            launch(kernels.add_forward_kernel, (num_rows,), arguments, _constants(width, DROPOUT=dropout > 0))
    return z_NW, y_NW, mean_N, rstd_N


_add_norm_op = torch.library.custom_op("ofa_kernels::add_norm", add_norm, mutates_args=())


@_add_norm_op.register_fake
def _(residual_NW, x_NW, weight_W, bias_W, gamma_W, example_N, keep_E, seed, eps, dropout):
    z_NW = x_NW.new_empty(x_NW.shape, dtype=torch.promote_types(residual_NW.dtype, x_NW.dtype))
    normed_rows = 0 if weight_W is None else x_NW.shape[0]
    mean_N = x_NW.new_empty((normed_rows,), dtype=torch.float32)
    return z_NW, z_NW.new_empty((normed_rows, x_NW.shape[1])), mean_N, torch.empty_like(mean_N)


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
        arguments = (
            dz_NW, dy_NW, z_NW, weight_W, mean_N, rstd_N, x_NW, gamma_W, example_N, keep_E, *outputs,
            num_rows, *_branch(dropout, seed),
        )  # fmt: skip
        constants = _constants(width, K=num_parameters, DROPOUT=dropout > 0)
        launch(kernels.add_backward_kernel, (grid,), arguments, constants)
    return dsum_NW, dx_NW, _sum(part_gKW, dtype)


def _add_norm_backward_shapes(
    dz_NW: Tensor, weight_W: Tensor | None, gamma_W: Tensor | None, keep_E: Tensor | None, dropout: float
) -> tuple[int, int, int]:
    """(rows of the gradient of the sum, rows of dx, gradients of parameters), as `add_norm_backward` returns them."""
    num_rows, normed = dz_NW.shape[0], weight_W is not None
    scaled = gamma_W is not None or keep_E is not None or dropout > 0
    return num_rows * normed, num_rows * scaled, 2 * normed + (gamma_W is not None)


_add_norm_backward_op = torch.library.custom_op("ofa_kernels::add_norm_backward", add_norm_backward, mutates_args=())


@_add_norm_backward_op.register_fake
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
    ctx.seed, seed = (seed, None) if isinstance(seed, int) else (None, seed)
    ctx.save_for_backward(weight_W, bias_W, gamma_W, example_N, keep_E, seed, read_x, *statistics)
    ctx.residual_dtype, ctx.x_dtype, ctx.like_z = residual_NW.dtype, x_NW.dtype, (z_NW.shape, z_NW.dtype, z_NW.device)
    if weight_W is None:
        ctx.mark_non_differentiable(y_NW)
    ctx.set_materialize_grads(False)


def _add_norm_gradients(
    ctx: Any, dz_NW: Tensor | None, dy_NW: Tensor | None, *_: Any, run: Any = _add_norm_backward_op
) -> tuple[Tensor | None, ...]:
    weight_W, bias_W, gamma_W, example_N, keep_E, seed, x_NW, z_NW, mean_N, rstd_N = ctx.saved_tensors
    shape, dtype, device = ctx.like_z
    dz_NW = torch.zeros(shape, dtype=dtype, device=device) if dz_NW is None else dz_NW.contiguous()
    dsum_NW, dx_NW, dparameters_KW = run(
        dz_NW, None if weight_W is None else _dense(dy_NW, dz_NW), z_NW, weight_W, mean_N, rstd_N,
        x_NW, gamma_W, example_N, keep_E, seed if ctx.seed is None else ctx.seed, ctx.dropout,
        ctx.x_dtype, _parameter_dtype(weight_W, bias_W, gamma_W),
    )  # fmt: skip
    dsum_NW = dz_NW if weight_W is None else dsum_NW
    scaled = gamma_W is not None or keep_E is not None or ctx.dropout > 0
    dx_NW = dx_NW if scaled else dsum_NW.to(ctx.x_dtype)
    parameters = _each_gradient(dparameters_KW, weight_W, bias_W, gamma_W)
    return dsum_NW.to(ctx.residual_dtype), dx_NW, *parameters, *[None] * 5


_add_norm_op.register_autograd(_add_norm_gradients, setup_context=_add_norm_context)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = add_norm(*inputs)
        _add_norm_context(ctx, inputs, output)
        return output[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _add_norm_gradients(ctx, *gradients, run=add_norm_backward)


def added(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(z, y) of `add_norm`, which says what inputs are, with their gradients."""
    if in_graph(inputs[1]):
        return _add_norm_op(*inputs)[:2]
    *tensors, seed, eps, dropout = inputs
    return _AddNorm.apply(*tensors, None if seed is None else int(seed), eps, dropout)

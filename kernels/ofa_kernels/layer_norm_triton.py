"""The Triton kernels of `ofa_kernels.layer_norm`; `layer_norm_ops_triton` launches them.

A row of width W lives in the registers of one program as two power-of-two parts (768 = 512 + 256), so the variance is
taken from centred values in a second pass that reads nothing. The backward runs a fixed number of programs, each over
every grid-th row; a program adds its share of the weight gradients in registers and writes it to its own row of
[grid, K, W], which one sum(0) reduces: no atomics, so the same bits every time. From SPLIT_WIDTH on those sums no
longer fit beside the row, and a second kernel owns columns and reads everything again.

Shapes: N rows, W width, E examples, K gradients of parameters, in the order weight, bias, gamma. Statistics and
everything in registers are fp32. Dropout masks are Philox bits of (seed, row, column), drawn again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ofa_kernels._launch import CompileCase

SPLIT_WIDTH = 8192
"""From here on the backward without residual is two kernels."""
MODEL_WIDTHS = (256, 512, 768, 1024, 1280, 2560)
FFN_WIDTHS = (1024, 2048, 3072, 4096, 5120, 10240)
"""Of the presets: what the compile gate builds. Any other width runs as well."""
COLUMNS, ROWS = 128, 16
"""Tile of the second kernel of a split backward."""


@triton.jit
def _load(ptr, W: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr):
    """Part of a row from column START on, fp32; 0 beyond the width."""
    columns = START + tl.arange(0, BLOCK)
    if START + BLOCK > W:
        values = tl.load(ptr + columns, mask=columns < W, other=0.0)
    else:
        values = tl.load(ptr + columns)
    return values.to(tl.float32)


@triton.jit
def _store(ptr, values, W: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr):
    columns = START + tl.arange(0, BLOCK)
    if START + BLOCK > W:
        tl.store(ptr + columns, values.to(ptr.dtype.element_ty), mask=columns < W)
    else:
        tl.store(ptr + columns, values.to(ptr.dtype.element_ty))


@triton.jit
def _load_row(ptr, W: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    return _load(ptr, W, 0, B0), _load(ptr, W, B0, B1)


@triton.jit
def _store_row(ptr, values0, values1, W: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    _store(ptr, values0, W, 0, B0)
    _store(ptr, values1, W, B0, B1)


@triton.jit
def _gelu(x):
    """(gelu(x), its derivative), exact."""
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _centre(u, mean, W: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr):
    """u - mean, and 0 beyond the width, where it must not count."""
    if START + BLOCK > W:
        return tl.where(START + tl.arange(0, BLOCK) < W, u - mean, 0.0)
    else:
        return u - mean


@triton.jit
def _norm_row(
    u0, u1, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, row, eps,
    W: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Write one row of y and its statistics."""
    mean = (tl.sum(u0) + tl.sum(u1)) / W
    u0, u1 = _centre(u0, mean, W, 0, B0), _centre(u1, mean, W, B0, B1)
    rstd = tl.rsqrt((tl.sum(u0 * u0) + tl.sum(u1 * u1)) / W + eps)
    w0, w1 = _load_row(weight_ptr, W, B0, B1)
    b0, b1 = _load_row(bias_ptr, W, B0, B1)
    _store_row(y_ptr + row * W, u0 * rstd * w0 + b0, u1 * rstd * w1 + b1, W, B0, B1)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _norm_row_backward(g0, g1, n0, n1, rstd, W: tl.constexpr):
    """Gradient of what was normalised to n, given that of n * weight + bias times weight; g is 0 beyond the width."""
    along_n = (tl.sum(g0 * n0) + tl.sum(g1 * n1)) / W
    along_1 = (tl.sum(g0) + tl.sum(g1)) / W
    return (g0 - n0 * along_n - along_1) * rstd, (g1 - n1 * along_n - along_1) * rstd


@triton.jit
def _kept(row, seed, threshold, START: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout mask of a part of a row, 0.0 or 1.0. One Philox call decides four columns, the same in any split."""
    group = START // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.philox(seed, group, row.to(tl.int32), group * 0, group * 0, n_rounds=7)
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [BLOCK])
    return tl.where((bits >> 1).to(tl.int32) >= threshold, 1.0, 0.0)


@triton.jit
def _branch_scale(
    row, example_ptr, keep_ptr, seed, threshold, scale,
    DROPOUT: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """What dropout and drop-path multiply the two parts of a row by: blocks, or scalars without dropout."""
    factor = scale
    if keep_ptr is not None:
        factor = scale * tl.load(keep_ptr + tl.load(example_ptr + row))
    if DROPOUT:
        return factor * _kept(row, seed, threshold, 0, B0), factor * _kept(row, seed, threshold, B0, B1)
    else:
        return factor, factor


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr,  # inputs   [N, W], [W], [W]
    y_ptr, mean_ptr, rstd_ptr,  # outputs  [N, W], [N] fp32, [N] fp32
    eps,
    GELU: tl.constexpr, W: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: rows x width pass 2^31 elements
    u0, u1 = _load_row(x_ptr + row * W, W, B0, B1)
    if GELU:
        u0, u1 = _gelu(u0)[0], _gelu(u1)[0]
    _norm_row(u0, u1, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, row, eps, W, B0, B1)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr,  # inputs   [N, W], [N, W], [W], [N], [N]
    dx_ptr, part_ptr,  # outputs  [N, W], [grid, 2, W] fp32 or None: left to weight_backward_kernel
    num_rows,
    GELU: tl.constexpr, W: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    pid, grid = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    w0, w1 = _load_row(weight_ptr, W, B0, B1)
    dw0, dw1 = tl.zeros([B0], tl.float32), tl.zeros([B1], tl.float32)
    db0, db1 = tl.zeros([B0], tl.float32), tl.zeros([B1], tl.float32)
    for step in range(tl.cdiv(num_rows - pid, grid)):
        row = pid + step * grid
        u0, u1 = _load_row(x_ptr + row * W, W, B0, B1)
        dy0, dy1 = _load_row(dy_ptr + row * W, W, B0, B1)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        if GELU:
            u0, slope0 = _gelu(u0)
            u1, slope1 = _gelu(u1)
        n0, n1 = (u0 - mean) * rstd, (u1 - mean) * rstd
        du0, du1 = _norm_row_backward(dy0 * w0, dy1 * w1, n0, n1, rstd, W)
        if GELU:
            du0, du1 = du0 * slope0, du1 * slope1
        _store_row(dx_ptr + row * W, du0, du1, W, B0, B1)
        if part_ptr is not None:
            dw0, dw1 = dw0 + dy0 * n0, dw1 + dy1 * n1
            db0, db1 = db0 + dy0, db1 + dy1
    if part_ptr is not None:
        part_ptr += pid * (2 * W)
        _store_row(part_ptr, dw0, dw1, W, B0, B1)
        _store_row(part_ptr + W, db0, db1, W, B0, B1)


@triton.jit(do_not_specialize=["num_rows"])
def weight_backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr,  # inputs  [N, W], [N, W], [N], [N]
    part_ptr,  # output  [grid, 2, W] fp32
    num_rows,
    GELU: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    pid, grid = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    dw, db = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(tl.cdiv(num_rows - pid * ROWS, grid * ROWS)):
        rows = (pid + step * grid) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < W)[None, :]
        places = rows[:, None] * W + columns[None, :]
        u = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        if GELU:
            u = _gelu(u)[0]
        dw, db = dw + dy * (u - mean) * rstd, db + dy
    part_ptr += pid * (2 * W) + columns
    tl.store(part_ptr, tl.sum(dw, 0), mask=columns < W)
    tl.store(part_ptr + W, tl.sum(db, 0), mask=columns < W)


@triton.jit(do_not_specialize=["seed", "threshold"])
def add_forward_kernel(
    residual_ptr, x_ptr,  # inputs  [N, W]
    gamma_ptr, example_ptr, keep_ptr,  # inputs or None  [W], [N] int, [E] fp32
    weight_ptr, bias_ptr,  # inputs or None: without norm  [W]
    z_ptr, y_ptr, mean_ptr, rstd_ptr,  # outputs  [N, W], [N, W], [N] fp32, [N] fp32; only z without norm
    seed, threshold, scale, eps,
    DROPOUT: tl.constexpr, W: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x0, x1 = _load_row(x_ptr + row * W, W, B0, B1)
    r0, r1 = _load_row(residual_ptr + row * W, W, B0, B1)
    s0, s1 = _branch_scale(row, example_ptr, keep_ptr, seed, threshold, scale, DROPOUT, B0, B1)
    if gamma_ptr is not None:
        g0, g1 = _load_row(gamma_ptr, W, B0, B1)
        s0, s1 = s0 * g0, s1 * g1
    z0, z1 = r0 + x0 * s0, r1 + x1 * s1
    _store_row(z_ptr + row * W, z0, z1, W, B0, B1)
    if weight_ptr is not None:  # z is rounded first: its norm is that of what the next block reads
        z0, z1 = z0.to(z_ptr.dtype.element_ty).to(tl.float32), z1.to(z_ptr.dtype.element_ty).to(tl.float32)
        _norm_row(z0, z1, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, row, eps, W, B0, B1)


@triton.jit(do_not_specialize=["num_rows", "seed", "threshold"])
def add_backward_kernel(
    dz_ptr, dy_ptr,  # inputs  [N, W]; dy None without norm
    z_ptr, weight_ptr, mean_ptr, rstd_ptr,  # inputs or None  [N, W], [W], [N], [N]
    x_ptr, gamma_ptr, example_ptr, keep_ptr,  # inputs or None  [N, W], [W], [N] int, [E] fp32
    dresidual_ptr, dx_ptr, part_ptr,  # outputs or None  [N, W], [N, W], [grid, K, W] fp32
    num_rows, seed, threshold, scale,
    K: tl.constexpr, DROPOUT: tl.constexpr, W: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    pid, grid = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    dw0, dw1 = tl.zeros([B0], tl.float32), tl.zeros([B1], tl.float32)
    db0, db1 = tl.zeros([B0], tl.float32), tl.zeros([B1], tl.float32)
    dg0, dg1 = tl.zeros([B0], tl.float32), tl.zeros([B1], tl.float32)
    for step in range(tl.cdiv(num_rows - pid, grid)):
        row = pid + step * grid
        dz0, dz1 = _load_row(dz_ptr + row * W, W, B0, B1)
        if dy_ptr is not None:
            z0, z1 = _load_row(z_ptr + row * W, W, B0, B1)
            dy0, dy1 = _load_row(dy_ptr + row * W, W, B0, B1)
            w0, w1 = _load_row(weight_ptr, W, B0, B1)
            mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
            n0, n1 = (z0 - mean) * rstd, (z1 - mean) * rstd
            du0, du1 = _norm_row_backward(dy0 * w0, dy1 * w1, n0, n1, rstd, W)
            dz0, dz1 = dz0 + du0, dz1 + du1
            dw0, dw1 = dw0 + dy0 * n0, dw1 + dy1 * n1
            db0, db1 = db0 + dy0, db1 + dy1
        if dresidual_ptr is not None:
            _store_row(dresidual_ptr + row * W, dz0, dz1, W, B0, B1)
        if dx_ptr is not None:
            s0, s1 = _branch_scale(row, example_ptr, keep_ptr, seed, threshold, scale, DROPOUT, B0, B1)
            dz0, dz1 = dz0 * s0, dz1 * s1
            if gamma_ptr is not None:
                x0, x1 = _load_row(x_ptr + row * W, W, B0, B1)
                dg0, dg1 = dg0 + dz0 * x0, dg1 + dz1 * x1
                g0, g1 = _load_row(gamma_ptr, W, B0, B1)
                dz0, dz1 = dz0 * g0, dz1 * g1
            _store_row(dx_ptr + row * W, dz0, dz1, W, B0, B1)
    if part_ptr is not None:
        part_ptr += pid * (K * W)
        if dy_ptr is not None:
            _store_row(part_ptr, dw0, dw1, W, B0, B1)
            _store_row(part_ptr + W, db0, db1, W, B0, B1)
        if gamma_ptr is not None:
            _store_row(part_ptr + (K - 1) * W, dg0, dg1, W, B0, B1)


def parts(width: int) -> dict[str, int]:
    """The two blocks of a row, at least 16 wide: a Philox call and a vector load stay within one of them."""
    first = max(16, triton.next_power_of_2(width) // 2)
    return {"W": width, "B0": first, "B1": max(16, triton.next_power_of_2(max(width - first, 1)))}


def warps(width: int) -> int:
    """So that a thread moves 16 bytes of the first part at a time."""
    return min(max(parts(width)["B0"] // 256, 1), 16)


def compile_cases() -> list[CompileCase]:
    """Every kernel at every width of the presets, with what the launches pass."""
    cases = []
    for dtype in (torch.bfloat16, torch.float16):
        for width in MODEL_WIDTHS:
            cases += _norm_cases(width, dtype, gelu=False)
            cases += _add_cases(width, dtype)
            cases += _add_cases(width, dtype, drop=True)
            cases += _add_cases(width, dtype, drop=True, gamma=True)
            cases += _add_cases(width, dtype, drop=True, gamma=True, norm=False)
        for width in FFN_WIDTHS:
            cases += _norm_cases(width, dtype, gelu=True)
    return cases


def _case(kernel: str, function: Any, width: int, dtype: torch.dtype, constants: dict[str, Any]) -> CompileCase:
    """Arguments that are not constants have the type that their name tells."""
    types = {"eps": "fp32", "scale": "fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "part_ptr": "*fp32"}
    types |= {"keep_ptr": "*fp32", "example_ptr": "*i64", "num_rows": "i32", "seed": "i32", "threshold": "i32"}
    arguments = {name: types.get(name, "*x") for name in function.arg_names if name not in constants}
    num_warps = 4 if function is weight_backward_kernel else warps(width)
    return CompileCase(kernel, function, width, dtype, arguments, constants, num_warps, num_stages=1)


def _norm_cases(width: int, dtype: torch.dtype, gelu: bool) -> list[CompileCase]:
    name = "gelu + layer norm" if gelu else "layer norm"
    shape = {"GELU": gelu, **parts(width)}
    cases = [_case(f"{name} forward", forward_kernel, width, dtype, shape)]
    if width < SPLIT_WIDTH:
        return [*cases, _case(f"{name} backward", backward_kernel, width, dtype, shape)]
    columns = {"GELU": gelu, "W": width, "COLUMNS": COLUMNS, "ROWS": ROWS}
    return [
        *cases,
        _case(f"{name} backward, rows", backward_kernel, width, dtype, {"part_ptr": None, **shape}),
        _case(f"{name} backward, weights", weight_backward_kernel, width, dtype, columns),
    ]


def _add_cases(
    width: int, dtype: torch.dtype, drop: bool = False, gamma: bool = False, norm: bool = True
) -> list[CompileCase]:
    """drop: dropout and drop-path. What an option leaves out is None, as in the launches."""
    name = " + ".join(["add", *["drop"] * drop, *["gamma"] * gamma, *["layer norm"] * norm])
    absent = [] if drop else ["example_ptr", "keep_ptr"]
    absent += [] if gamma else ["gamma_ptr"]
    absent += [] if norm else ["weight_ptr", "mean_ptr", "rstd_ptr"]
    forward = dict.fromkeys(absent + ([] if norm else ["bias_ptr", "y_ptr"]))
    backward = dict.fromkeys(absent + ([] if norm else ["dy_ptr", "z_ptr", "dresidual_ptr"]))
    backward |= dict.fromkeys(([] if gamma else ["x_ptr"]) + ([] if drop or gamma else ["dx_ptr"]))
    backward["K"] = 2 * norm + gamma
    shape = {"DROPOUT": drop, **parts(width)}
    return [
        _case(f"{name} forward", add_forward_kernel, width, dtype, forward | shape),
        _case(f"{name} backward", add_backward_kernel, width, dtype, backward | shape),
    ]

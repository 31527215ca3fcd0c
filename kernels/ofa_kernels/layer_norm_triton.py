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
SUM_TILE, SUM_WARPS = {"COLUMNS": 32, "ROWS": 128}, 8
"""Tile of the sum of partial gradients: few columns, so that the 1,536 of a base norm still make 48 programs."""


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
def _tail(x):
    """Share of a normal distribution above |x|, as 2^p(|x|); p is fitted: 2.3e-8 off at most, 5e-5 of it below 4."""
    x = tl.abs(x)
    p = ((-2.2450383e-06 * x + 3.2352469e-05) * x - 1.5305666e-04) * x - 2.1614591e-04
    p = ((((p * x + 7.1656168e-03) * x - 5.2565977e-02) * x - 4.5918527e-01) * x - 1.1511080e00) * x - 1.0
    return tl.exp2(p)


@triton.jit
def _gelu(x):
    """(gelu(x), its derivative); a caller that does not use the second does not compute it."""
    tail = _tail(x)
    cdf = tl.where(x < 0, tail, 1.0 - tail)
    density = tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361593)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail, cdf + x * density


@triton.jit
def _add_each(a, b, c, d):
    return a + c, b + d


@triton.jit
def _by_thread(a, B: tl.constexpr, LANES: tl.constexpr):
    """A part of a row as [numbers, LANES, neighbours]: of a 16-bit row, what thread i holds is [:, i, :]."""
    NEIGHBOURS: tl.constexpr = min(8, B // LANES)
    return tl.reshape(a, [B // LANES // NEIGHBOURS, LANES, NEIGHBOURS])


@triton.jit
def _totals(a0, a1, b0, b1, B0: tl.constexpr, B1: tl.constexpr):
    """(sum of a, sum of b) over both parts of a row: each thread adds its own, then there is one exchange for all."""
    LANES: tl.constexpr = min(max(B0 // 8, 32), 512, B1)
    pair0 = tl.reduce((_by_thread(a0, B0, LANES), _by_thread(b0, B0, LANES)), 2, _add_each)
    pair1 = tl.reduce((_by_thread(a1, B1, LANES), _by_thread(b1, B1, LANES)), 2, _add_each)
    (a0, b0), (a1, b1) = tl.reduce(pair0, 0, _add_each), tl.reduce(pair1, 0, _add_each)
    return tl.reduce((a0 + a1, b0 + b1), 0, _add_each)


@triton.jit
def _total(a0, a1, B0: tl.constexpr, B1: tl.constexpr):
    """Sum over both parts of a row, as in `_totals`."""
    LANES: tl.constexpr = min(max(B0 // 8, 32), 512, B1)
    a0, a1 = tl.sum(_by_thread(a0, B0, LANES), 2), tl.sum(_by_thread(a1, B1, LANES), 2)
    return tl.sum(tl.sum(a0, 0) + tl.sum(a1, 0))


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
    mean = _total(u0, u1, B0, B1) / W
    u0, u1 = _centre(u0, mean, W, 0, B0), _centre(u1, mean, W, B0, B1)
    rstd = tl.rsqrt(_total(u0 * u0, u1 * u1, B0, B1) / W + eps)
    w0, w1 = _load_row(weight_ptr, W, B0, B1)
    b0, b1 = _load_row(bias_ptr, W, B0, B1)
    _store_row(y_ptr + row * W, u0 * rstd * w0 + b0, u1 * rstd * w1 + b1, W, B0, B1)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _norm_row_backward(g0, g1, n0, n1, rstd, W: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    """Gradient of what was normalised to n, given that of n * weight + bias times weight; g is 0 beyond the width."""
    along_n, along_1 = _totals(g0 * n0, g1 * n1, g0, g1, B0, B1)
    along_n, along_1 = along_n * (1 / W), along_1 * (1 / W)
    return (g0 - n0 * along_n - along_1) * rstd, (g1 - n1 * along_n - along_1) * rstd


@triton.jit
def _kept(row, seed, threshold, factor, START: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout of a part of a row, 0 or `factor`. One Philox call decides eight columns, the same in any split."""
    group = START // 8 + tl.arange(0, BLOCK // 8)
    a, b, c, d = tl.philox(seed, group, row.to(tl.int32), group * 0, group * 0, n_rounds=7)
    pairs, least = tl.join(tl.join(a, b), tl.join(c, d)), threshold.to(tl.uint32) << 16  # 16 bits are a column's
    kept = tl.join(tl.where(pairs << 16 >= least, factor, 0.0), tl.where(pairs >= least, factor, 0.0))
    return tl.reshape(kept, [BLOCK])


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
        return _kept(row, seed, threshold, factor, 0, B0), _kept(row, seed, threshold, factor, B0, B1)
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
        du0, du1 = _norm_row_backward(dy0 * w0, dy1 * w1, n0, n1, rstd, W, B0, B1)
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


@triton.jit(do_not_specialize=["num_parts"])
def sum_kernel(
    part_ptr,  # input   [grid, K * W] fp32
    out_ptr,  # output  [K * W]
    num_parts,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum of all programs' shares, in a fixed order, rounded once."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_parts, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < num_parts)[:, None] & (columns < SIZE)[None, :]
        total += tl.load(part_ptr + rows[:, None] * SIZE + columns[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=columns < SIZE)


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
            du0, du1 = _norm_row_backward(dy0 * w0, dy1 * w1, n0, n1, rstd, W, B0, B1)
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
        cases += _norm_cases(768, dtype, gelu=False, unaligned=("weight_ptr", "bias_ptr"))
        types, constants = {"part_ptr": "*fp32", "out_ptr": "*x", "num_parts": "i32"}, {"SIZE": 1536, **SUM_TILE}
        cases.append(CompileCase("norm backward, sum", sum_kernel, 768, dtype, types, constants, SUM_WARPS, 1))
    return cases


def _case(
    kernel: str,
    function: Any,
    width: int,
    dtype: torch.dtype,
    constants: dict[str, Any],
    unaligned: tuple[str, ...] = (),
) -> CompileCase:
    """Arguments that are not constants have the type that their name tells."""
    types = {"eps": "fp32", "scale": "fp32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "part_ptr": "*fp32"}
    types |= {"keep_ptr": "*fp32", "example_ptr": "*i64", "num_rows": "i32", "seed": "i32", "threshold": "i32"}
    arguments = {name: types.get(name, "*x") for name in function.arg_names if name not in constants}
    num_warps = 4 if function is weight_backward_kernel else warps(width)
    work = ROWS * COLUMNS if function is weight_backward_kernel else width
    options = {"num_warps": num_warps, "num_stages": 1, "work": work, "unaligned": unaligned}
    return CompileCase(kernel, function, width, dtype, arguments, constants, **options)


def _norm_cases(width: int, dtype: torch.dtype, gelu: bool, unaligned: tuple[str, ...] = ()) -> list[CompileCase]:
    name = ("gelu + layer norm" if gelu else "layer norm") + ", parameters anywhere" * bool(unaligned)
    shape = {"GELU": gelu, **parts(width)}
    cases = [_case(f"{name} forward", forward_kernel, width, dtype, shape, unaligned)]
    if width < SPLIT_WIDTH:
        return [*cases, _case(f"{name} backward", backward_kernel, width, dtype, shape, unaligned)]
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

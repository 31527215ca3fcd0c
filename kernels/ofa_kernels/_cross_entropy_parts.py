"""What the cross-entropy in plain torch and the one in Triton have in common."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PART_ELEMENTS = 4 << 20
"""Size of a partial product where no matrix product adds to a wider output."""
NUM_ALWAYS_ALLOWED = 4
"""The special ids are outside every constraint range and allowed by all."""
SLACK = 1e-6
"""Keeps eps_i finite where one class is allowed, as in the original."""


def add_product_(out: Tensor, a: Tensor, b: Tensor, add: bool = True) -> None:
    """out += a @ b, or out = a @ b, without another buffer of out's size. out may be fp32 where a and b are 16-bit."""
    if out.dtype == a.dtype:
        if add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif products_are_wide(out.device.type, a.dtype):
        torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)
    else:
        rows = max(1, PART_ELEMENTS // max(1, out.shape[1]))
        for out_part, a_part in zip(out.split(rows), a.split(rows), strict=True):
            if not add:
                out_part.zero_()
            out_part.add_(a_part @ b)


@functools.cache
def products_are_wide(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit matrices adds to a fp32 one: it depends on the version of torch and on the device."""
    x = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, x, x, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())

"""Which implementation runs, and what a kernel needs to be compiled for a GPU that is not there.

Modules named *_triton import triton and are themselves imported only where a kernel is chosen: neither a run on a CPU
nor one with every kernel switched off needs it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KERNELS = ("auto", "triton", "torch")
"""auto: Triton on a GPU where it pays, torch elsewhere. triton: always (on a CPU only in Triton's interpreter)."""

INTERPRET_VARIABLE = "TRITON_INTERPRET"


HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter; it looks when a kernel is defined, so set it before any import."""
    return os.environ.get(INTERPRET_VARIABLE, "0") not in ("", "0")


def use_triton(kernel: str, x: Tensor, pays: bool = True) -> bool:
    """Whether an operator on x runs its Triton kernel.

    pays: whether the kernel is no slower than torch at this shape, which decides where kernel is "auto". Raises
    ValueError for a choice that does not exist and RuntimeError for "triton" where it cannot run.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: want one of {', '.join(KERNELS)}")
    if kernel == "torch" or kernel == "auto" and x.dtype == torch.float64:
        return False
    able = HAS_TRITON and (x.is_cuda or interpreting())
    if kernel == "triton" and not able:
        raise RuntimeError(
            f"kernel 'triton' on {x.device}: it needs a GPU and the triton package (or {INTERPRET_VARIABLE}=1, to "
            "test); choose 'auto' or 'torch'"
        )
    return able and (kernel == "triton" or x.is_cuda and pays)


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one form, as the compile gate builds it (`kernels/bench.py --compile`)."""

    kernel: str
    """Name in the table, such as "attention forward"."""
    function: Any
    """The `triton.jit` function."""
    size: int
    """Head dim of an attention kernel, width of any other."""
    dtype: torch.dtype
    """Of the tensors that the model computes in; statistics are fp32."""
    arguments: dict[str, str]
    """Type of every runtime argument: "*x" is a pointer to `dtype`; else Triton's names ("*fp32", "i32", "fp32")."""
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool = False
    """Whether it multiplies matrices, so that its machine code must show tensor-core instructions."""
    aligned: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 in every real launch, such as row strides; pointers always are."""

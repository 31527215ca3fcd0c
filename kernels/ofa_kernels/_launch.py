"""Which implementation runs, and what a kernel needs to be compiled for a GPU that is not there.

Modules named *_triton import triton and are themselves imported only where a kernel is chosen: neither a run on a CPU
nor one with every kernel switched off needs it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

KERNELS = ("auto", "triton", "torch")
"""auto: Triton on a GPU, in 16 bits, where it pays; torch elsewhere. triton: always (on a CPU only in Triton's
interpreter)."""

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
"""What "auto" gives to Triton. In fp32 its attention has no tensor cores and spills tens of kilobytes a thread."""

INTERPRET_VARIABLE = "TRITON_INTERPRET"


HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter; it looks when a kernel is defined, so set it before any import."""
    return os.environ.get(INTERPRET_VARIABLE, "0") not in ("", "0")


class Choice(NamedTuple):
    triton: bool
    """Whether it is Triton wherever a shape pays, or for "triton" always."""
    why: str


def choose(kernel: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation that `kernel` means on tensors of this device and dtype, and the reason.

    Raises ValueError for a choice that does not exist and RuntimeError for "triton" where it cannot run.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: want one of {', '.join(KERNELS)}")
    if kernel == "torch":
        return Choice(False, "chosen")
    is_gpu = device.type == "cuda"
    if kernel == "triton":
        if HAS_TRITON and (is_gpu or interpreting()):
            return Choice(True, "chosen")
        raise RuntimeError(
            f"kernel 'triton' on {device}: it needs a GPU and the triton package (or {INTERPRET_VARIABLE}=1, to "
            "test); choose 'auto' or 'torch'"
        )
    if not is_gpu:
        return Choice(False, "no GPU")
    if dtype not in SIXTEEN_BITS:
        return Choice(False, f"{str(dtype).removeprefix('torch.')}, where bfloat16 and float16 have kernels")
    return Choice(True, "a GPU and 16 bits") if HAS_TRITON else Choice(False, "the triton package is missing")


def use_triton(kernel: str, x: Tensor, pays: bool = True, dtype: torch.dtype | None = None) -> bool:
    """Whether an operator on x runs its Triton kernel; raises what `choose` raises.

    pays: whether the kernel is no slower than torch at this shape, which decides where kernel is "auto": a shape at
    which it was measured to be slower is handed to torch here. dtype: of the products, where it is not x's.
    """
    if kernel == "auto" and not (pays and x.is_cuda):  # first, as it is asked in every layer
        return False
    return choose(kernel, x.device, x.dtype if dtype is None else dtype).triton


def product_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer of x would compute in: autocast's dtype where that is on, but it leaves fp64 alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def in_graph(x: Tensor) -> bool:
    """Whether a call on x becomes part of a graph, or has fake tensors: then it has to be a torch.library operator."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


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
    """Integer arguments that are multiples of 16 in every real launch, such as row strides."""
    unaligned: tuple[str, ...] = ()
    """Pointers that begin anywhere. The others are built as multiples of 16 bytes, as those of activations are; under
    ZeRO-3 every second parameter of base's norms is one of 8 only, and a launch makes a build of its own for it."""
    work: int = 0
    """Pairs of a query and a key, or elements, in one round of the main loop (of the whole kernel if it has none)."""

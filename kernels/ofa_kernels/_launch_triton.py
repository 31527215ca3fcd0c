"""Launching a Triton kernel without looking up its build by every argument anew.

`kernel[grid](...)` takes triton 28 us of host time for 40 arguments: it binds them by name and makes strings of all
options. Here the few facts that decide which build runs are the key to one that triton chose itself before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

_READ = ("3.6", "3.8", "3.9")
"""Versions in which `compiled[grid](*arguments)` was read to be what `kernel[grid](...)` ends in; others take that."""
_CAN_KEEP = triton.__version__.rsplit(".", 1)[0] in _READ and torch.version.hip is None
_builds: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


class Constants(dict[str, Any]):
    """The constants and options of a launch: made once for each form, as they are told apart by identity."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **options)
        self["enable_fp_fusion"] = True  # triton 3.10 leaves a * b + c as two instructions where nobody says so

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__


def ceil_div(a: int, b: int) -> int:
    """`triton.cdiv` costs the host microseconds: it can be called inside kernels too."""
    return -(-a // b)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Tensor | float | None], constants: Constants
) -> None:
    """`kernel[grid](*arguments, **constants)`.

    arguments: all that are no constants, in order, on the current device. As in triton a build is for the dtypes of
    tensors, for which of them begin at a multiple of 16 bytes, and for integers that are 1, a multiple of 16 or
    neither; a call with one that is longer than 31 bits, or negative, goes through triton.
    """
    if not (_CAN_KEEP and kernel.__class__ is JITFunction):
        kernel[grid](*arguments, **constants)
        return
    kinds: list[Any] = [id(kernel), constants]
    addresses = numbers = 0
    for x in arguments:
        if x.__class__ is int:
            kinds.append(2 if x == 1 else x & 15 == 0)
            numbers |= x
        elif isinstance(x, Tensor):
            kinds.append(x.dtype)
            addresses |= x.data_ptr()
        else:
            kinds.append(x.__class__)
    kinds.append(torch.cuda.current_device() if torch.cuda.is_initialized() else None)
    if addresses & 15:
        kinds.append(tuple(x.data_ptr() & 15 == 0 for x in arguments if isinstance(x, Tensor)))
    if not 0 <= numbers < 1 << 31:
        kernel[grid](*arguments, **constants)
        return
    key = tuple(kinds)
    build = _builds.get(key)
    if build is not None:
        compiled, rest = build
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is not None:
        _builds[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])

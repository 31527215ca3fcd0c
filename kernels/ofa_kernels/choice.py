"""What a program says at its start: which implementation each operator gets, and why."""

from __future__ import annotations

import torch

from ofa_kernels._cross_entropy_parts import products_are_wide
from ofa_kernels._launch import SIXTEEN_BITS, choose
from ofa_kernels.cross_entropy import PAYS_TOKENS
from ofa_kernels.layer_norm import MAX_WIDTH, MIN_ELEMENTS

_WHERE = {
    "layer_norm": f"from {MIN_ELEMENTS:,} elements on, to width {MAX_WIDTH:,}",
    "cross_entropy": f"from {PAYS_TOKENS:,} tokens on",
}
"""Shapes that "auto" gives to Triton; attention is Triton at all of them."""


def describe(
    *, attention: str, layer_norm: str, cross_entropy: str, deterministic: bool, device: torch.device,
    dtype: torch.dtype, training: bool,
) -> str:  # fmt: skip
    """One line. The first four: the recipe's [kernels]. dtype: of the model. training: gradients are computed, too.

    Raises RuntimeError where a kernel that was asked for cannot run.
    """
    said: dict[str, list[str]] = {}
    for operator, kernel in {
        "attention": attention, "layer_norm": layer_norm, "cross_entropy": cross_entropy
    }.items():  # fmt: skip
        said.setdefault(_implementation(operator, kernel, device, dtype), []).append(operator)
    text = [f"{', '.join(operators)}: {what}" for what, operators in said.items()]
    if training and device.type == "cuda" and dtype in SIXTEEN_BITS:
        wide = products_are_wide(device.type, dtype)
        text.append(f"16-bit products sum in fp32 {'by themselves' if wide else 'in parts (an older torch)'}")
        repeats = {
            "convolutions": deterministic,
            "relative tables": choose(attention, device, dtype).triton,  # atomics add them in torch's
        }
        others = [what for what, each in repeats.items() if not each]
        text.append(f"gradients repeat to the bit{', but for ' if others else ''}{' and '.join(others)}")
    return f"kernels in {str(dtype).removeprefix('torch.')} on {device.type}: {'; '.join(text)}"


def _implementation(operator: str, kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    if kernel == "apex":
        return "apex (chosen)"
    choice = choose(kernel, device, dtype)
    name = "Triton" if choice.triton else "torch"
    if choice.triton and kernel == "auto" and operator in _WHERE:
        return f"{name} {_WHERE[operator]}, torch elsewhere ({choice.why})"
    padded = operator == "attention" and not choice.triton and device.type == "cuda"
    return f"{name}{', padded' if padded else ''} ({choice.why})"

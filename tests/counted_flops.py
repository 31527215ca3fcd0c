"""Floating-point operations of a real step, by module and by pass, with the formulas of torch's `FlopCounterMode`.

That mode itself tells a backward's operations by module hooks, which count some of OFA's modules twice: here each node
of the graph belongs to the module whose call made it, which its sequence number tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _accumulated(base: Any, a: Any, b: Any, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


def _sdpa(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _sdpa_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Logits again, and two products for each of the two."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])


aten = torch.ops.aten
UNKNOWN_TO_TORCH = {
    aten.baddbmm_: _accumulated,
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}
"""Formulas that `FlopCounterMode` lacks, as its `custom_mapping`."""


class CountedFlops(TorchDispatchMode):
    """Inside, a forward and its backward are counted. Names are those of the model's modules, "" for the model."""

    def __init__(self, model: nn.Module, formulas: Mapping[Any, Callable[..., int]] | None = None) -> None:
        """formulas: of shapes, by operator, beside `UNKNOWN_TO_TORCH`."""
        super().__init__()
        self.forward, self.backward, self.again = Counter(), Counter(), Counter()
        """again: forwards of modules during the backward."""
        self.pairs: list[float] = []
        """Room for a caller: query-key pairs of the attention."""
        self._stack: list[str] = []
        self._calls: list[tuple[int, int, str]] = []
        self._open: list[int] = []
        self._of_shapes = {**UNKNOWN_TO_TORCH, **(formulas or {})}
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self._handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operator = func._overloadpacket
        if operator in self._of_shapes:
            count = self._of_shapes[operator](*pytree.tree_map_only(torch.Tensor, lambda x: x.shape, args))
        elif operator in flop_registry:
            count = flop_registry[operator](*args, **kwargs, out_val=out)
        else:
            return out
        node = torch._C._current_autograd_node()
        if node is None:
            self.forward[self._stack[-1]] += count
        elif self._stack:
            self.again[self._stack[-1]] += count
        else:
            self.backward[self._owner(node._sequence_nr())] += count
        return out

    def _enter(self, name: str) -> None:
        self._stack.append(name)
        self._open.append(torch.autograd._get_sequence_nr())

    def _leave(self) -> None:
        name, first = self._stack.pop(), self._open.pop()
        if torch._C._current_autograd_node() is None:
            self._calls.append((first, torch.autograd._get_sequence_nr(), name))

    def _owner(self, number: int) -> str:
        """Calls end from the inside outwards: the first that has the number is the innermost."""
        return next(name for first, end, name in self._calls if first <= number < end)

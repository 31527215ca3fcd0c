"""A second derivative is refused: the backwards are no graph, so that its part through them would be missing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ofa_kernels.attention import Tokens, attention, plan_attention
from ofa_kernels.cross_entropy import linear_cross_entropy
from ofa_kernels.layer_norm import add_branch, add_layer_norm, gelu_layer_norm, layer_norm

WEIGHT, BIAS = torch.linspace(1, 2, 16), torch.linspace(0, 1, 16)
CLASSES = torch.linspace(-1, 1, 40 * 16).view(40, 16).sin()
TARGETS = torch.tensor([4, 9, 33, 7, 1, 39])


def attended(x: Tensor, kernel: str) -> Tensor:
    tokens = Tokens(torch.tensor([0, 4, 6]), torch.tensor([0, 1, 2, 3, 0, 1]), 4)
    plan = plan_attention(tokens, tokens, relative=None, causal=False, kernel=kernel)
    return attention((x, x, x), plan, (), None, torch.ones(1), scale=0.3, dropout=0.0)


OPERATORS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "attention": attended,
    "vocabulary loss": lambda x, kernel: linear_cross_entropy(x, CLASSES, TARGETS, kernel=kernel)[0],
    "norm": lambda x, kernel: layer_norm(x, WEIGHT, BIAS, kernel=kernel),
    "norm of gelu": lambda x, kernel: gelu_layer_norm(x, WEIGHT, BIAS, kernel=kernel),
    "norm of a sum": lambda x, kernel: add_layer_norm(x, x, WEIGHT, BIAS, kernel=kernel)[1],
    "scaled sum": lambda x, kernel: add_branch(x, x, gamma_D=WEIGHT, kernel=kernel),
}
IN_TORCH = [("attention", "torch"), ("vocabulary loss", "torch")]  # norms there are torch's own, which have one


@pytest.mark.parametrize(("name", "kernel"), [*((name, "triton") for name in OPERATORS), *IN_TORCH])
def test_a_second_derivative_is_refused_and_not_computed_in_part(name: str, kernel: str) -> None:
    x = torch.linspace(-1, 1, 96).view(6, 16).requires_grad_()
    squares = OPERATORS[name](x, kernel).square().sum()
    (gradient,) = torch.autograd.grad(squares, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient.square().sum() + x.pow(3).sum()).backward()

"""What only a GPU can show: 16-bit numerics at OFA's own sizes, and that no two programs race.

    TRITON_INTERPRET=0 python -m pytest tests/kernels -m gpu

The CPU form of each is in the other files of this folder (the interpreter) and in test_compile_gate.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import assert_as_accurate
from plain_attention import plain_results
from test_attention_kernel import NAMES, Case, assert_results
from test_cross_entropy_kernel import DEVICE, Problem, problem
from test_layer_norm_kernel import (
    Call,
    add_branch_call,
    add_inputs,
    add_layer_norm_call,
    assert_kernel_is_accurate,
    double,
    drop_path,
    dropout_mask,
    layer_norm_call,
    norm_inputs,
    run,
    with_mask,
)
from test_layer_norm_kernel import gelu_layer_norm_call as gelu_call
from torch import Tensor

from ofa_kernels.attention import attention, plan_attention
from ofa_kernels.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.gpu

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
CASES = [
    Case((605, 930, 917), heads=12, head_dim=64),
    Case((30, 1024, 1), heads=12, head_dim=64, causal=True),
    Case((30, 257, 3), (930, 605, 917), heads=12, head_dim=64, relative=False),
    Case((605, 930), heads=32, head_dim=80),
    Case((8192,), heads=2, head_dim=128),
]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_in_sixteen_bits_is_as_accurate_as_torch(case: Case, dtype: torch.dtype) -> None:
    exact = case.results("torch", torch.float64, rounded=dtype)
    assert_results(case.results("triton", dtype), plain_results(case, dtype), exact)


@pytest.fixture
def repeats(request: pytest.FixtureRequest) -> int:
    """The value of --repeats."""
    return request.config.getoption("repeats")


def misaligned(x: Tensor) -> Tensor:
    """The same values as a leaf that begins 8 bytes after a multiple of 16."""
    skipped = 8 // x.element_size()
    out = torch.empty(x.numel() + skipped, dtype=x.dtype, device=x.device)[skipped:].view(x.shape)
    assert out.data_ptr() % 16 == 8
    return out.copy_(x.detach()).requires_grad_()


def strided(x: Tensor) -> Tensor:
    """The same values as columns of a wider leaf's rows: dense within a row, rows apart."""
    wide = torch.empty(x.shape[0], x.shape[1] + 24, dtype=x.dtype, device=x.device)
    wide[:, 8:-16] = x.detach()
    return wide.requires_grad_()


@pytest.mark.parametrize("changed", [misaligned, strided])
def test_attention_of_tensors_that_lie_otherwise_is_as_accurate_as_torch(changed: Callable[[Tensor], Tensor]) -> None:
    case, dtype = Case((65, 130, 7), heads=12, head_dim=64), torch.bfloat16
    low, exact = plain_results(case, dtype), case.results("torch", torch.float64, rounded=dtype)
    leaves = [changed(x) if place < 3 or changed is misaligned else x for place, x in enumerate(case.inputs(dtype))]
    seen = [x[:, 8:-16] if place < 3 and changed is strided else x for place, x in enumerate(leaves)]
    out = case.run("triton", seen)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) / 2
    grads = torch.autograd.grad(out, seen, upstream.to(out))
    assert_results({"out": out.detach()} | dict(zip(NAMES, grads, strict=True)), low, exact)


def test_attention_drops_in_the_backward_what_the_forward_dropped_and_is_as_accurate_as_torch() -> None:
    """With v the identity the forward shows what it dropped; plain torch then takes that mask."""
    case, dtype, dropout = Case((130,), heads=2, head_dim=64, positions=False, relative=False), torch.bfloat16, 0.3
    q, k, v, *_, head_scale = case.inputs(dtype)
    plan = plan_attention(*case.sides(), relative=None, causal=False, kernel="triton", like=q)
    scale_one = torch.ones_like(head_scale)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention((q, k, v), plan, (), None, scale_one, scale=case.scale, dropout=dropout)

    parts = []
    for keys in torch.eye(130, device=DEVICE, dtype=dtype).split(64, 1):
        keys = torch.nn.functional.pad(keys, (0, 64 - keys.shape[1])).repeat(1, 2)
        parts.append(ours(q.detach(), k.detach(), keys).view(130, 2, 64) != 0)
    kept_HQK = torch.cat(parts, 2)[:, :, :130].transpose(0, 1)
    assert 0.65 < kept_HQK.float().mean() < 0.75

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(130, 2, 64).transpose(0, 1) for x in (q, k, v))
        probs = (case.scale * q @ k.transpose(1, 2)).softmax(-1) * kept_HQK.to(q.dtype) / (1 - dropout)
        return (probs @ v).transpose(0, 1).flatten(1)

    upstream = torch.randn(130, 128, device=DEVICE).to(dtype)
    results = []
    for function, wanted in ((ours, dtype), (plain, dtype), (plain, torch.float64)):
        leaves = [x.detach().to(wanted).requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(wanted))])
    for values in zip(*results, strict=True):
        assert_as_accurate(*values)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_attention_gives_the_same_bits_every_time(case: Case, repeats: int) -> None:
    first = case.results("triton", torch.bfloat16)
    for _ in range(repeats - 1):
        for name, value in case.results("triton", torch.bfloat16).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("width", [256, 768, 2560, 10240])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bf16", "fp16"])
def test_norms_in_sixteen_bits_are_as_accurate_as_torch(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    jobs = [(add_layer_norm_call(), add_inputs(4099, width, True, dtype))]
    jobs += [(call, norm_inputs(4099, width, dtype)) for call in (gelu_call, layer_norm_call)]
    for call, inputs in jobs:
        results = run(call, inputs, "triton"), run(call, inputs, "torch"), run(call, double(inputs), "torch")
        for out, low, exact in zip(*results, strict=True):
            assert_as_accurate(out, low, exact)


@pytest.mark.parametrize("width", [768, 2560])
def test_norms_give_the_same_bits_every_time(width: int, repeats: int) -> None:
    torch.manual_seed(0)
    inputs = add_inputs(4099, width, True, torch.bfloat16)
    first = run(add_layer_norm_call(dropout=0.1), inputs, "triton")
    for _ in range(repeats - 1):
        again = run(add_layer_norm_call(dropout=0.1), inputs, "triton")
        assert all(torch.equal(one, two) for one, two in zip(again, first, strict=True))


@pytest.mark.parametrize("call", [add_layer_norm_call, add_branch_call])
def test_norms_drop_in_the_backward_what_the_forward_dropped_and_are_as_accurate_as_torch(
    call: Callable[..., Call],
) -> None:
    torch.manual_seed(0)
    inputs, path = add_inputs(1031, 768, True, torch.bfloat16), drop_path(1031)
    reference = with_mask(dropout_mask(1031, 768, 0.1), call, **path)
    assert_kernel_is_accurate(call(dropout=0.1, **path), inputs, reference)


@pytest.mark.parametrize("call", [layer_norm_call, gelu_call])
def test_norms_of_misaligned_tensors_are_as_accurate_as_torch(call: Call) -> None:
    torch.manual_seed(0)
    inputs = {name: misaligned(x) for name, x in norm_inputs(1031, 768, torch.bfloat16).items()}
    assert_kernel_is_accurate(call, inputs)


TILES = [(300, 768), (1127, 768), (6000, 2560)]
"""Tokens and width of one tile, of several, and of several groups whose gradients of the weight add up in fp32."""


def assert_loss_is_accurate(example: Problem, dtype: torch.dtype) -> None:
    loss, _, _, dhidden, dweight = example.outcome("triton")
    low, exact = example.reference(dtype), example.reference(torch.float64)
    for ours, plain, truth in zip((loss, dhidden, dweight), low[::2] + low[3:], exact[::2] + exact[3:], strict=True):
        assert_as_accurate(ours, plain, truth)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bf16", "fp16"])
@pytest.mark.parametrize("num_tokens, width", TILES)
def test_the_vocabulary_loss_in_sixteen_bits_is_as_accurate_as_torch(
    num_tokens: int, width: int, dtype: torch.dtype
) -> None:
    assert_loss_is_accurate(problem(num_tokens, 59457, width, dtype=dtype), dtype)


@pytest.mark.parametrize("constraint", ["range", "mask"])
def test_the_constrained_vocabulary_loss_is_as_accurate_as_torch(constraint: str) -> None:
    example = problem(1127, 59457, 768, constraint=constraint, weighted=True, dtype=torch.bfloat16)
    assert_loss_is_accurate(example, torch.bfloat16)


def test_the_vocabulary_loss_of_a_part_of_a_tensor_is_as_accurate_as_torch() -> None:
    example = problem(300, 59457, 768, dtype=torch.bfloat16)
    hidden, weight = misaligned(example.hidden), misaligned(example.weight)
    losses = linear_cross_entropy(hidden, weight, example.target, label_smoothing=0.1, kernel="triton")
    grads = torch.autograd.grad(losses[0], (hidden, weight), example.upstream.to(losses[0].dtype))
    low, exact = example.reference(torch.bfloat16), example.reference(torch.float64)
    for values in zip((losses[0], *grads), low[::2] + low[3:], exact[::2] + exact[3:], strict=True):
        assert_as_accurate(*values)


@pytest.mark.parametrize("num_tokens, width", TILES)
def test_the_vocabulary_loss_gives_the_same_bits_every_time(num_tokens: int, width: int, repeats: int) -> None:
    example = problem(num_tokens, 59457, width, dtype=torch.bfloat16)
    first = example.outcome("triton")
    for _ in range(max(3, repeats * 300 // num_tokens) - 1):
        assert all(torch.equal(one, two) for one, two in zip(example.outcome("triton"), first, strict=True))

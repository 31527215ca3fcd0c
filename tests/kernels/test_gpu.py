"""What only a GPU can show: 16-bit numerics at OFA's own sizes, and that no two programs race.

    TRITON_INTERPRET=0 python -m pytest tests/kernels -m gpu

The CPU form of each is in the other files of this folder (the interpreter) and in test_compile_gate.py.
"""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate
from test_attention_kernel import Case, assert_results
from test_cross_entropy_kernel import problem
from test_layer_norm_kernel import add_inputs, add_layer_norm_call, double, norm_inputs, run
from test_layer_norm_kernel import gelu_layer_norm_call as gelu_call

pytestmark = pytest.mark.gpu

REPEATS = 250
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
CASES = [
    Case((605, 930, 917), heads=12, head_dim=64),
    Case((30, 1024, 1), heads=12, head_dim=64, causal=True),
    Case((30, 257, 3), (930, 605, 917), heads=12, head_dim=64, relative=False),
    Case((605, 930), heads=32, head_dim=80),
    Case((8192,), heads=2, head_dim=128),
]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_in_sixteen_bits_is_as_accurate_as_torch(case: Case, dtype: torch.dtype) -> None:
    ours, low = case.results("triton", dtype), case.results("torch", dtype)
    assert_results(ours, low, case.results("torch", torch.float64, rounded=dtype))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_attention_gives_the_same_bits_every_time(case: Case) -> None:
    first = case.results("triton", torch.bfloat16)
    for _ in range(REPEATS - 1):
        for name, value in case.results("triton", torch.bfloat16).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("width", [256, 768, 2560, 10240])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_norms_in_sixteen_bits_are_as_accurate_as_torch(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    jobs = [(add_layer_norm_call(), add_inputs(4099, width, True, dtype)), (gelu_call, norm_inputs(4099, width, dtype))]
    for call, inputs in jobs:
        results = run(call, inputs, "triton"), run(call, inputs, "torch"), run(call, double(inputs), "torch")
        for out, low, exact in zip(*results, strict=True):
            assert_as_accurate(out, low, exact)


@pytest.mark.parametrize("width", [768, 2560])
def test_norms_give_the_same_bits_every_time(width: int) -> None:
    torch.manual_seed(0)
    inputs = add_inputs(4099, width, True, torch.bfloat16)
    first = run(add_layer_norm_call(dropout=0.1), inputs, "triton")
    for _ in range(REPEATS - 1):
        again = run(add_layer_norm_call(dropout=0.1), inputs, "triton")
        assert all(torch.equal(one, two) for one, two in zip(again, first, strict=True))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_the_vocabulary_loss_in_sixteen_bits_is_as_accurate_as_torch(dtype: torch.dtype) -> None:
    example = problem(300, 59457, 768, dtype=dtype)
    loss, _, _, dhidden, dweight = example.outcome("triton")
    low, exact = example.reference(dtype), example.reference(torch.float64)
    for ours, plain, truth in zip((loss, dhidden, dweight), low[::2] + low[3:], exact[::2] + exact[3:], strict=True):
        assert_as_accurate(ours, plain, truth)


def test_the_vocabulary_loss_gives_the_same_bits_every_time() -> None:
    example = problem(300, 59457, 768, dtype=torch.bfloat16)
    first = example.outcome("triton")
    for _ in range(REPEATS - 1):
        assert all(torch.equal(one, two) for one, two in zip(example.outcome("triton"), first, strict=True))

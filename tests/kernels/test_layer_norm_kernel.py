"""The norm kernels against float64, in Triton's interpreter or on a GPU.

Shapes: N rows, D channels, E examples. Every operator is called as `call(inputs, kernel)`: a dict of tensors in, a
tuple of tensors out, so that one comparison serves all.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ofa_kernels import layer_norm as norms
from ofa_kernels._launch import interpreting
from ofa_kernels.layer_norm import add_branch, add_layer_norm, gelu_layer_norm, layer_norm

ops = pytest.importorskip("ofa_kernels.layer_norm_ops_triton", reason="needs triton")
kernels = ops.kernels

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
# The interpreter truncates fp32 to bf16 where a GPU rounds: bf16 is judged on the GPU only.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
GUARD = -12345.0

Inputs = dict[str, Tensor]
Call = Callable[[Inputs, str], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Tensor:
    """A leaf with NaN before and after it in memory, so that reading past its ends shows."""
    rows = shape[0] if len(shape) > 1 else 1
    buffer = torch.full((rows + 2, shape[-1]), torch.nan, dtype=dtype, device=DEVICE)
    values = buffer[1:-1].view(shape)
    values.copy_(torch.randn(shape) + shift)
    return values.requires_grad_()


def norm_inputs(
    num_rows: int, width: int, dtype: torch.dtype = torch.float32, weights: torch.dtype | None = None
) -> Inputs:
    weights = weights or dtype
    return {
        "x": normal(num_rows, width, dtype=dtype, shift=0.5),
        "weight": normal(width, dtype=weights, shift=1.0),
        "bias": normal(width, dtype=weights),
    }


def add_inputs(num_rows: int, width: int, gamma: bool, dtype: torch.dtype = torch.float32) -> Inputs:
    inputs = {"residual": normal(num_rows, width, dtype=dtype)} | norm_inputs(num_rows, width, dtype)
    return inputs | ({"gamma": normal(width, dtype=dtype)} if gamma else {})


def drop_path(num_rows: int) -> dict[str, Tensor]:
    """Two rows an example; every third example is dropped."""
    examples = torch.arange(num_rows, device=DEVICE) // 2
    keep = torch.tensor([1.25, 1.25, 0.0], device=DEVICE).repeat(num_rows // 6 + 1)
    return {"example_N": examples, "keep_E": keep}


def layer_norm_call(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
    return (layer_norm(inputs["x"], inputs["weight"], inputs["bias"], kernel=kernel),)


def gelu_layer_norm_call(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
    return (gelu_layer_norm(inputs["x"], inputs["weight"], inputs["bias"], kernel=kernel),)


NORMS = [layer_norm_call, gelu_layer_norm_call]


def add_layer_norm_call(**options) -> Call:
    def call(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
        rows, vectors = (inputs["residual"], inputs["x"]), (inputs["weight"], inputs["bias"])
        return add_layer_norm(*rows, *vectors, gamma_D=inputs.get("gamma"), kernel=kernel, **options)

    return call


def add_branch_call(**options) -> Call:
    def call(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
        return (add_branch(inputs["residual"], inputs["x"], gamma_D=inputs.get("gamma"), kernel=kernel, **options),)

    return call


def run(call: Call, inputs: Inputs, kernel: str, seed: int = 0) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that get one, for output gradients that depend on shapes alone."""
    leaves = list(inputs.values())
    torch.manual_seed(seed)
    outputs = call(inputs, kernel)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator).to(each) for each in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [*outputs, *(each for each in gradients if each is not None)]


def double(inputs: Inputs) -> Inputs:
    return {name: each.detach().double().requires_grad_() for name, each in inputs.items()}


def assert_kernel_is_accurate(call: Call, inputs: Inputs, reference: Call | None = None) -> None:
    """Outputs and gradients of one dtype are judged together: in one of a few numbers torch's own error is luck."""
    reference = reference or call
    results = run(call, inputs, "triton"), run(reference, inputs, "torch"), run(reference, double(inputs), "torch")
    parts = list(zip(*results, strict=True))
    assert all(out.dtype == low.dtype and out.shape == low.shape for out, low, _ in parts)
    for dtype in {out.dtype for out, *_ in parts}:
        of_dtype = zip(*(each for each in parts if each[0].dtype == dtype), strict=True)
        assert_as_accurate(*(torch.cat([each.double().flatten() for each in values]) for values in of_dtype))


rows_and_width = {"num_rows": st.integers(1, 3), "width": st.integers(16, 400)}


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs of kernels start as NaN between guarding rows; fails where a guard was written or a NaN was left."""
    buffers: list[tuple[Tensor, Tensor, Tensor]] = []

    def allocate(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
        size, guard = torch.Size(shape).numel(), max(shape[-1], 16)
        before, values, after = torch.full((size + 2 * guard,), GUARD, dtype=dtype, device=like.device).split(
            [guard, size, guard]
        )
        buffers.append((before, values, after))
        return values.fill_(torch.nan).view(shape)

    monkeypatch.setattr(ops, "_allocate", allocate)
    yield
    assert buffers, "nothing was allocated"
    for before, values, after in buffers:
        assert (before == GUARD).all() and (after == GUARD).all(), "written beside an output"
        assert not values.isnan().any(), "a part of an output was not written"


@pytest.mark.parametrize("call", NORMS)
@settings(max_examples=160, deadline=None, derandomize=True)
@given(**rows_and_width, seed=st.integers(0, 99))
def test_norm_and_its_gradients_are_as_accurate_as_torch(call: Call, num_rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    assert_kernel_is_accurate(call, norm_inputs(num_rows, width))


@pytest.mark.long
@settings(max_examples=160, deadline=None, derandomize=True)
@given(**rows_and_width, gamma=st.booleans(), path=st.booleans(), seed=st.integers(0, 99))
def test_residual_sum_and_norm_are_as_accurate_as_torch(num_rows, width, gamma, path, seed) -> None:
    torch.manual_seed(seed)
    call = add_layer_norm_call(**(drop_path(num_rows) if path else {}))
    assert_kernel_is_accurate(call, add_inputs(num_rows, width, gamma))


@settings(max_examples=160, deadline=None, derandomize=True)
@given(**rows_and_width, gamma=st.booleans(), path=st.booleans(), seed=st.integers(0, 99))
def test_residual_sum_without_norm_is_as_accurate_as_torch(num_rows, width, gamma, path, seed) -> None:
    torch.manual_seed(seed)
    call = add_branch_call(**(drop_path(num_rows) if path else {}))
    assert_kernel_is_accurate(call, add_inputs(num_rows, width, gamma))


def dropout_mask(num_rows: int, width: int, dropout: float, seed: int = 0) -> Tensor:
    """The mask that a call after `torch.manual_seed(seed)` draws, times 1 / (1 - dropout), read off its output."""
    torch.manual_seed(seed)
    ones = torch.ones(num_rows, width, device=DEVICE)
    return add_branch(torch.zeros_like(ones), ones, dropout=dropout, kernel="triton")


def with_mask(mask_ND: Tensor, call: Callable[..., Call], **options) -> Call:
    """`call` in plain torch with the given mask in place of dropout."""

    def masked(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
        return call(**options)(inputs | {"x": inputs["x"] * mask_ND.to(inputs["x"].dtype)}, "torch")

    return masked


@pytest.mark.long
@settings(max_examples=160, deadline=None, derandomize=True)
@given(**rows_and_width, gamma=st.booleans(), path=st.booleans(), norm=st.booleans(), seed=st.integers(0, 99))
def test_backward_draws_the_dropout_mask_of_the_forward(num_rows, width, gamma, path, norm, seed) -> None:
    torch.manual_seed(seed)
    inputs, options = add_inputs(num_rows, width, gamma), drop_path(num_rows) if path else {}
    call = add_layer_norm_call if norm else add_branch_call
    reference = with_mask(dropout_mask(num_rows, width, 0.3), call, **options)
    assert_kernel_is_accurate(call(dropout=0.3, **options), inputs, reference)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_asked_share_and_scales_it(dropout: float) -> None:
    mask = dropout_mask(40, 1000, dropout)
    kept = mask != 0
    asked = torch.tensor(1 / (1 - dropout), device=DEVICE)
    assert torch.allclose(mask[kept], asked, rtol=2**-16 / (1 - dropout)), "the probability is one of 2**16"
    deviation = (dropout * (1 - dropout) / 40_000) ** 0.5
    assert abs(kept.float().mean().item() - (1 - dropout)) < 5 * deviation
    per_column = kept.float().mean(0)
    assert per_column.std().item() == pytest.approx((dropout * (1 - dropout) / 40) ** 0.5, rel=0.15)


def test_dropout_of_neighbouring_rows_columns_and_seeds_is_independent() -> None:
    kept = (dropout_mask(40, 1000, 0.5) != 0).float() - 0.5
    other = (dropout_mask(40, 1000, 0.5, seed=1) != 0).float() - 0.5
    lags = (1, 2, 3, 4, 7, 8, 512)
    pairs = [(kept[1:], kept[:-1]), (kept, other)] + [(kept[:, lag:], kept[:, :-lag]) for lag in lags]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 5 * 0.25 / a.numel() ** 0.5


def test_dropout_follows_the_default_generator_of_the_cpu() -> None:
    assert torch.equal(dropout_mask(3, 100, 0.5, seed=7), dropout_mask(3, 100, 0.5, seed=7))
    torch.manual_seed(0)
    ones = torch.ones(3, 100, device=DEVICE)
    first, second = (add_branch(ones, ones, dropout=0.5, kernel="triton") for _ in range(2))
    assert not torch.equal(first, second)


def test_dropped_examples_keep_their_residual_and_give_x_no_gradient() -> None:
    torch.manual_seed(0)
    inputs, path = add_inputs(12, 40, gamma=True), drop_path(12)
    dropped = path["keep_E"][path["example_N"]] == 0
    z, *_, dresidual, dx, _ = run(add_branch_call(**path), inputs, "triton")
    assert torch.equal(z[dropped], inputs["residual"][dropped])
    assert not dx[dropped].any() and dx[~dropped].any() and dresidual[dropped].any()


@pytest.mark.parametrize("width", [1, 2, 15, 17, 31, 33, 513, 1030])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_any_width_works(num_rows: int, width: int) -> None:
    torch.manual_seed(width)
    inputs = add_inputs(num_rows, width, gamma=True)
    with torch.no_grad():  # two almost equal values would be all cancellation
        for name in ("residual", "x"):
            inputs[name] += 3 * (torch.arange(width, device=DEVICE) % 2)
        inputs["gamma"].abs_()
    assert_kernel_is_accurate(add_layer_norm_call(), inputs)
    del inputs["residual"], inputs["gamma"]
    assert_kernel_is_accurate(gelu_layer_norm_call, inputs)


@triton.jit
def gelu_kernel(x_ptr, gelu_ptr, slope_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gelu, slope = kernels._gelu(tl.load(x_ptr + place))
    tl.store(gelu_ptr + place, gelu)
    tl.store(slope_ptr + place, slope)


def test_gelu_and_its_slope_are_nearer_to_the_truth_than_torchs_own() -> None:
    x = torch.cat([torch.linspace(-12, 12, 2**16 - 4), torch.tensor([-1e30, -1e4, 1e4, 1e30])]).to(DEVICE)
    ours = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    gelu_kernel[(2**4,)](x, *ours, BLOCK=2**12)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        out = torch.nn.functional.gelu(x)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    tail = 0.5 * torch.special.erfc(-x.double() / 2**0.5)  # not 1 + erf, which has no digits left for negative numbers
    exact = x.double() * tail, tail + x.double() * torch.exp(-(x.double() ** 2) / 2) / (2 * torch.pi) ** 0.5
    for out, low, truth in zip(ours, plain(x.clone()), exact, strict=True):
        assert_as_accurate(out, low, truth, factor=1.0)
    small = (x > -4) & (x < 0)
    assert ((ours[0] - exact[0]) / exact[0])[small].abs().max() < 1e-4, "16 bits resolve 4e-3, fp16 5e-4"


def test_values_far_from_zero_keep_their_variance() -> None:
    inputs = norm_inputs(64, 300)  # how a row's mean is rounded is luck: of few rows the worst says little
    with torch.no_grad():
        inputs["x"] += 1000
    assert_kernel_is_accurate(layer_norm_call, inputs)


@pytest.mark.parametrize("call", [*NORMS, add_layer_norm_call(), add_branch_call()])
def test_no_rows_give_empty_outputs_and_zero_weight_gradients(call: Call) -> None:
    results = run(call, add_inputs(0, 48, gamma=True), "triton")
    expected = run(call, add_inputs(0, 48, gamma=True), "torch")
    assert [each.shape for each in results] == [each.shape for each in expected]
    assert not any(each.any() for each in results)


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("call", NORMS)
def test_split_backward_of_wide_rows_is_as_accurate_as_torch(call, num_rows, monkeypatch, guarded) -> None:
    monkeypatch.setattr(kernels, "SPLIT_WIDTH", 64)
    monkeypatch.setattr(ops, "_processors", lambda x: 1)
    torch.manual_seed(0)
    assert_kernel_is_accurate(call, norm_inputs(num_rows, 200))


@pytest.mark.parametrize("num_rows, width", [(1, 16), (2, 320), (13, 17), (9, 352)])
@pytest.mark.parametrize("call", [*NORMS, add_layer_norm_call(dropout=0.3), add_branch_call(dropout=0.3)])
def test_every_output_is_written_and_nothing_beside_it(call: Call, num_rows: int, width: int, guarded) -> None:
    torch.manual_seed(0)
    results = run(call, add_inputs(num_rows, width, gamma=True), "triton")
    assert all(each.isfinite().all() for each in results)


@pytest.mark.parametrize("call", [*NORMS, add_layer_norm_call(dropout=0.2)])
def test_two_runs_give_the_same_bits(call: Call) -> None:
    torch.manual_seed(0)
    inputs = add_inputs(9, 130, gamma=True)
    first, second = (run(call, inputs, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", [*NORMS, add_layer_norm_call(), add_branch_call()])
def test_half_precision_is_as_accurate_as_torch(call: Call, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_kernel_is_accurate(call, add_inputs(5, 320, gamma=True, dtype=dtype))


@pytest.mark.parametrize("call", NORMS)
def test_weights_may_be_fp32_beside_half_precision_rows(call: Call) -> None:
    torch.manual_seed(0)
    inputs = norm_inputs(5, 130, torch.float16, weights=torch.float32)
    assert_kernel_is_accurate(call, inputs)
    y, dx, dweight, dbias = run(call, inputs, "triton")
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (torch.float16,) * 2 + (torch.float32,) * 2


@pytest.mark.parametrize("call", [add_layer_norm_call(), add_layer_norm_call(**drop_path(4)), add_branch_call()])
def test_a_wider_residual_gives_a_wider_sum(call: Call) -> None:
    torch.manual_seed(0)
    inputs = add_inputs(4, 48, gamma=False) | {"x": normal(4, 48, dtype=torch.float16)}
    assert_kernel_is_accurate(call, inputs)
    assert call(inputs, "triton")[0].dtype == torch.float32


def test_norm_is_taken_of_the_rounded_sum() -> None:
    torch.manual_seed(0)
    inputs = add_inputs(4, 48, gamma=False, dtype=torch.float16)
    z, y = add_layer_norm_call()(inputs, "triton")
    assert torch.equal(y, layer_norm(z, inputs["weight"], inputs["bias"], kernel="triton"))


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_has_no_part_in_the_gradients(used: int) -> None:
    torch.manual_seed(0)
    inputs = add_inputs(3, 40, gamma=True)

    def call(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
        return (add_layer_norm_call()(inputs, kernel)[used],)

    results, expected = ([each for each in run(call, inputs, kernel) if each.any()] for kernel in ("triton", "torch"))
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)


def test_strided_rows_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    inputs = norm_inputs(6, 48)
    wide = torch.randn(6, 96, device=DEVICE, requires_grad=True)

    def call(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
        return (layer_norm(inputs["x"][:, ::2], inputs["weight"], inputs["bias"], kernel=kernel).t(),)

    assert_kernel_is_accurate(call, inputs | {"x": wide})


@pytest.mark.parametrize("call", [*NORMS, add_layer_norm_call()])
def test_backward_reads_the_parameters_as_they_are_then(call: Call) -> None:
    """ZeRO-3 empties parameters after the forward and gathers them into new memory before the backward."""
    torch.manual_seed(0)
    inputs = add_inputs(3, 40, gamma=True)

    def partitioned(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
        outputs = call(inputs, kernel)
        for name in ("weight", "bias", "gamma"):
            gathered = inputs[name].data.clone()
            inputs[name].data.fill_(torch.nan)
            inputs[name].data = gathered
        return outputs

    for plain, again in zip(run(call, inputs, "triton"), run(partitioned, inputs, "triton"), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_checkpointing_does_not_change_gradients(kernel: str) -> None:
    torch.manual_seed(0)
    inputs, call = add_inputs(5, 100, gamma=True), add_layer_norm_call(dropout=0.3)

    def checkpointed(inputs: Inputs, kernel: str) -> tuple[Tensor, ...]:
        return checkpoint(call, inputs, kernel, use_reentrant=False)

    for plain, again in zip(run(call, inputs, kernel), run(checkpointed, inputs, kernel), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("call", [*NORMS, add_layer_norm_call(dropout=0.3), add_branch_call(dropout=0.3)])
def test_operators_compile_without_a_graph_break(call: Call) -> None:
    torch.manual_seed(0)
    inputs = add_inputs(3, 40, gamma=True)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for eager, out in zip(run(call, inputs, "triton"), run(compiled, inputs, "triton"), strict=True):
        assert torch.equal(eager, out)


def test_fake_operators_agree_with_the_real_ones() -> None:
    torch.manual_seed(0)
    x, residual, weight, bias, gamma = (normal(*shape) for shape in [(3, 40)] * 2 + [(40,)] * 3)
    path, seed = tuple(drop_path(3).values()), torch.tensor([5])
    torch.library.opcheck(ops._norm_op, (x, weight, bias, 1e-5, True))
    torch.library.opcheck(ops._add_norm_op, (residual, x, weight, bias, gamma, *path, seed, 1e-5, 0.3))
    torch.library.opcheck(ops._add_norm_op, (residual, x, None, None, None, *path, seed, 0.0, 0.3))
    torch.library.opcheck(ops._add_norm_op, (residual, x, weight, bias, None, None, None, None, 1e-5, 0.0))


@pytest.mark.parametrize(
    "call", [*NORMS, add_layer_norm_call(**drop_path(4)), add_branch_call(dropout=0.3, **drop_path(4))]
)
def test_torch_path_has_the_gradients_of_its_outputs(call: Call) -> None:
    torch.manual_seed(0)
    inputs = double(add_inputs(4, 6, gamma=True))

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return call(dict(zip(inputs, leaves, strict=True)), "torch")

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("call", [*NORMS, add_layer_norm_call(), add_branch_call()])
def test_float64_and_cpu_tensors_run_in_torch(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_triton_ops", lambda: pytest.fail("a kernel was chosen"))
    inputs = add_inputs(3, 40, gamma=True)
    run(call, double(inputs), "triton")
    run(call, {name: each.detach().cpu().requires_grad_() for name, each in inputs.items()}, "auto")


@pytest.mark.parametrize(
    "num_rows, width, pays",
    [(4459, 1024, True), (4459, 768, False), (5, 2560, False), (4000, 11264, True), (4000, 11265, False)],
)
def test_auto_on_a_gpu_leaves_what_the_host_holds_up_and_very_wide_rows_to_torch(num_rows, width, pays) -> None:
    with FakeTensorMode():
        x = torch.empty(num_rows, width, device="cuda", dtype=torch.bfloat16)
    assert norms._choose("auto", x) == ("triton" if pays else "torch")
    assert norms._choose("auto", x, pays=False) == "torch"
    assert norms._choose("triton", x) == "triton"


def module(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    made.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, made)


def test_apex_runs_its_fused_function_in_the_dtype_of_rows_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fused_layer_norm_affine(x, weight, bias, shape, eps):
        calls.append((x.dtype, weight.dtype, tuple(shape), eps))
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    module(monkeypatch, "apex")
    module(monkeypatch, "apex.normalization")
    module(monkeypatch, "apex.normalization.fused_layer_norm", fused_layer_norm_affine=fused_layer_norm_affine)
    module(monkeypatch, "fused_layer_norm_cuda")
    for call in (*NORMS, add_layer_norm_call()):
        inputs = add_inputs(3, 40, gamma=False)
        torch.testing.assert_close(run(call, inputs, "apex"), run(call, inputs, "torch"))
    mixed = norm_inputs(3, 40, torch.float16, weights=torch.float32)
    assert layer_norm_call(mixed, "apex")[0].dtype == torch.float16
    assert calls == [(torch.float32, torch.float32, (40,), 1e-5)] * 4


def test_another_package_called_apex_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "apex")
    with pytest.raises(RuntimeError, match="^kernel 'apex': .*NVIDIA's apex.*'torch'$"):
        layer_norm_call(norm_inputs(2, 16), "apex")


def apex_is_there() -> bool:
    try:
        norms._apex_norm()
    except RuntimeError:
        return False
    return DEVICE == "cuda"


@pytest.mark.skipif(not apex_is_there(), reason="needs NVIDIA's apex and a GPU")
@pytest.mark.parametrize("call", [*NORMS, add_layer_norm_call()])
def test_apex_is_as_accurate_as_torch(call: Call) -> None:
    inputs = add_inputs(5, 768, gamma=True)
    results = run(call, inputs, "apex"), run(call, inputs, "torch"), run(call, double(inputs), "torch")
    for out, low, exact in zip(*results, strict=True):
        assert_as_accurate(out, low, exact)


X, V = torch.zeros(3, 8), torch.zeros(8)
EXAMPLES, KEEP = torch.zeros(3, dtype=torch.long), torch.ones(2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer_norm(X[0], V, V), r"layer_norm: want x \[N, D\] and vectors \[D\], got \(8,\), \(8,\), \(8,\)"),
        (lambda: layer_norm(X, V[:4], V), r"got \(3, 8\), \(4,\), \(8,\)"),
        (lambda: gelu_layer_norm(X, V, V[:4]), r"gelu_layer_norm: .* got \(3, 8\), \(8,\), \(4,\)"),
        (lambda: add_branch(X[:2], X), r"add_branch: want residual, x \[N, D\] .* got \(2, 8\), \(3, 8\)"),
        (lambda: add_layer_norm(X, X, V, V, gamma_D=V[:1]), r"add_layer_norm: .*\(8,\), \(1,\)$"),
        (lambda: add_branch(X, X, keep_E=KEEP), "want both of example_N and keep_E or neither"),
        (
            lambda: add_branch(X, X, example_N=EXAMPLES[:2], keep_E=KEEP),
            r"want example_N \[3\] .* got \(2,\) and \(2,\)",
        ),
        (lambda: add_branch(X, X, example_N=EXAMPLES, keep_E=KEEP.half()), r"in float32, got .* in float16"),
        (lambda: add_branch(X, X, dropout=1.0), "want 0 <= dropout < 1, got 1.0"),
        (lambda: layer_norm(X, V, V, kernel="cuda"), "kernel 'cuda': want one of auto, triton, torch, apex"),
    ],
)
def test_wrong_arguments_are_named_with_what_came(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)

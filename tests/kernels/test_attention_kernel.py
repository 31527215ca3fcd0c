"""Attention in fp32 against the reference in fp64: outputs and all eight gradients, in the interpreter or on a GPU.

The interpreter runs programs one after another: what can be said of races is in test_gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ofa_kernels import attention_row_ops_triton
from ofa_kernels._launch import interpreting
from ofa_kernels.attention import RelativeCodes, Tokens, attention, plan_attention, position_terms
from ofa_kernels.attention_plan_triton import TritonPlan

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
NAMES = ("q", "k", "v", "pos_q", "pos_k", "row", "head scale")


@dataclass(frozen=True)
class Case:
    """Lengths of the examples' queries, of their keys (None: self-attention), and what the attention has."""

    queries: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    heads: int = 2
    head_dim: int = 16
    positions: bool = True
    relative: bool = True
    causal: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        """As the model has it (`ModelConfig.attention_scale`)."""
        return (2 * self.head_dim) ** -0.5

    def sides(self) -> tuple[Tokens, Tokens]:
        """Positions repeat between examples and skip some, as sampled patches do."""
        queries = self._side(self.queries)
        return queries, queries if self.keys is None else self._side(self.keys)

    def _side(self, lengths: tuple[int, ...]) -> Tokens:
        num_positions = max(lengths) + 4
        generator = torch.Generator().manual_seed(self.seed)
        position = [torch.randperm(num_positions, generator=generator)[:n].sort().values for n in lengths]
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        return Tokens(offsets.to(DEVICE), torch.cat(position).to(DEVICE), num_positions)

    def codes(self) -> RelativeCodes | None:
        """Every fifth query position is of a kind that has no relative bias."""
        if not self.relative:
            return None
        queries, keys = self.sides()
        query = torch.arange(queries.num_positions, device=DEVICE) + 3
        query[::5] -= 1000
        return RelativeCodes(query, torch.arange(keys.num_positions, device=DEVICE), queries.num_positions + 2)

    def inputs(self, dtype: torch.dtype = torch.float32, rounded: torch.dtype | None = None) -> list[Tensor]:
        """rounded: the dtype whose values they have, where that is a narrower one."""
        queries, keys = self.sides()
        generator = torch.Generator().manual_seed(self.seed + 1)
        num_queries, num_keys, width = len(queries.position), len(keys.position), self.heads * self.head_dim
        shapes = [(num_queries, width), (num_keys, width), (num_keys, width)]
        shapes += [(queries.num_positions, width), (keys.num_positions, width)]
        shapes += [(self.heads, queries.num_positions + 2), (self.heads,)]
        values = [(torch.randn(*shape, generator=generator) / 2).to(DEVICE) for shape in shapes]
        return [each.to(rounded or dtype).to(dtype).requires_grad_() for each in values]

    def run(self, kernel: str, inputs: list[Tensor], *, dropout: float = 0.0) -> Tensor:
        q, k, v, pos_q, pos_k, row, head_scale = inputs
        plan = plan_attention(*self.sides(), relative=self.codes(), causal=self.causal, kernel=kernel)
        positions = position_terms(pos_q, pos_k, self.heads, self.scale, plan) if self.positions else ()
        row = row if self.relative else None
        return attention((q, k, v), plan, positions, row, head_scale, scale=self.scale, dropout=dropout)

    def results(
        self, kernel: str, dtype: torch.dtype = torch.float32, rounded: torch.dtype | None = None, **options: object
    ) -> dict[str, Tensor]:
        """The output and every gradient that exists."""
        inputs = self.inputs(dtype, rounded)
        out = self.run(kernel, inputs, **options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) / 2
        out.backward(upstream.to(DEVICE, rounded or dtype).to(dtype))
        grads = {name: x.grad for name, x in zip(NAMES, inputs, strict=True) if x.grad is not None}
        return {"out": out.detach(), **grads}


FEW = 8


def relative_to(out: Tensor, exact: Tensor, size: Tensor) -> float:
    return ((out.double() - exact).abs().max() / size).item()


def assert_right(case: Case, **options: object) -> None:
    ours, low, exact = case.results("triton", **options), case.results("torch"), case.results("torch", torch.float64)
    assert_results(ours, low, exact)


def assert_results(ours: dict[str, Tensor], low: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Each of `ours` as near `exact` as plain torch's, `low`, and of its dtype and shape."""
    assert ours.keys() == exact.keys()
    assert all(ours[name].shape == each.shape and ours[name].dtype == each.dtype for name, each in low.items())
    exact = {name: value for name, value in exact.items() if value.numel()}
    sizes = {name: value.abs().max().clamp(min=1) for name, value in exact.items()}
    relative = max(relative_to(low[name], exact[name], size) for name, size in sizes.items())
    for name, value in exact.items():
        if value.numel() > FEW:
            assert_as_accurate(ours[name], low[name], value)
        else:  # torch's own error of one of a few numbers is luck: what counts is that of all results together
            assert relative_to(ours[name], value, sizes[name]) <= 2 * relative + 1e-6, name


ENCODER = Case((5, 70, 1))
DECODER = replace(ENCODER, causal=True)
CROSS = Case((5, 33, 1), (40, 2, 7), relative=False)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 88, 96, 128])
@pytest.mark.parametrize("form", [Case((3, 18)), Case((3, 18), causal=True), Case((3, 18), (17, 2), relative=False)])
def test_every_head_dim_of_every_kind_is_exact(form: Case, head_dim: int) -> None:
    assert_right(replace(form, head_dim=head_dim))


@pytest.mark.parametrize(
    "case",
    [
        ENCODER,
        DECODER,
        CROSS,
        Case((1,)),
        Case((1, 1, 1), causal=True),
        Case((64, 128)),
        Case((65,), causal=True),
        Case((7, 0, 3)),
        Case((2, 130), positions=False),
        Case((9, 4), relative=False),
        Case((9, 4), positions=False, relative=False, causal=True),
        Case((1, 1), (90, 3), relative=False),
        Case((90, 3), (1, 1), relative=False),
    ],
    ids=str,
)
def test_lengths_around_the_tiles_and_missing_terms_are_exact(case: Case) -> None:
    assert_right(case)


lengths = st.lists(st.integers(0, 24), min_size=1, max_size=4).filter(any)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    queries = draw(lengths)
    cross = draw(st.booleans())
    keys = tuple(draw(st.integers(1, 24)) for _ in queries) if cross else None
    causal = not cross and draw(st.booleans())
    return Case(
        tuple(queries), keys, heads=draw(st.integers(1, 2)), head_dim=draw(st.sampled_from([4, 8, 12, 16, 20])),
        positions=draw(st.booleans()), relative=not cross and draw(st.booleans()), causal=causal,
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@pytest.mark.long
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_shape_is_exact(case: Case) -> None:
    assert_right(case)


@pytest.mark.parametrize("case", [Case((5, 66), heads=1), Case((5, 66), heads=1, causal=True)])
def test_two_runs_give_the_same_bits(case: Case) -> None:
    first, second = case.results("triton"), case.results("triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("magnitude", [1e-12, 1e-4, 1e4, 1e12])
def test_gradients_of_the_row_keep_their_precision_at_any_loss_scale(magnitude: float) -> None:
    """They pass through integers: the fixed point has to follow the size of the gradient."""
    case = Case((20, 9))

    def gradient(kernel: str, dtype: torch.dtype) -> Tensor:
        inputs = case.inputs(dtype)
        (case.run(kernel, inputs).sum() * magnitude).backward()
        return inputs[5].grad

    exact = gradient("torch", torch.float64)
    assert (gradient("triton", torch.float32) - exact).norm() <= 1e-5 * exact.norm()


def test_a_head_scale_of_zero_still_has_a_gradient() -> None:
    case = Case((6, 3))
    grads = []
    for kernel, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        inputs = case.inputs(dtype)
        with torch.no_grad():
            inputs[6].zero_()
        case.run(kernel, inputs).sum().backward()
        grads.append(inputs[6].grad)
    assert grads[1].abs().min() > 0
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-5)


def test_logits_far_from_zero_do_not_overflow() -> None:
    case = Case((12, 5))
    results = []
    for kernel, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        inputs = case.inputs(dtype)
        with torch.no_grad():
            inputs[0].mul_(300)
        out = case.run(kernel, inputs)
        out.sum().backward()
        results.append([out, inputs[2].grad])
    for ours, exact in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


def test_an_example_without_keys_gets_zeros() -> None:
    case = Case((3, 2), (4, 0), relative=False)
    inputs = case.inputs()
    out = case.run("triton", inputs)
    out.sum().backward()
    assert not out[3:].any() and out[:3].any()
    assert all(x.grad.isfinite().all() for x in inputs if x.grad is not None)


@pytest.mark.parametrize("case", [Case((5, 9)), Case((5, 9), causal=True), Case((5, 9), (7, 3), relative=False)])
def test_a_token_sees_only_its_own_example(case: Case) -> None:
    inputs = case.inputs()
    with torch.no_grad():
        before = case.run("triton", inputs)
        keys = case.sides()[1].offsets
        inputs[1][int(keys[1]) :] += 7.0
        inputs[2][int(keys[1]) :] -= 7.0
        after = case.run("triton", inputs)
    assert torch.equal(before[:5], after[:5]) and not torch.equal(before[5:], after[5:])


class Inside(TorchDispatchMode):
    """Shows `see` what every operator returns."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        return self.see(func.overloadpacket.__name__, func(*args, **(kwargs or {})))

    def see(self, name: str, out: object) -> object:
        return out


class Poison(Inside):
    """Fills what `empty` returns, between guard rows, and keeps it: (whole buffer, the part that was handed out)."""

    guard = 64

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def see(self, name: str, out: object) -> object:
        if name not in ("new_empty", "empty", "empty_like") or not out.is_floating_point() or not out.numel():
            return out
        whole = torch.full((out.numel() + 2 * self.guard,), math.nan, dtype=out.dtype)
        part = whole[self.guard : self.guard + out.numel()].view(out.shape)
        self.buffers.append((whole, part))
        return part


@pytest.fixture
def poison() -> Iterator[Poison]:
    with Poison() as mode:
        yield mode


@pytest.mark.parametrize(
    "case", [Case((5, 66), heads=1), Case((5, 9), causal=True), Case((5, 3), (66, 2), relative=False)]
)
def test_kernels_write_all_of_their_buffers_and_nothing_beside(case: Case, poison: Poison) -> None:
    inputs = case.inputs()
    case.run("triton", inputs).sum().backward()
    assert len(poison.buffers) >= 8
    for whole, part in poison.buffers:
        guards = torch.cat([whole[: poison.guard], whole[-poison.guard :]])
        assert guards.isnan().all(), f"written outside of {tuple(part.shape)}"
        if part.ndim < 3:  # dlogits have room for the longest example; what is left of it nobody reads
            assert part.isfinite().all(), f"left unwritten inside {tuple(part.shape)}"
    assert all(x.grad.isfinite().all() for x in inputs if x.grad is not None)


class Largest(Inside):
    """The most elements that any one tensor made in here has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def see(self, name: str, out: object) -> object:
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return out


def largest_tensor(case: Case, kernel: str) -> int:
    inputs = case.inputs()
    with Largest() as seen:
        case.run(kernel, inputs).sum().backward()
    return seen.elements


def test_no_tensor_grows_with_queries_times_keys_but_dlogits_of_few_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((128,), heads=2, head_dim=4, relative=False)
    shorter = replace(case, queries=(64,))
    assert largest_tensor(case, "triton") <= 2 * largest_tensor(shorter, "triton")
    assert largest_tensor(case, "torch") >= 3 * largest_tensor(shorter, "torch"), "the reference has one: it is counted"
    both_heads = largest_tensor(replace(case, relative=True), "triton")
    monkeypatch.setattr(attention_row_ops_triton, "DLOGITS_BYTES", 1)
    assert 2 * largest_tensor(replace(case, relative=True), "triton") == both_heads


def test_the_backward_uses_the_dropout_mask_of_the_forward() -> None:
    """v = identity shows the dropped probabilities; the gradient of v for one column is their column sum."""
    case = Case((16,), heads=1, head_dim=16, positions=False, relative=False)
    inputs = case.inputs()
    q, k, _, _, _, _, head_scale = (x.detach() for x in inputs)
    head_scale = torch.ones_like(head_scale)
    plan = plan_attention(*case.sides(), relative=None, causal=False, kernel="triton")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention((q, k, v), plan, (), None, head_scale, scale=case.scale, dropout=0.4)

    dropped = run(q, k, torch.eye(16))
    full = attention((q, k, torch.eye(16)), plan, (), None, head_scale, scale=case.scale, dropout=0.0)
    mask = (dropped != 0).float() / 0.6
    torch.testing.assert_close(dropped, full * mask)
    assert 0.45 < (dropped != 0).float().mean() < 0.75
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, inputs[2])]
    upstream = torch.randn(16, 16)
    run(*leaves).backward(upstream)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    probs = (case.scale * exact[0] @ exact[1].T).softmax(-1) * mask.double()
    (probs @ exact[2]).backward(upstream.double())
    for ours, theirs in zip(leaves, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_heads_examples_and_steps_draw_different_dropout_masks() -> None:
    case = Case((16, 16), heads=2, positions=False, relative=False)
    q, k, v, *_, head_scale = (x.detach() for x in case.inputs())
    v = torch.eye(16).repeat(2, 2)
    plan = plan_attention(*case.sides(), relative=None, causal=False, kernel="triton")
    runs = [
        attention((q, k, v), plan, (), None, head_scale, scale=case.scale, dropout=0.5).view(2, 16, 2, 16)
        for _ in range(2)
    ]
    masks = [(run[example, :, head] != 0) for run in runs for example in range(2) for head in range(2)]
    agreement = [(a == b).float().mean().item() for i, a in enumerate(masks) for b in masks[:i]]
    assert max(agreement) < 0.65


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(dropout: float) -> None:
    case = Case((9, 4))
    grads = []
    for recompute in (False, True):
        inputs = case.inputs()
        torch.manual_seed(1)

        def run(*inputs: Tensor) -> Tensor:
            return case.run("triton", list(inputs), dropout=dropout)

        out = checkpoint(run, *inputs, use_reentrant=False) if recompute else run(*inputs)
        out.sum().backward()
        grads.append([x.grad for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_torch_compile_takes_it_whole() -> None:
    case = Case((9, 4))
    q, k, v, pos_q, pos_k, row, head_scale = case.inputs()
    plan = plan_attention(*case.sides(), relative=case.codes(), causal=False, kernel="triton")
    positions = position_terms(pos_q, pos_k, case.heads, case.scale, plan)

    def run(q: Tensor) -> Tensor:
        return attention((q, k, v), plan, positions, row, head_scale, scale=case.scale, dropout=0.0) * 2

    torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(q), run(q))


def test_strided_views_of_one_projection_are_taken_as_they_are() -> None:
    case = Case((9, 4), positions=False)
    packed = torch.randn(13, 96, requires_grad=True)
    *_, row, head_scale = case.inputs()
    grads = []
    for contiguous in (False, True):
        packed.grad = None
        qkv = [x.contiguous() if contiguous else x for x in packed.chunk(3, 1)]
        case.run("triton", [*qkv, None, None, row, head_scale]).sum().backward()
        grads.append(packed.grad)
    assert torch.equal(*grads)


def test_a_plan_of_another_batch_is_refused() -> None:
    case = Case((3, 4))
    plan = plan_attention(*case.sides(), relative=None, causal=False, kernel="triton")
    x = torch.zeros(6, 32)
    with pytest.raises(ValueError, match="plan is for 7 queries"):
        attention((x, x, x), plan, (), None, torch.ones(2), scale=1.0, dropout=0.0)
    x = torch.zeros(7, 32)
    with pytest.raises(ValueError, match="relative"):
        attention((x, x, x), plan, (), torch.zeros(2, 5), torch.ones(2), scale=1.0, dropout=0.0)


def test_float64_is_refused_instead_of_rounded() -> None:
    with pytest.raises(ValueError, match="fp32.*'torch'"):
        Case((3,)).results("triton", torch.float64)


def test_unknown_kernels_are_named() -> None:
    with pytest.raises(ValueError, match="cuda.*auto, triton, torch"):
        plan_attention(*Case((3,)).sides(), relative=None, causal=False, kernel="cuda")


def test_the_cpu_runs_plain_torch_unless_told_otherwise() -> None:
    plan = plan_attention(*Case((3,)).sides(), relative=None, causal=False)
    assert not isinstance(plan, TritonPlan)

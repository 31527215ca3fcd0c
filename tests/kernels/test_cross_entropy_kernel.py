"""The vocabulary loss: both of its paths against all logits at once in fp64, and what they promise beside the numbers.

The Triton kernels run in its interpreter where there is no GPU; that rounds to bf16 by truncation, so that 16 bit means
fp16 here.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ofa_ds.train.criteria import Criterion, criterion_loss
from ofa_kernels import _cross_entropy_parts, cross_entropy
from ofa_kernels import cross_entropy_ops_triton as tiles
from ofa_kernels import cross_entropy_triton as kernels
from ofa_kernels._launch import interpreting
from ofa_kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # the interpreter's, of inf - inf

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
PAD = 1
PATHS = ["torch", "triton"]
CONSTRAINTS = ["none", "range", "mask", "one class"]
VOCAB, LIMIT_BYTES = 59457, 100e6


@dataclass(frozen=True)
class Problem:
    """Inputs of a loss. upstream: the gradient of each token's loss."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    smoothing: float
    token_weight: Tensor | None
    allowed: tuple[int, int] | Tensor | None
    upstream: Tensor

    def outcome(self, kernel: str, chunk: int | None = None, **changed: Any) -> tuple[Tensor, ...]:
        """loss, nll, correct, gradient of hidden, gradient of weight."""
        hidden, weight = (x.detach().clone().requires_grad_() for x in (self.hidden, self.weight))
        options = {"label_smoothing": self.smoothing, "token_weight_M": self.token_weight, "allowed": self.allowed}
        options |= {"ignore_index": PAD, "chunk": chunk, "kernel": kernel} | changed
        losses = linear_cross_entropy(hidden, weight, self.target, **options)
        return *losses, *torch.autograd.grad(losses[0], (hidden, weight), self.upstream.to(losses[0].dtype))

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """loss, nll, gradient of hidden, gradient of weight; the gradients by autograd."""
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        token_weight = None if self.token_weight is None else self.token_weight.to(dtype)
        loss, nll = (
            linear_cross_entropy_ref(hidden, weight, self.target, smoothing, PAD, token_weight, self.allowed)
            for smoothing in (self.smoothing, 0.0)
        )
        return loss.detach(), nll.detach(), *torch.autograd.grad(loss, (hidden, weight), self.upstream.to(dtype))

    def check(self, kernel: str, chunk: int | None = None) -> None:
        """Fail where a result of `kernel` is more than twice as far from the truth as plain torch's."""
        loss, nll, correct, *gradients = self.outcome(kernel, chunk)
        low, exact = self.reference(self.hidden.dtype), self.reference(torch.float64)
        for ours, plain, truth in zip((loss, nll, *gradients), low, exact, strict=True):
            if truth.numel():
                assert_as_accurate(ours, plain, truth)
        logits = (self.hidden @ self.weight.T).masked_fill(~self.allowed_mask(), -torch.inf)
        if self.target.numel():
            assert torch.equal(correct, (logits.argmax(-1) == self.target) & (self.target != PAD))

    def allowed_mask(self) -> Tensor:
        if isinstance(self.allowed, Tensor):
            return self.allowed
        mask = torch.ones(len(self.target), len(self.weight), dtype=torch.bool, device=DEVICE)
        if self.allowed is not None:
            mask[:, 4 : self.allowed[0]] = mask[:, self.allowed[1] :] = False
        return mask


def problem(
    num_tokens: int,
    vocab: int,
    dim: int = 5,
    *,
    constraint: str = "none",
    smoothing: float = 0.1,
    weighted: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Random, every fifth token ignored. `scale`: about the size of a logit."""
    random = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, dim, generator=random) for n in (num_tokens, vocab))
    target = torch.randint(vocab, (num_tokens,), generator=random)
    allowed: tuple[int, int] | Tensor | None = None
    if constraint == "range" and vocab > 4:
        start = int(torch.randint(4, vocab, (), generator=random))
        end = int(torch.randint(start + 1, vocab + 1, (), generator=random))
        allowed = (start, end)
        inside = start + target % (end - start)
        target = torch.where((target >= 4), inside, target)
    elif constraint in ("mask", "one class"):
        share = 0.0 if constraint == "one class" else 0.3
        allowed = torch.rand(num_tokens, vocab, generator=random) < share
        allowed[torch.arange(num_tokens), target] = True
        allowed[::5] = False  # a prompt position: nothing is allowed and nothing is asked
        allowed = allowed.to(DEVICE)
    target[::5] = PAD
    token_weight = torch.rand(num_tokens, generator=random).to(DEVICE) * 2 if weighted else None
    upstream = torch.rand(num_tokens, generator=random)
    tensors = (hidden * scale / dim**0.5, weight, target, upstream)
    hidden, weight, target, upstream = (x.to(DEVICE) for x in tensors)
    return Problem(hidden.to(dtype), weight.to(dtype), target, smoothing, token_weight, allowed, upstream)


@contextmanager
def small_tiles(columns: int, rows: int, item_bytes: int = 4) -> Iterator[None]:
    """Several tiles of the vocabulary and several blocks of a tile at the sizes of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_AND_SUM_BYTES", columns * max(rows, 1) * item_bytes)
        patch.setattr(kernels, "BLOCK", 512)
        yield


# ---------------------------------------------------------------- numbers


@pytest.mark.long
@settings(max_examples=800, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    num_tokens=st.integers(0, 12),
    vocab=st.integers(2, 700),
    dim=st.integers(1, 9),
    constraint=st.sampled_from(CONSTRAINTS),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    chunk=st.sampled_from([None, 1, 3, 5]),
    columns=st.sampled_from([320, 704]),
    seed=st.integers(0, 1000),
)
def test_the_kernel_is_as_accurate_as_plain_torch_at_any_shape(
    num_tokens: int, vocab: int, chunk: int | None, columns: int, **rest: Any
) -> None:
    with small_tiles(columns, chunk or num_tokens):
        problem(num_tokens, vocab, **rest).check("triton", chunk)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_torch_path_is_as_accurate_as_plain_torch(constraint: str, chunk: int | None, smoothing: float) -> None:
    problem(11, 301, constraint=constraint, smoothing=smoothing, weighted=True).check("torch", chunk)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_row_of_several_full_blocks_is_as_accurate_as_plain_torch(constraint: str) -> None:
    problem(3, 2 * kernels.BLOCK + 1, constraint=constraint).check("triton")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("columns", [192, 704])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_sixteen_bits_are_as_accurate_as_plain_torch_and_several_groups_add_up_in_fp32(
    constraint: str, columns: int, path: str
) -> None:
    example = problem(9, 333, 8, constraint=constraint, dtype=torch.float16)
    for chunk in (None, 4):
        with small_tiles(columns, chunk or 9, item_bytes=2):
            loss, *_, dhidden, dweight = example.outcome(path, chunk)
            exact, plain = example.reference(torch.float64), example.reference(torch.float16)
            assert (loss.dtype, dhidden.dtype, dweight.dtype) == (torch.float32, torch.float16, torch.float16)
            for ours, low, truth in zip(
                (loss, dhidden, dweight), plain[::2] + plain[3:], exact[::2] + exact[3:], strict=True
            ):
                if constraint == "one class":  # fp16 cannot hold eps_i there: the plain loss is not a number
                    low = truth
                assert_as_accurate(ours, low, truth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_logits_of_ten_thousand_keep_their_differences(constraint: str, path: str) -> None:
    """A common offset of 10,000 costs log-probabilities nothing: they are differences from the largest logit."""
    example = problem(6, 130, 4, constraint=constraint)
    small = example.outcome(path)
    for offset in (1e4, -1e4):
        with small_tiles(64, 6):
            steps = (example.weight * 4).round() / 4  # so that a sum with 10,000 is exact in fp32
            exact = Problem(
                torch.cat([(example.hidden * 4).round(), torch.ones(6, 1, device=DEVICE)], 1),
                torch.cat([steps, torch.full((130, 1), offset, device=DEVICE)], 1),
                example.target, 0.1, None, example.allowed, example.upstream,
            )  # fmt: skip
            loss, nll, _, *gradients = exact.outcome(path)
        truth = exact.reference(torch.float64)
        assert torch.allclose(loss.double(), truth[0], rtol=1e-5, atol=1e-5)
        assert torch.allclose(nll.double(), truth[1], rtol=1e-5, atol=1e-5)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert torch.allclose(gradients[0][:, :-1].double(), truth[2][:, :-1], rtol=1e-4, atol=1e-4)
    assert all(x.isfinite().all() for x in small)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_loss_and_nll_are_those_of_the_criterion_on_logits(constraint: str, path: str) -> None:
    example = problem(9, 50, constraint=constraint, dtype=torch.float64 if path == "torch" else torch.float32)
    conf = torch.tensor([0.3], device=DEVICE)
    loss, nll, correct, *_ = example.outcome(path, token_weight_M=conf.expand(9))
    criterion = Criterion(label_smoothing=0.1, constraint_range=example.allowed if constraint == "range" else None)
    mask = example.allowed[None] if isinstance(example.allowed, Tensor) else None
    logits = (example.hidden @ example.weight.T)[None]
    expected = criterion_loss(logits, example.target[None], criterion, conf_B=conf, constraint_mask_BLV=mask)
    assert torch.allclose(loss.sum(), expected.loss, rtol=1e-5)
    assert torch.allclose(nll.sum(), expected.nll, rtol=1e-5)
    assert correct.sum() == expected.num_correct


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_torch_path_has_the_gradient_that_differences_have(constraint: str, chunk: int | None) -> None:
    example = problem(6, 12, 3, constraint=constraint, weighted=True, dtype=torch.float64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, example.target, label_smoothing=0.1, token_weight_M=example.token_weight,
            allowed=example.allowed, chunk=chunk, kernel="torch",
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (example.hidden.requires_grad_(), example.weight.requires_grad_()))


@pytest.mark.parametrize("path", PATHS)
def test_a_row_with_one_allowed_class_has_loss_and_gradient_zero(path: str) -> None:
    loss, nll, _, dhidden, dweight = problem(6, 40, constraint="one class").outcome(path)
    assert not loss.any() and not nll.any()
    assert dhidden.abs().max() < 1e-6 and dweight.abs().max() < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_a_target_that_is_not_allowed_has_infinite_loss(path: str) -> None:
    example = problem(4, 40)
    loss, nll, correct, *_ = example.outcome(path, allowed=(38, 40), ignore_index=-1)
    forbidden = (example.target >= 4) & (example.target < 38)
    assert forbidden.any() and torch.equal(loss.isinf(), forbidden) and torch.equal(nll.isinf(), forbidden)
    assert not correct[forbidden].any()


@pytest.mark.parametrize("path", PATHS)
def test_a_batch_without_targets_has_zero_gradients(path: str) -> None:
    example = problem(6, 40)
    example.target.fill_(PAD)
    assert not any(x.any() for x in example.outcome(path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradient_that_is_asked_for_is_computed(needed: tuple[bool, bool], path: str) -> None:
    example = problem(6, 40)
    both = example.outcome(path)[3:]
    inputs = [x.clone().requires_grad_(need) for x, need in zip((example.hidden, example.weight), needed, strict=True)]
    loss, nll, correct = linear_cross_entropy(*inputs, example.target, label_smoothing=0.1, kernel=path)
    assert loss.requires_grad and not nll.requires_grad and not correct.requires_grad
    loss.backward(example.upstream)
    for x, gradient, need in zip(inputs, both, needed, strict=True):
        assert torch.equal(x.grad, gradient) if need else x.grad is None


@pytest.mark.parametrize("path", PATHS)
def test_twice_gives_the_same_bits(path: str) -> None:
    with small_tiles(192, 5):
        runs = [problem(7, 333, constraint="mask", weighted=True).outcome(path, 5) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_no_result_has_memory_in_it_that_was_not_written(constraint: str, chunk: int | None) -> None:
    """Torch fills what it allocates with NaN here, or with the largest number of a type."""
    example = problem(7, 333, constraint=constraint)
    with small_tiles(192, chunk or 7):
        clean = example.outcome("triton", chunk)
        torch.use_deterministic_algorithms(True)
        try:
            poisoned = example.outcome("triton", chunk)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("constraint", [kernels.NO_CONSTRAINT, kernels.RANGE, kernels.MASK])
def test_kernels_write_inside_their_outputs_only(constraint: int) -> None:
    rows, width, padded, stride, vocab, guard = 5, 71, 128, 192, 135, 77
    buffers = {
        "logits": torch.full((rows + 2, stride), float(guard)),
        "state": torch.full((rows + 2, kernels.STATE), float(guard)),
        "loss": torch.full((rows + 2,), float(guard)),
        "nll": torch.full((rows + 2,), float(guard)),
        "correct": torch.full((rows + 2,), guard, dtype=torch.uint8),
    }
    buffers = {name: x.to(DEVICE) for name, x in buffers.items()}
    inner = {name: x[1:-1] for name, x in buffers.items()}
    inner["logits"][:, :padded] = torch.randn(rows, padded, device=DEVICE)
    inner["state"][:] = torch.tensor([0.5, 64.0, 9.0, 0.1, 64.0], device=DEVICE)  # of the tile before
    target = torch.randint(64, vocab, (rows,), device=DEVICE)
    mask = torch.ones(rows, vocab, dtype=torch.uint8, device=DEVICE) if constraint == kernels.MASK else None
    numbers = (64, width, padded, stride, vocab, 5, vocab, 0.1, PAD, constraint)
    kernels.forward_kernel[(rows,)](
        inner["logits"],
        target,
        mask,
        inner["state"],
        inner["loss"],
        inner["nll"],
        inner["correct"],
        *numbers,
        BLOCK=256,
    )
    upstream = torch.ones(rows, device=DEVICE)
    kernels.backward_kernel[(rows, 1)](inner["logits"], target, upstream, mask, inner["state"], *numbers, BLOCK=256)
    for name, x in buffers.items():
        assert (x[0] == guard).all() and (x[-1] == guard).all(), name
        assert not (x[1:-1] == guard).all(), name
    assert (buffers["logits"][:, padded:] == guard).all()


class LiveBytes(TorchDispatchMode):
    """Most bytes that the tensors made under it had at once, but for those of the sizes `handed_back`."""

    def __init__(self, handed_back: Collection[int] = ()) -> None:
        super().__init__()
        self.handed_back = handed_back
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in known | self.live.keys():
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values() if size not in self.handed_back))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [768, 2560])
@pytest.mark.parametrize("num_tokens", [500, 1127, 6000, 16384])
def test_tiles_of_the_real_vocabulary_take_less_than_100_mb_beside_the_gradients(
    num_tokens: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the kernels runs, on tensors without data. A fp32 sum of the weight's gradient counts as that
    gradient; there is none where one group of tokens holds all of them."""
    monkeypatch.setattr(_cross_entropy_parts, "products_are_wide", lambda *_: False)  # else less memory is needed
    launches: list[int] = []
    monkeypatch.setattr(kernels, "forward_kernel", _Launches(launches))
    monkeypatch.setattr(kernels, "backward_kernel", _Launches(launches))
    rows, columns = tile = tiles.tile_shape(num_tokens, VOCAB, dim, dtype.itemsize, None)
    handed_back = {num_tokens * dim * dtype.itemsize, VOCAB * dim * (4 if num_tokens > rows else dtype.itemsize)}
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, dim, dtype=dtype) for n in (num_tokens, VOCAB))
        target, upstream = torch.empty(num_tokens, dtype=torch.int64), torch.empty(num_tokens)
        with LiveBytes(handed_back | {weight.nbytes}) as memory:
            *_, state, buffer = tiles._forward(hidden, weight, target, None, [], 0.1, PAD, list(tile), dtype)
            tiles._backward(upstream, hidden, weight, target, None, state, buffer, [], 0.1, PAD, True, True)
    assert len(launches) == 2 * -(-num_tokens // rows) * -(-VOCAB // columns)
    assert memory.peak <= LIMIT_BYTES
    if num_tokens == 16384:
        assert memory.peak >= 0.5 * LIMIT_BYTES  # and it uses what it may


@pytest.mark.parametrize(
    "num_tokens, gigabytes, products",
    [(1127, 40, 3), (1127, 80, 3), (2600, 80, 3), (4096, 141, 3), (4096, 80, 3.5), (1127, 0, 3.5), (16384, 141, 3.98)],
)
def test_logits_are_computed_once_where_a_small_part_of_the_gpu_holds_them(
    num_tokens: int, gigabytes: int, products: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,127: the targets of one pretraining micro-batch. Counted as in the test above, with the products of OFA 6B."""
    monkeypatch.setattr(kernels, "forward_kernel", _Launches([]))
    monkeypatch.setattr(kernels, "backward_kernel", _Launches([]))
    monkeypatch.setattr(_cross_entropy_parts, "products_are_wide", lambda *_: False)
    dim, budget = 2560, gigabytes * 10**9 // tiles.DEVICE_SHARE
    tile = list(tiles.tile_shape(num_tokens, VOCAB, dim, 2, None, budget))
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, dim, dtype=torch.bfloat16) for n in (num_tokens, VOCAB))
        target, upstream = torch.empty(num_tokens, dtype=torch.int64), torch.empty(num_tokens)
        handed_back = {hidden.nbytes, weight.nbytes, 2 * weight.nbytes * (num_tokens > tile[0])}
        with LiveBytes(handed_back) as memory, FlopCounterMode(display=False) as flops:
            *_, state, buffer = tiles._forward(hidden, weight, target, None, [], 0.1, PAD, tile, torch.bfloat16)
            tiles._backward(upstream, hidden, weight, target, None, state, buffer, [], 0.1, PAD, True, True)
    assert flops.get_total_flops() / (2 * num_tokens * dim * VOCAB) == pytest.approx(products, abs=0.01)
    assert memory.peak <= max(LIMIT_BYTES, budget + 16e6)


def test_the_memory_of_a_gpu_decides_the_tiles_and_not_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory differs between runs, and the tiles decide the order of sums."""
    properties = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: pytest.fail("free memory was asked for"))
    tiles._device_budget.cache_clear()
    assert tiles._device_budget(torch.device("cuda", 0)) == 320 * 2**20
    assert tiles._device_budget(torch.device("cpu")) == 0
    tiles._device_budget.cache_clear()


class _Launches:
    """A kernel that only counts."""

    def __init__(self, launches: list[int]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: self.launches.append(grid[0])


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_of_the_torch_path_does_not_grow_with_the_tokens(
    dtype: torch.dtype, constraint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a thousandth of the size; by proportion the real limits give less than 100 MB."""
    vocab, dim, scale = 640, 4, 1000
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", cross_entropy.CHUNK_ELEMENTS // scale)
    monkeypatch.setattr(_cross_entropy_parts, "PART_ELEMENTS", _cross_entropy_parts.PART_ELEMENTS // scale)
    peaks = []
    for num_tokens in (160, 320):
        example = problem(num_tokens, vocab, dim, constraint=constraint, dtype=dtype)
        with LiveBytes() as memory:
            *_, dhidden, dweight = example.outcome("torch")
        copies = example.hidden.nbytes + example.weight.nbytes  # the leaves
        wide = dweight.numel() * 4 if dtype == torch.float16 else 0
        peaks.append(memory.peak - copies - dhidden.nbytes - dweight.nbytes - wide)
    small, large = peaks
    per_token = (large - small) / 160
    assert per_token <= 64, "a few numbers per token"
    assert large - 320 * per_token <= LIMIT_BYTES / scale


# ---------------------------------------------------------------- surroundings


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("chunk", [None, 4])
def test_the_weight_may_be_gone_between_forward_and_backward(chunk: int | None, path: str) -> None:
    """As under ZeRO-3, which empties a parameter behind its module and gathers it again for the backward."""
    example = problem(11, 70)
    expected = example.outcome(path, chunk)
    hidden, weight = example.hidden.clone().requires_grad_(), torch.nn.Parameter(example.weight.clone())
    loss, *_ = linear_cross_entropy(hidden, weight, example.target, label_smoothing=0.1, chunk=chunk, kernel=path)
    gathered = weight.data
    weight.data = torch.empty(0, device=DEVICE)
    upstream = example.upstream
    weight.data = gathered.clone()
    gathered.fill_(torch.nan)
    loss.backward(upstream)
    assert torch.equal(hidden.grad, expected[3]) and torch.equal(weight.grad, expected[4])


@pytest.mark.parametrize("path", PATHS)
def test_checkpointing_changes_no_bit(path: str) -> None:
    example = problem(11, 70, constraint="mask")
    expected = example.outcome(path)
    hidden, weight = (x.clone().requires_grad_() for x in (example.hidden, example.weight))
    options = {"label_smoothing": 0.1, "allowed": example.allowed, "kernel": path}
    loss, *_ = checkpoint(linear_cross_entropy, hidden, weight, example.target, **options, use_reentrant=False)
    loss.backward(example.upstream)
    assert torch.equal(hidden.grad, expected[3]) and torch.equal(weight.grad, expected[4])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("constraint", ["none", "range", "mask"])
def test_compiled_code_gives_the_same_numbers(constraint: str, path: str) -> None:
    torch._dynamo.reset()
    example = problem(11, 70, constraint=constraint)
    expected = example.outcome(path)
    hidden, weight = (x.clone().requires_grad_() for x in (example.hidden, example.weight))

    @torch.compile(backend="aot_eager", fullgraph=path == "triton")
    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        losses = linear_cross_entropy(
            hidden * 1.0, weight, example.target, label_smoothing=0.1, allowed=example.allowed, kernel=path
        )
        return (losses[0] * example.upstream).sum()

    loss = total(hidden, weight)
    loss.backward()
    assert torch.allclose(loss.detach(), (expected[0] * example.upstream).sum())
    assert torch.allclose(hidden.grad, expected[3]) and torch.allclose(weight.grad, expected[4])


@pytest.mark.parametrize("constraint", ["none", "range", "mask"])
def test_the_operators_are_registered_as_torch_wants_them(constraint: str) -> None:
    example = problem(5, 70, constraint=constraint)
    mask = example.allowed if isinstance(example.allowed, Tensor) else None
    id_range = list(example.allowed) if isinstance(example.allowed, tuple) else []
    tensors = (example.hidden.requires_grad_(), example.weight.requires_grad_(), example.target, mask)
    forward = (*tensors, id_range, 0.1, PAD, [5, 128], torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(tiles._forward_op, forward, test_utils=checks)
    with torch.no_grad():
        *_, state, buffer = tiles._forward_op(*forward)
    backward = (example.upstream, *(x if x is None else x.detach() for x in tensors), state, buffer, id_range)
    torch.library.opcheck(tiles._backward_op, (*backward, 0.1, PAD, True, True), test_utils=checks)


@pytest.mark.parametrize("path", PATHS)
def test_under_autocast_the_products_are_16_bit_and_gradients_have_the_type_of_their_tensor(path: str) -> None:
    example = problem(11, 70, constraint="range")
    half = Problem(
        example.hidden.half(), example.weight.half(), example.target, 0.1, None, example.allowed, example.upstream
    )
    expected = half.outcome(path)
    with torch.autocast(DEVICE, dtype=torch.float16):
        ours = example.outcome(path)
    assert torch.equal(ours[0], expected[0])
    assert [x.dtype for x in ours[3:]] == [torch.float32] * 2
    for gradient, low in zip(ours[3:], expected[3:], strict=True):
        assert torch.allclose(gradient, low.float(), rtol=1e-2, atol=1e-3)


def test_a_second_backward_through_an_overwritten_tile_is_refused() -> None:
    example = problem(5, 70)
    loss = linear_cross_entropy(example.hidden.requires_grad_(), example.weight, example.target, kernel="triton")[0]
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"allowed": (3, 9)}, r"range 3,9: want 4 <= start < end <= 40"),
        ({"allowed": (9, 9)}, r"range 9,9: want 4 <= start < end <= 40"),
        ({"allowed": (9, 41)}, r"range 9,41: want 4 <= start < end <= 40"),
        ({"allowed": torch.ones(4, 39, dtype=torch.bool)}, r"bool \[4, 40\], got torch.bool \(4, 39\)"),
        ({"allowed": torch.ones(4, 40)}, r"bool \[4, 40\], got torch.float32 \(4, 40\)"),
        ({"token_weight_M": torch.ones(3)}, r"want a weight for each of 4 tokens, got \(3,\)"),
        ({"kernel": "cuda"}, r"kernel 'cuda': want one of auto, triton, torch"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_wanted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem(4, 40).outcome(**({"kernel": "torch"} | options))


def test_the_kernel_refuses_float64_and_auto_takes_torch_for_it() -> None:
    example = problem(4, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match="computes in fp32; for float64 choose 'torch'"):
        example.outcome("triton")
    assert torch.equal(example.outcome("auto")[0], example.outcome("torch")[0])

"""The chunked vocabulary loss against all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_as_accurate, assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ofa_kernels import cross_entropy
from ofa_kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref

PAD = 1


def problem(num_tokens: int, dim: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, dim, dtype=dtype, requires_grad=True) for n in (num_tokens, vocab))
    target = torch.randint(vocab, (num_tokens,))
    target[::5] = PAD
    return hidden, weight, target


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 4, 23, None])
@pytest.mark.parametrize("num_tokens, vocab", [(1, 2), (23, 50), (40, 301)])
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    num_tokens: int, vocab: int, chunk: int, smoothing: float
) -> None:
    hidden, weight, target = problem(num_tokens, 7, vocab, torch.float64)
    loss, nll, correct = linear_cross_entropy(
        hidden, weight, target, label_smoothing=smoothing, ignore_index=PAD, chunk=chunk
    )
    expected = linear_cross_entropy_ref(hidden, weight, target, smoothing, PAD)
    assert_close(loss, expected.detach(), 1e-13, "loss")
    assert_close(nll, linear_cross_entropy_ref(hidden, weight, target, 0.0, PAD).detach(), 1e-13, "nll")
    hit = (hidden @ weight.T).argmax(-1) == target
    assert torch.equal(correct, hit & (target != PAD))
    upstream = torch.randn_like(loss)
    ours, theirs = (torch.autograd.grad(out, (hidden, weight), upstream) for out in (loss, expected))
    for name, a, b in zip(("hidden", "weight"), ours, theirs, strict=True):
        assert_close(a, b, 1e-12, f"gradient of {name}", floor=1e-12)


def test_a_batch_without_targets_has_zero_gradients() -> None:
    hidden, weight, target = problem(6, 4, 9, torch.float32)
    loss, _, correct = linear_cross_entropy(hidden, weight, torch.full_like(target, PAD))
    loss.sum().backward()
    assert not loss.any() and not correct.any()
    assert not hidden.grad.any() and not weight.grad.any()


class LargestLogits(TorchDispatchMode):
    """Most rows that any tensor of `vocab` columns had."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == self.vocab:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_no_more_rows_of_logits_exist_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = problem(40, 4, 64, torch.float32)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 64 * 7)
    with LargestLogits(vocab=64) as largest:
        linear_cross_entropy(hidden, weight, target)[0].sum().backward()
    assert largest.rows == 7


def test_low_precision_is_as_good_as_plain_torch() -> None:
    hidden, weight, target = problem(40, 16, 500, torch.float64)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    exact = linear_cross_entropy_ref(*(x.detach().double() for x in low), target, 0.1, PAD)
    plain = linear_cross_entropy_ref(*low, target, 0.1, PAD)
    loss, _, _ = linear_cross_entropy(*low, target, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert_as_accurate(loss.detach(), plain.detach(), exact)


def test_wrong_shapes_are_named() -> None:
    hidden, weight, target = problem(5, 4, 9, torch.float32)
    with pytest.raises(ValueError, match=r"got \(5, 4\), \(9, 4\), \(4,\)"):
        linear_cross_entropy(hidden, weight, target[:4])

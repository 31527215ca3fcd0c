"""The speed benchmark compares like with like: every contender gives the result and the gradients that ours gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "kernels"
sys.path.insert(0, str(KERNELS))

import contenders  # noqa: E402

LIKE = torch.zeros((), dtype=torch.float64)
SELF, CROSS = [(7, 7), (1, 1), (4, 4)], [(3, 7), (5, 2), (1, 4)]


def agree(found: list[contenders.Contender], shared: int) -> None:
    """shared: how many leaves at the end have the same layout for all."""
    ours, *others = found
    assert others
    results = []
    for contender in found:
        out = contender.run()
        packed = contender.packed(out)
        weight = torch.linspace(-1, 1, packed.numel(), dtype=LIKE.dtype).view(packed.shape)
        grads = torch.autograd.grad((packed * weight).sum(), contender.leaves[len(contender.leaves) - shared :])
        results.append((packed, *grads))
    for contender, values in zip(others, results[1:], strict=True):
        for value, want in zip(values, results[0], strict=True):
            torch.testing.assert_close(value.to(want.dtype), want, rtol=1e-9, atol=1e-9, msg=contender.name)


@pytest.mark.parametrize("examples, causal, shared", [(SELF, False, 4), (SELF, True, 4), (CROSS, False, 3)])
def test_attentions_agree(monkeypatch, examples, causal, shared):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # the alternatives' own casts, in fp64 here
    agree(contenders.attentions(2, 8, examples, causal=causal, like=LIKE), shared)


@pytest.mark.parametrize("kind, shared", [("norm", 3), ("gelu + norm", 3), ("residual + norm", 4)])
def test_norms_agree(kind, shared):
    agree(contenders.norms(kind, 5, 24, LIKE), shared)


def test_losses_agree(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    agree(contenders.losses(9, 16, 40, LIKE), 2)


def test_the_benchmark_runs_on_a_cpu_and_says_what_it_measured():
    command = [sys.executable, str(KERNELS / "bench.py"), "--device", "cpu", "--small", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["contender"] for row in rows} >= {"ofa-ds", "eager", "sdpa, dense bias", "torch"}
    assert len({row["operator"] for row in rows}) == 7
    assert all(0 < row["forward_us"][0] <= row["forward_us"][1] <= row["forward_us"][2] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_what_needs_none():
    done = subprocess.run([sys.executable, str(KERNELS / "bench.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--compile and --roofline need none" in done.stderr

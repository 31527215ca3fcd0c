"""What was recorded of the checkpoint in tests/fixtures, and whether this machine computes the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_0f884a0"


def recorded() -> dict[str, Any]:
    """Of the code that wrote it: `evaluate` and `evaluate_ema` per task, `steps` 5 and 6, and `arithmetic`."""
    return json.loads((FIXTURE / "recorded.json").read_text(encoding="utf-8"))


def arithmetic() -> str:
    """Digest of a few steps of a model's kinds of layers: equal where torch and the processor round alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks of a run have
    try:
        return _digest_of_steps()
    finally:
        torch.set_num_threads(threads)


def _digest_of_steps() -> str:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
    layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 497))
    stem = nn.Conv2d(3, 8, 3, stride=2)
    parameters = [*attention.parameters(), *layers.parameters(), *stem.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    for rows in (7, 24, 65):
        x_BSD = torch.randn(rows, 13, 16)
        x_BSD, _ = attention(x_BSD, x_BSD, x_BSD)
        loss = -layers(x_BSD).log_softmax(-1)[..., 3].mean() + stem(torch.randn(rows, 3, 64, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return xxhash.xxh3_128_hexdigest(b"".join(each.detach().numpy().tobytes() for each in parameters))

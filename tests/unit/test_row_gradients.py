"""Rows that several tokens read: their gradient is a sum, which atomics would add in another order on every run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ofa_ds.batch import Batch, pack
from ofa_ds.data.example import Example
from ofa_ds.model.config import ModelConfig, preset
from ofa_ds.model.layers import rows_of
from ofa_ds.model.ofa import OFA

SIZES = {"vocab_size": 120, "dim": 16, "ffn_dim": 32, "num_heads": 2}
PRETRAINED = preset("nano", **SIZES)
ENTANGLED = dataclasses.replace(
    PRETRAINED, use_ofasys=True, share_attn_bias=True, entangle_position_embedding=True, disable_entangle=False
)


class Additions(TorchDispatchMode):
    """Names of operations that add rows by index, where one index is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "index_add" in func.name() and len(args[2].unique()) < len(args[2]):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def batch(config: ModelConfig) -> Batch:
    """Three examples of one picture and a text, of which all positions are the same."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    examples = []
    for image in (picture, picture, picture, None):
        ids = rng.integers(4, 120, 5)
        prev = np.concatenate([[0], ids[:-1]])
        examples.append(Example(task="caption", source=ids, target=ids, prev=prev, image=image))
    return pack(examples, [(32, 32)], config.patch_size, config.image_bucket_size)


def runs(batch: Batch) -> Batch:
    """Two runs of the decoder read the first example, and none the last."""
    return dataclasses.replace(batch, encoder_of=torch.tensor([0, 0, 1, 2]))


@pytest.mark.parametrize("config", [PRETRAINED, ENTANGLED], ids=["pretraining", "entangled"])
@pytest.mark.parametrize("several_runs", [False, True], ids=["own memory", "shared memory"])
def test_no_gradient_of_a_shared_row_is_left_to_atomics(config: ModelConfig, several_runs: bool) -> None:
    packed = batch(config)
    loss = OFA(config)(runs(packed) if several_runs else packed)[0].sum()
    with Additions() as additions:
        loss.backward()
    assert additions.found == []


@pytest.mark.parametrize("index", [[2, 0, 2, 2], []])
def test_rows_and_their_gradient_are_those_of_index_select(index: list[int]) -> None:
    x, index_M = torch.randn(3, 4, requires_grad=True, dtype=torch.float64), torch.tensor(index, dtype=torch.int64)
    weights = torch.arange(4.0 * len(index), dtype=torch.float64).view(-1, 4)
    ours, theirs = rows_of(x, index_M), x.index_select(0, index_M)
    assert torch.equal(ours, theirs)
    (ours_grad,) = torch.autograd.grad((ours * weights).sum(), x)
    (theirs_grad,) = torch.autograd.grad((theirs * weights).sum(), x)
    assert torch.equal(ours_grad, theirs_grad)

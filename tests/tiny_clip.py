"""A CLIP of random weights in a file, small enough for a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ofa_ds.vision.clip import new_model
from ofa_ds.vision.clip_files import ClipSizes

SIZES = ClipSizes(
    embed_dim=16, image_size=32, patch_size=16, vision_width=64, vision_layers=1, context_length=77, vocab_size=49408,
    text_width=64, text_layers=1,
)  # fmt: skip


def tiny_clip(path: Path) -> Path:
    """A test that asks for one is left out where open_clip is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("CLIP needs open_clip")
    torch.manual_seed(0)
    save_file({name: 0.1 * torch.randn(value.shape) for name, value in new_model(SIZES).state_dict().items()}, path)
    return path

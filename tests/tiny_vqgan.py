"""A VQGAN of random weights, 8 pixels a code as rows of OFA have, small enough for a test."""

from __future__ import annotations

from pathlib import Path

import torch

from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.files import save_vqgan
from ofa_ds.vision.vqgan import Vqgan

CONFIG = VqganConfig(
    n_embed=128, embed_dim=16, z_channels=16, resolution=64, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1,
    attn_resolutions=(),
)  # fmt: skip


def tiny_vqgan(folder: Path) -> Path:
    torch.manual_seed(0)
    save_vqgan(Vqgan(CONFIG), folder)
    return folder

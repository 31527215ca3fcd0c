"""The ResNet and ViT backbones against feature maps of the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter import load, stored_arrays, stored_weights
from numerics import assert_close

from ofa_ds.model.resnet import BatchNorm, ResNet
from ofa_ds.model.vit import ViT

PREFIX = "encoder.embed_images."
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
RESNETS, VITS = "resnet_full_by_rule.npz", "vit_backbone_only.npz"


@pytest.mark.golden(RESNETS)
@pytest.mark.parametrize(
    "name, batch_norm",
    [("resnet18", "frozen"), ("resnet18", "sync"), *((f"resnet{n}", "batch") for n in (18, 50, 101, 152))],
)
def test_resnet_gives_the_features_of_the_original(name: str, batch_norm: str, golden_dir: Path) -> None:
    arrays = stored_arrays(golden_dir / RESNETS)
    model = ResNet(arrays[f"layers/{name}"].tolist(), batch_norm=batch_norm).eval()
    load(model, None, "embed_images.".__add__)
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.eps = 1e-5  # the fixture was made without synchronisation
    image = torch.from_numpy(arrays["in/image"])
    for dtype, tolerance in TOLERANCE.items():
        out = model.to(dtype)(image.to(dtype), torch.ones(1))
        assert_close(out, arrays[f"out/{name}"], tolerance, f"{name} {dtype}")


@pytest.mark.golden(VITS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_vit_gives_the_features_of_the_original_at_every_size(dtype: torch.dtype, golden_dir: Path) -> None:
    arrays = stored_arrays(golden_dir / VITS)
    model = ViT(224, 16, 32, 2, 4).to(dtype).eval()
    load(model, stored_weights(golden_dir, "micro_vit_state.npz"), PREFIX.__add__)
    sizes = [key.removeprefix("out/") for key in arrays if key.startswith("out/")]
    assert sizes
    for size in sizes:
        image = arrays[f"in/{size}"]
        if not image.size:
            height, width = (int(side) for side in size.split("x"))
            noise = np.random.RandomState(int(arrays[f"in_seed/{size}"])).standard_normal((1, 3, height, width))
            image = noise.astype(np.float32)
        out = model(torch.from_numpy(image).to(dtype), torch.ones(image.shape[0]))
        assert_close(out, arrays[f"out/{size}"], TOLERANCE[dtype], size)

"""The ResNet and ViT backbones against feature maps of the original."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ofa_ds.model.resnet import BatchNorm, ResNet
from ofa_ds.model.vit import ViT

PREFIX = "encoder.embed_images."
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
NORMS = ("bn1", "bn2", "bn3", "downsample.1", "ln_1", "ln_2", "ln_pre")


def rule_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that the golden README documents for a backbone tensor of this name, float32."""
    z = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith("running_var"):
        value = 1 + 0.25 * np.abs(z)
    elif name.endswith(("running_mean", "bias")):
        value = 0.1 * z
    elif any(norm in name for norm in NORMS):
        value = 1 + 0.1 * z
    elif len(shape) == 4:
        value = z * np.sqrt(2 / np.prod(shape[1:]))
    else:
        value = 0.5 * z
    return torch.from_numpy(value.astype(np.float32))


def fixture(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of a fixture file; the test is skipped where this set of fixtures has no such file."""
    path = folder / name
    if not path.is_file():
        pytest.skip(f"{folder} has no {name}")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def relative_error(out: Tensor, expected: np.ndarray) -> float:
    exact = torch.from_numpy(expected).double()
    assert out.shape == exact.shape
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    "name, batch_norm",
    [("resnet18", "frozen"), ("resnet18", "sync"), *((f"resnet{n}", "batch") for n in (18, 50, 101, 152))],
)
def test_resnet_gives_the_features_of_the_original(name: str, batch_norm: str, golden_dir: Path) -> None:
    arrays = fixture(golden_dir, "resnet_full_by_rule.npz")
    model = ResNet(arrays[f"layers/{name}"].tolist(), batch_norm=batch_norm).eval()
    for key, value in model.state_dict(keep_vars=True).items():
        if "num_batches_tracked" not in key:
            value.data.copy_(rule_value(f"embed_images.{key}", tuple(value.shape)))
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.eps = 1e-5  # the fixture was made without synchronisation
    image = torch.from_numpy(arrays["in/image"])
    for dtype, tolerance in TOLERANCE.items():
        out = model.to(dtype)(image.to(dtype), torch.ones(1))
        assert relative_error(out, arrays[f"out/{name}"]) <= tolerance, dtype


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_vit_gives_the_features_of_the_original_at_every_size(dtype: torch.dtype, golden_dir: Path) -> None:
    arrays = fixture(golden_dir, "vit_backbone_only.npz")
    model = ViT(224, 16, 32, 2, 4).eval()
    stored = golden_dir / "micro_vit_state.npz"
    state = fixture(golden_dir, stored.name) if stored.is_file() else {}
    for key, value in model.named_parameters():
        weight = state.get(PREFIX + key)
        value.data.copy_(rule_value(PREFIX + key, tuple(value.shape)) if weight is None else torch.from_numpy(weight))
    model.to(dtype)
    sizes = [key.removeprefix("out/") for key in arrays if key.startswith("out/")]
    assert sizes
    for size in sizes:
        image = arrays[f"in/{size}"]
        if not image.size:
            height, width = (int(side) for side in size.split("x"))
            noise = np.random.RandomState(int(arrays[f"in_seed/{size}"])).standard_normal((1, 3, height, width))
            image = noise.astype(np.float32)
        out = model(torch.from_numpy(image).to(dtype), torch.ones(image.shape[0]))
        assert relative_error(out, arrays[f"out/{size}"]) <= TOLERANCE[dtype], size

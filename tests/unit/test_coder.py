"""Pictures to codes and back: the same by whatever batch, as the original does it, and nothing that does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ofa_ds.vision import coder as coder_module
from ofa_ds.vision.coder import Coder, load_coder
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.files import save_vqgan
from ofa_ds.vision.pixels import to_input, to_picture
from ofa_ds.vision.vqgan import Vqgan

CONFIG = VqganConfig(
    n_embed=64, embed_dim=16, z_channels=16, resolution=16, ch=32, ch_mult=(1, 2), num_res_blocks=1,
    attn_resolutions=(8,),
)  # fmt: skip


@pytest.fixture
def model() -> Vqgan:
    torch.manual_seed(0)
    return Vqgan(CONFIG).eval()


@pytest.fixture
def coder(model: Vqgan) -> Coder:
    return Coder(model, 16)


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def alike(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_codes_and_pictures_are_those_of_the_model(coder: Coder, model: Vqgan) -> None:
    (picture,) = pictures((16, 16))
    (codes,) = coder.encode([picture])
    wanted = model.encode(to_input(picture, 16)[None])[0]
    assert codes.dtype == np.int64 and np.array_equal(codes, wanted.numpy())
    assert len(np.unique(codes)) > 4
    (painted,) = coder.paint([codes])
    assert painted.dtype == np.uint8 and np.array_equal(painted, to_picture(model.decode(wanted[None])[0]))


@pytest.mark.parametrize("batch", [None, 3])
def test_the_company_of_a_picture_changes_nothing(coder: Coder, batch: int | None, monkeypatch) -> None:
    if batch:  # as on a GPU
        monkeypatch.setattr(coder_module, "GPU_BATCH", batch)
        coder.device = torch.device("meta")
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    given = pictures((16, 16), (16, 24), (16, 16), (40, 32), (16, 16), (16, 24), (16, 16))
    together = coder.encode(given)
    assert alike(together, [coder.encode([each])[0] for each in given])
    assert alike(together[::-1], coder.encode(given[::-1]))
    assert alike(coder.paint(together), [coder.paint([each])[0] for each in together])
    assert coder.encode([]) == [] and coder.paint([]) == []


def test_the_shorter_side_is_resized_and_nothing_is_cropped(coder: Coder) -> None:
    shapes = [codes.shape for codes in coder.encode(pictures((32, 48), (8, 21), (16, 17)))]
    assert shapes == [(8, 12), (8, 21), (8, 8)]  # of 16 x 42 and 16 x 17 pixels: as many codes as are whole
    assert [each.shape for each in coder.paint([np.zeros((8, 12), int), np.zeros(64, int)])] == [
        (16, 24, 3),
        (16, 16, 3),
    ]


def test_codes_that_fit_nothing_are_refused(coder: Coder) -> None:
    good = np.zeros((8, 8), np.int64)
    for bad, message in [
        (np.zeros(63, int), "codes 1: want 64, 8 x 8 of a picture of 16 pixels, got 63"),
        (np.zeros((4, 16), int), "codes 1: want 64, 8 x 8 .* got 4 x 16"),
        (np.zeros((8, 0), int), "codes 1: want 64"),
        (good - 1, "codes 1: want 0 ... 63 of the codebook, got -1"),
        (good + 64, "codes 1: want 0 ... 63 of the codebook, got 64"),
        (good / 1.0, "codes 1: want whole numbers, got float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            coder.paint([good, bad])


def test_pictures_that_fit_nothing_are_refused(coder: Coder, model: Vqgan) -> None:
    (good,) = pictures((16, 16))
    for bad, message in [
        (good[:1], "picture 1: 16 x 1 pixels are less than one code's, 2 x 2"),
        (good[..., :1], r"picture 1: want uint8 \[H, W, 3\], got uint8 \[16, 16, 1\]"),
        (good / 255, "picture 1: want uint8"),
        (np.zeros((2, 201, 3), np.uint8), "picture 1: 201 x 2: one side is more than 100 times the other"),
    ]:
        with pytest.raises(ValueError, match=message):
            coder.encode([good, bad])
    with pytest.raises(
        ValueError, match="code_image_size: want a multiple of 2 pixels, one code's of this VQGAN, got 7"
    ):
        Coder(model, 7)


def test_weights_that_overflow_give_no_codes_and_no_grey(coder: Coder, model: Vqgan) -> None:
    with torch.no_grad():
        model.encoder.conv_in.weight.fill_(3e38)
        model.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(ValueError, match="not all finite"):
        coder.encode(pictures((16, 16)))
    with pytest.raises(ValueError, match="not finite"):
        coder.paint([np.zeros((8, 8), int)])


def test_a_directory_is_opened_at_its_own_resolution(model: Vqgan, tmp_path: Path) -> None:
    save_vqgan(model, tmp_path / "own")
    coder = load_coder(tmp_path / "own")
    assert (coder.code_image_size, coder.pixels_per_code, coder.num_codes) == (16, 2, 64)
    assert load_coder(tmp_path / "own", code_image_size=8).side == 4
    model.quant_conv.bias.data[0] = torch.nan
    save_vqgan(model, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"vqgan.safetensors: quant_conv.bias: has values that are not finite"):
        load_coder(tmp_path / "nan")

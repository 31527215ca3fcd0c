"""Image codes against what taming-transformers computed: every stage, the codes, the losses and their gradients."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_close
from torch import Tensor

from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.pixels import to_input, to_picture
from ofa_ds.vision.vqgan import Vqgan

FULL, PIXELS = "vqgan/fullcfg_gumbel_f8_8192.npz", "vqgan/pre_post_processing.npz"
NOT_MICRO = ("fullcfg_gumbel_f8_8192", "pre_post_processing", "perceptual_gan_losses")


def config_of(recorded: dict) -> VqganConfig:
    sizes = recorded["dd"] | {key: tuple(recorded["dd"][key]) for key in ("ch_mult", "attn_resolutions")}
    assert sizes.pop("double_z") is False
    return VqganConfig(
        quantizer=recorded["kind"], n_embed=recorded["n_embed"], embed_dim=recorded["embed_dim"], **sizes
    )


def by_rule(model: Vqgan) -> Vqgan:
    """The fixtures' weights (README-more.md of the full set, Precision and weights)."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
            z = np.random.RandomState(seed).standard_normal(tuple(value.shape))
            if z.ndim == 4:
                z = z * np.sqrt(2 / np.prod(z.shape[1:]))
            elif name.endswith("weight") and "norm" in name:
                z = 1 + 0.1 * z
            elif name.endswith("bias"):
                z = 0.1 * z
            value.copy_(torch.from_numpy(z.astype(np.float32)))
    return model


def opened(file: Path) -> tuple[dict[str, np.ndarray], VqganConfig]:
    with np.load(file, allow_pickle=False) as found:
        arrays = {key: found[key] for key in found.files}
    return arrays, config_of(json.loads(str(arrays["meta"]))["config"])


@pytest.mark.golden("vqgan/*.npz", without=NOT_MICRO)
def test_every_stage_and_every_code_is_the_original_s(golden_file: Path) -> None:
    arrays, config = opened(golden_file)
    model = by_rule(Vqgan(config)).eval()
    image = torch.from_numpy(arrays["in/image"])
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model.to(dtype)
        with torch.no_grad():
            encoded = model.encoder(image.to(dtype))
            h = model.quant_conv(encoded)
            codes = model.encode(image.to(dtype))
            vectors = model.quantize.rows[codes].permute(0, 3, 1, 2)
            painted = model.decode(codes)
        name = "codes_argmax" if config.quantizer == "gumbel" else "codes"
        assert (codes.numpy() == arrays[f"out/{name}"]).all()
        stages = {"encoder_out": encoded, "quant_conv_out": h, "codebook_entries": vectors}
        stages |= {"post_quant_conv_out": model.post_quant_conv(vectors)}
        stages |= {"dec_from_codes" + "_argmax" * (config.quantizer == "gumbel"): painted}
        if config.quantizer == "gumbel":
            stages["logits"] = model.quantize.proj(h)
        for stage, value in stages.items():
            assert_close(value.detach(), arrays[f"out/{stage}"], tolerance, f"{stage} {dtype}")
    for k, picture in enumerate(painted):
        assert (to_picture(picture) == arrays["out/dec_uint8"][k]).all()


def losses(model: Vqgan, image: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    painted, quantized = model(image, noise)
    rec_loss = (image - painted).abs().mean()
    return rec_loss, quantized.loss, painted


@pytest.mark.golden("vqgan/*.npz", without=NOT_MICRO)
def test_losses_and_every_gradient_are_the_original_s(golden_file: Path) -> None:
    arrays, config = opened(golden_file)
    noise = torch.from_numpy(arrays["in/gumbel_noise"]) if config.quantizer == "gumbel" else None
    tags = {key.split("/")[1] for key in arrays if key.startswith("train/")}
    assert tags
    for tag in sorted(tags):
        model = by_rule(Vqgan(config)).double().train()
        if config.quantizer == "gumbel":
            temperature, kl_weight = tag.removeprefix("tau").split("_kl")
            model.quantize.temperature, model.quantize.kl_weight = float(temperature), float(kl_weight)
        else:
            model.quantize.legacy = tag == "legacy_true"
        rec_loss, quant_loss, painted = losses(model, torch.from_numpy(arrays["in/image"]).double(), noise)
        (rec_loss + quant_loss).backward()
        found = {"rec_loss": rec_loss, "quant_loss": quant_loss, "total": rec_loss + quant_loss, "xrec": painted}
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        found |= {f"grad/{name}": value for name, value in gradients.items()}
        found |= {f"gradnorm/{name}": value.norm() for name, value in gradients.items()}
        wanted = [key for key in arrays if key.startswith(f"train/{tag}/")]
        for key in wanted:
            # A bias before a norm of one channel a group has no gradient: what is left is rounding.
            assert_close(found[key.removeprefix(f"train/{tag}/")].detach(), arrays[key], 1e-9, key, floor=1e-6)


@pytest.mark.golden(FULL)
def test_the_released_size_gives_the_original_s_codes_and_picture(golden_root: Path) -> None:
    arrays, config = opened(golden_root / FULL)
    model = by_rule(Vqgan(config)).eval().double()
    image = torch.from_numpy(arrays["in/image"]).double()
    with torch.no_grad():
        encoded = model.encoder(image)
        logits = model.quantize.proj(model.quant_conv(encoded))
    codes = model.encode(image)
    assert (codes.numpy() == arrays["out/codes_argmax"]).all()
    assert_close(encoded[:, :8], arrays["out/encoder_out_ch0_8"], 1e-9, "encoder")
    assert_close(encoded.norm(), arrays["out/encoder_out_norm"], 1e-9, "norm")
    assert_close(logits[:, ::512], arrays["out/logits_every_512"], 1e-9, "logits")
    assert_close(logits.logsumexp(1), arrays["out/logits_lse"], 1e-9, "logsumexp")
    assert_close(model.decode(codes), arrays["out/dec_from_codes_argmax"], 1e-9, "decoded")
    random_codes = torch.from_numpy(arrays["in/random_codes"])
    assert_close(model.decode(random_codes), arrays["out/dec_from_random_codes"], 1e-9, "decoded from random codes")


@pytest.mark.golden("vqgan/manifest_*_*.json", without=("manifest_loss_keys",))
def test_parameters_have_the_released_names_and_shapes(golden_file: Path) -> None:
    recorded = json.loads(golden_file.read_text())
    with torch.device("meta"):
        model = Vqgan(config_of(recorded["config"]))
    (wanted,) = (value for key, value in recorded.items() if key not in ("config", "total_params", "buffers"))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == wanted
    assert sum(value.numel() for value in model.parameters()) == recorded["total_params"]


@pytest.mark.golden(PIXELS)
def test_pixels_go_in_and_come_out_as_the_original_s(golden_root: Path) -> None:
    with np.load(golden_root / PIXELS, allow_pickle=False) as arrays:
        cases = [key.split("/")[1] for key in arrays.files if key.startswith("encode_pre/") and key.endswith("/x")]
        assert len(cases) >= 7
        for case in (each for each in cases if not each.startswith("mode_")):  # modes are data.picture's
            image = arrays[f"encode_pre/{case}/image_uint8"]
            got = to_input(image, int(arrays[f"encode_pre/{case}/code_image_size"]))
            assert (got.numpy() == arrays[f"encode_pre/{case}/x"]).all(), case
        for half in ("", "_fp16"):
            painted = torch.from_numpy(arrays[f"decode_post/x{half}"])
            assert (to_picture(painted) == arrays[f"decode_post/image_uint8{half}"]).all(), half

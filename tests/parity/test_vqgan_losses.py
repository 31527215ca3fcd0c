"""The perceptual and the adversarial loss of a VQGAN against what taming-transformers computed, with gradients."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_close
from test_vqgan import by_rule, config_of
from torch import nn

from ofa_ds.vision.losses import Discriminator, Lpips, adversary_weight, hinge
from ofa_ds.vision.vqgan import Vqgan

FILE = "vqgan/perceptual_gan_losses.npz"
STEPS = ("step0_before_disc_start", "step100")


def losses_by_rule(network: nn.Module, prefix: str) -> nn.Module:
    """The fixtures' weights of networks that only training used."""
    with torch.no_grad():
        for name, value in network.named_parameters():
            z = np.random.RandomState(zlib.crc32((prefix + name).encode()) & 0x7FFFFFFF).standard_normal(value.shape)
            if ".lin" in prefix + name:
                z = 0.1 * np.abs(z)
            elif z.ndim == 4:
                z = z * np.sqrt(2 / np.prod(z.shape[1:]))
            else:
                z = (1 if name.endswith("weight") else 0) + 0.1 * z
            value.copy_(torch.from_numpy(z.astype(np.float32)))
    return network.double()


@pytest.fixture(scope="module")
def recorded(golden_root: Path) -> dict[str, np.ndarray]:
    if not (golden_root / FILE).is_file():
        pytest.skip(f"{FILE} is not in --golden")
    with np.load(golden_root / FILE, allow_pickle=False) as found:
        return {key: found[key] for key in found.files}


def networks(recorded: dict[str, np.ndarray]) -> tuple[Vqgan, Lpips, Discriminator]:
    meta = json.loads(str(recorded["meta"]))
    adversary = Discriminator(meta["loss"]["disc_ndf"], meta["loss"]["disc_num_layers"])
    return (
        by_rule(Vqgan(config_of(meta["config"]))).double().train(),
        losses_by_rule(Lpips(), "loss.perceptual_loss.").eval(),
        losses_by_rule(adversary, "loss.discriminator."),
    )


def test_the_perceptual_distance_is_the_original_s(recorded: dict[str, np.ndarray]) -> None:
    _, lpips, adversary = networks(recorded)
    image, painted = (torch.from_numpy(recorded[key]).double() for key in ("in/image", "lpips/xrec"))
    with torch.no_grad():
        assert_close(lpips(image, painted), recorded["lpips/value"], 1e-9, "value")
        assert_close(lpips(image, image.flip(-1)), recorded["lpips/value_flip"], 1e-9, "mirrored")
        for k, level in enumerate(lpips.levels(image)):
            assert_close(level.norm(), recorded[f"lpips/vgg_relu{k + 1}_norm"], 1e-9, f"level {k + 1}")
        assert_close(adversary.eval()(image), recorded["disc/eval_logits_real"], 1e-9, "logits")


@pytest.mark.parametrize("step", STEPS)
def test_both_sides_of_the_game_have_the_original_s_losses_and_gradients(
    recorded: dict[str, np.ndarray], step: str
) -> None:
    model, lpips, adversary = networks(recorded)
    image = torch.from_numpy(recorded["in/image"]).double()
    factor = 0.8 * (step != STEPS[0])
    painted, quantized = model(image)
    perceptual = lpips(image, painted)
    painting = ((image - painted).abs() + perceptual).mean()
    fooled = -adversary.train()(painted).mean()
    weight = adversary_weight(painting, fooled, model.decoder.conv_out.weight)
    total = painting + factor * weight * fooled + quantized.loss
    total.backward()
    found = {"total": total, "total_loss": total, "quant_loss": quantized.loss, "nll_loss": painting}
    found |= {"rec_loss": painting, "p_loss": perceptual.mean(), "g_loss": fooled, "d_weight": 0.8 * weight}
    parameters = {**dict(model.named_parameters()), "loss.discriminator.main.0.weight": adversary.main[0].weight}
    _assert_recorded(recorded, f"loss/{step}/opt0/", found, parameters)

    model, _, adversary = networks(recorded)
    real, fake = adversary.train()(image), adversary(painted.detach())
    loss = float(step != STEPS[0]) * hinge(real, fake)
    loss.backward()
    found = {"total": loss, "disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
    parameters = {"loss.discriminator.main.0.weight": adversary.main[0].weight}
    _assert_recorded(recorded, f"loss/{step}/opt1/", found, parameters)


def _assert_recorded(
    recorded: dict[str, np.ndarray], prefix: str, found: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]
) -> None:
    keys = [key.removeprefix(prefix) for key in recorded if key.startswith(prefix)]
    assert len(keys) >= 5
    for key in keys:
        if key == "disc_factor":
            continue
        value = found[key].detach() if key in found else parameters[key.removeprefix("gradnorm/")].grad.norm()
        assert_close(value, recorded[prefix + key], 1e-9, prefix + key)

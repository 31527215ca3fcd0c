"""Losses of a VQGAN beside L1 and its codebook's term: a perceptual distance and an adversary (Esser et al. 2021).

Names of parameters are those of released checkpoints' `loss.perceptual_loss.*` and `loss.discriminator.*`.
Legend: B pictures, C channels, H, W pixels (or places of a level).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ofa_ds.convert.torch_file import TorchFile
from ofa_ds.vision.weights import check_weights

VGG16 = ((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
         (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512))  # fmt: skip
"""Convolutions of the network that LPIPS looks through: (number in torchvision's `features`, from, to channels)."""

SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Those of each level; between two of them the side is halved. The levels' last activations are compared."""

MAX_ADVERSARY_WEIGHT = 1e4
LEAST_CROP = 24
"""Pixels of a picture's side for which a `Discriminator` of three layers has a logit."""


class Lpips(nn.Module):
    """Perceptual distance of pictures in [-1, 1] (Zhang et al. 2018), version 0.1 on VGG-16, without its dropout."""

    def __init__(self) -> None:
        super().__init__()
        channels = {number: (old, new) for number, old, new in VGG16}
        self.net = nn.ModuleDict(
            {
                f"slice{k + 1}": nn.ModuleDict({str(n): nn.Conv2d(*channels[n], 3, padding=1) for n in numbers})
                for k, numbers in enumerate(SLICES)
            }
        )
        for k, numbers in enumerate(SLICES):
            head = nn.ModuleDict({"1": nn.Conv2d(channels[numbers[-1]][1], 1, 1, bias=False)})
            self.add_module(f"lin{k}", nn.ModuleDict({"model": head}))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    def forward(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        """[B, 1, 1, 1]: squared differences of unit vectors, weighed per channel, averaged over places, summed."""
        total = x_B3HW.new_zeros(x_B3HW.shape[0], 1, 1, 1)
        for k, (a_BCHW, b_BCHW) in enumerate(zip(self.levels(x_B3HW), self.levels(y_B3HW), strict=True)):
            head = self.get_submodule(f"lin{k}.model.1")
            total = total + head((_unit(a_BCHW) - _unit(b_BCHW)).square()).mean((2, 3), keepdim=True)
        return total

    def levels(self, x_B3HW: Tensor) -> list[Tensor]:
        """The last activation of each level of VGG-16."""
        x, found = (x_B3HW - self.shift) / self.scale, []
        for k, level in enumerate(self.net.values()):
            if k:
                x = functional.max_pool2d(x, 2)
            for convolution in level.values():
                x = convolution(x).relu()
            found.append(x)
        return found


def _unit(x_BCHW: Tensor) -> Tensor:
    return x_BCHW / (x_BCHW.square().sum(1, keepdim=True).sqrt() + 1e-10)


def load_lpips(paths: Sequence[Path]) -> Lpips:
    """From files that hold its weights together: torchvision's VGG-16 and LPIPS's `vgg.pth`, or a released `last.ckpt`.

    Raises ValueError, one line: a weight is missing, of another shape or not finite, or a file is none of torch's.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        content = TorchFile(path).content
        state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
        found |= {_lpips_name(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    model = Lpips()
    weights = {name: value for name, value in found.items() if name in model.state_dict()}
    what = "torchvision's vgg16 with LPIPS's vgg.pth, or a released last.ckpt"
    check_weights(" and ".join(map(str, paths)), model, weights, what)
    model.load_state_dict(weights)
    return model.eval()


def _lpips_name(name: str) -> str:
    """torchvision's `features.5.weight` and a checkpoint's `loss.perceptual_loss.*` under the names of `Lpips`."""
    number = name.split(".")[1] if name.startswith("features.") else ""
    for k, numbers in enumerate(SLICES):
        if number in map(str, numbers):
            return f"net.slice{k + 1}.{name.removeprefix('features.')}"
    return name.removeprefix("loss.perceptual_loss.")


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit per patch, high for pictures that are real."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        old = width
        for k in range(1, layers + 1):
            new = width * min(1 << k, 8)
            stride = 2 if k < layers else 1
            parts += [nn.Conv2d(old, new, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(new)]
            parts += [nn.LeakyReLU(0.2)]
            old = new
        self.main = nn.Sequential(*parts, nn.Conv2d(old, 1, 4, padding=1))

    def initialise(self, generator: torch.Generator) -> Discriminator:
        """Normal weights of deviation 0.02, those of norms around 1. Returns itself."""
        for part in self.main:
            if isinstance(part, (nn.Conv2d, nn.BatchNorm2d)):
                nn.init.normal_(part.weight, float(isinstance(part, nn.BatchNorm2d)), 0.02, generator=generator)
            if isinstance(part, nn.BatchNorm2d):
                nn.init.zeros_(part.bias)
        return self

    def forward(self, x_B3HW: Tensor) -> Tensor:
        return self.main(x_B3HW)


def hinge(real: Tensor, painted: Tensor) -> Tensor:
    """What the discriminator minimises; both: its logits."""
    return 0.5 * ((1 - real).relu().mean() + (1 + painted).relu().mean())


def adversary_weight(painting_loss: Tensor, adversary_loss: Tensor, last_weight: Tensor) -> Tensor:
    """|d painting / dw| / (|d adversary / dw| + 1e-4), at most 1e4, without gradient; w: the decoder's last weights."""
    norms = [
        torch.autograd.grad(each, last_weight, retain_graph=True)[0].norm() for each in (painting_loss, adversary_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, MAX_ADVERSARY_WEIGHT).detach()

"""Training a VQGAN: L1 and the codebook's term, and where asked for a perceptual distance and an adversary.

    loss = mean(|x - y| + w_p LPIPS(x, y)) + quantized.loss - f d mean(D(y)),   y painted from the codes of x

    d = w_d |d mean(...) / dw| / (|d mean(D(y)) / dw| + 1e-4), w: the decoder's last weights; f: 0 before the adversary
    starts, then 1. The adversary D minimises hinge(D(x), D(y)) beside it. (Esser et al. 2021, as published)

A step is a function of (settings, seed, step, weights): crops and noise draw from generators that the step seeds, so a
run goes on from a checkpoint to the same bits, on CPUs of one kind with one number of threads.
Legend: B pictures, H, W pixels, h, w codes, N rows of the codebook.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ofa_ds.data.order import permutation
from ofa_ds.vision.codebook import GumbelCodebook
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.losses import LEAST_CROP, Discriminator, Lpips, adversary_weight, hinge
from ofa_ds.vision.pixels import to_input
from ofa_ds.vision.sources import Pictures
from ofa_ds.vision.vqgan import Vqgan

BETAS = (0.5, 0.9)
WARMEST, COLDEST = 0.9, 1e-6
"""Temperature of a Gumbel codebook at the first and at the last step, with a cosine between them, as published."""

_DECODERS = 4
"""Threads that decode pictures; decoders let others run meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What makes a run. Raises ValueError for values that make none."""

    num_steps: int
    batch: int = 16
    """Pictures a step."""
    side: int = 256
    """Pixels that the shorter side of a picture is resized to."""
    crop: int = 256
    """Side of the square that is cut out of it, at a place that the step draws."""
    lr: float = 1e-4
    kl_weight: float = 1e-8
    """Of a Gumbel codebook: how much even use of the codes counts."""
    perceptual_weight: float = 1.0
    adversary_weight: float = 0.0
    """0: no adversary."""
    adversary_start: int = 0
    """Step at which it begins to count."""
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch", "side", "crop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: want at least 1, got {getattr(self, name)}")
        for name in ("lr", "kl_weight", "perceptual_weight", "adversary_weight", "adversary_start", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: want a number of at least 0, got {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise ValueError(f"seed: want less than 2^63, as torch's generators take it, got {self.seed}")
        if self.crop > self.side:
            raise ValueError(f"crop: want at most side {self.side}, got {self.crop}")


class Told(NamedTuple):
    """What a step says of itself."""

    loss: float
    l1: float
    """Mean |x - y|; colours are -1 ... 1."""
    perceptual: float
    adversary: float
    """The adversary's own loss."""
    uses_N: Tensor
    """int64 [N]: how often each code was chosen."""


class Trainer:
    """One model, its optimisers and the step it is at."""

    def __init__(
        self, model: Vqgan, pictures: Pictures, settings: Settings, *, device: torch.device, lpips: Lpips | None = None
    ) -> None:
        """Raises ValueError where a crop holds no whole codes, or is too small for the adversary."""
        if settings.crop % model.config.pixels_per_code:
            raise ValueError(
                f"crop: want a multiple of {model.config.pixels_per_code} pixels, one code's side, got {settings.crop}"
            )
        if settings.adversary_weight and settings.crop < LEAST_CROP:
            raise ValueError(f"crop: the adversary wants at least {LEAST_CROP} pixels, got {settings.crop}")
        self.model, self.pictures, self.settings, self.device = model.to(device), pictures, settings, device
        self.model.train().requires_grad_(True)
        self.lpips = lpips.to(device) if lpips is not None else None
        self.step = 0
        self.adversary: Discriminator | None = None
        self.optimisers = {"model": torch.optim.Adam(model.parameters(), lr=settings.lr, betas=BETAS)}
        if settings.adversary_weight:
            self.adversary = Discriminator().initialise(torch.Generator().manual_seed(settings.seed)).to(device).train()
            parameters = self.adversary.parameters()
            self.optimisers["adversary"] = torch.optim.Adam(parameters, lr=settings.lr, betas=BETAS)
        if isinstance(model.quantize, GumbelCodebook):
            model.quantize.kl_weight = settings.kl_weight
        self._pool = ThreadPoolExecutor(_DECODERS)
        self._next: tuple[int, list[Future[Tensor]]] = (-1, [])

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def train_step(self) -> Told:
        """Raises FloatingPointError where a loss is not finite: the weights are then no longer of use; ValueError."""
        image = self._images().to(self.device)
        noise = self._prepare(image)
        painted, quantized = self.model(image, noise)
        l1 = (image - painted).abs().mean()
        painting = l1
        perceptual = torch.zeros(())
        if self.lpips is not None:
            perceptual = self.lpips(image, painted).mean()
            painting = l1 + self.settings.perceptual_weight * perceptual
        loss = painting + quantized.loss
        is_played = self.adversary is not None and self.step >= self.settings.adversary_start
        if is_played:
            fooled = -self.adversary(painted).mean()
            weight = adversary_weight(painting, fooled, self.model.decoder.conv_out.weight)
            loss = loss + self.settings.adversary_weight * weight * fooled
        self._update("model", loss)
        own = self._play(image, painted.detach()) if is_played else 0.0
        self.step += 1
        uses_N = torch.bincount(quantized.codes.flatten().cpu(), minlength=self.model.config.n_embed)
        return Told(loss.item(), l1.item(), perceptual.item(), own, uses_N)

    def _prepare(self, image: Tensor) -> Tensor | None:
        """-> the Gumbel noise of this step [B, N, h, w]; sets the temperature."""
        torch.manual_seed(_seed(self.settings.seed, self.step))  # of dropout, which takes no generator
        codebook = self.model.quantize
        if not isinstance(codebook, GumbelCodebook):
            return None
        codebook.temperature = temperature_at(self.step, self.settings.num_steps)
        side = self.settings.crop // self.model.config.pixels_per_code
        generator = torch.Generator(self.device).manual_seed(_seed(self.settings.seed, self.step))
        shape = (len(image), self.model.config.n_embed, side, side)
        return -torch.empty(shape, device=self.device).exponential_(generator=generator).log()

    def _play(self, image: Tensor, painted: Tensor) -> float:
        loss = hinge(self.adversary(image), self.adversary(painted))
        self._update("adversary", loss)
        return loss.item()

    def _update(self, which: str, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {self.step}: the loss of the {which} is {loss.item()}")
        self.optimisers[which].zero_grad(set_to_none=True)  # the other network's loss left gradients here too
        loss.backward()
        self.optimisers[which].step()

    def _images(self) -> Tensor:
        """float32 [B, 3, crop, crop] of this step; the next step's are decoded meanwhile."""
        step, crops = self._next
        if step != self.step:
            crops = self._crops(self.step)
        found = torch.stack([crop.result() for crop in crops])
        self._next = (self.step + 1, self._crops(self.step + 1))
        return found

    def _crops(self, step: int) -> list[Future[Tensor]]:
        return [self._pool.submit(self._crop, step, at) for at in range(self.settings.batch)]

    def _crop(self, step: int, at: int) -> Tensor:
        """The picture at a place of the step's batch; each pass over all pictures has an order of its own."""
        epoch, place = divmod(step * self.settings.batch + at, len(self.pictures))
        i = permutation(len(self.pictures), self.settings.seed, epoch)[place]
        draw = np.random.default_rng((self.settings.seed, step, at))
        return cut_square(self.picture(i), self.settings.crop, self.model.config.pixels_per_code, draw)

    def picture(self, i: int) -> Tensor:
        """float32 [3, H, W], the shorter side resized. Raises ValueError for one smaller than one code."""
        pixels, least = self.pictures[i], self.model.config.pixels_per_code
        if min(pixels.shape[:2]) < least:
            size = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise ValueError(f"{self.pictures.name(i)}: {size} pixels are less than one code, {least} x {least}")
        return to_input(pixels, self.settings.side)


def cut_square(x_3HW: Tensor, side: int, grid: int, draw: np.random.Generator | None = None) -> Tensor:
    """[3, side, side] at a place that is drawn, else in the middle; its corner on a grid of that many pixels."""
    free = [(length - side) // grid for length in x_3HW.shape[1:]]
    top, left = (grid * (int(draw.integers(each + 1)) if draw is not None else each // 2) for each in free)
    return x_3HW[:, top : top + side, left : left + side]


def temperature_at(step: int, num_steps: int) -> float:
    """WARMEST at step 0, COLDEST at the last and after it, half a cosine between."""
    done = min(step / max(num_steps - 1, 1), 1.0)
    return COLDEST + 0.5 * (WARMEST - COLDEST) * (1 + math.cos(math.pi * done))


def perplexity(uses_N: Tensor) -> float:
    """exp(entropy): as many codes, used evenly, would say as much."""
    share_N = uses_N.double() / uses_N.sum()
    return float(torch.special.entr(share_N).sum().exp())


def new_model(config: VqganConfig, seed: int) -> Vqgan:
    """Random weights, torch's own, of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Vqgan(config)


def _seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])

"""Pictures to image codes and back, as tables of rows want them: uint8 in and out, any sizes, no gradients."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ofa_ds.data.picture import MAX_ASPECT
from ofa_ds.vision.files import load_vqgan
from ofa_ds.vision.pixels import to_input, to_picture
from ofa_ds.vision.vqgan import Vqgan

GPU_BATCH = 16
"""Pictures of a batch on a GPU, always: another number might choose another algorithm, whose rounding is another."""


class Coder:
    """What a picture becomes depends on it and the device alone, not on those that come with it.

    On a CPU each is a batch of its own, which is no slower there; on a GPU batches are filled up to GPU_BATCH.
    """

    def __init__(self, model: Vqgan, code_image_size: int) -> None:
        """code_image_size: shorter side in pixels that pictures are brought to. Raises ValueError where none fits."""
        self.pixels_per_code = model.config.pixels_per_code
        """Side of the square that one code stands for."""
        if code_image_size < 1 or code_image_size % self.pixels_per_code:
            raise ValueError(
                f"code_image_size: want a multiple of {self.pixels_per_code} pixels, one code's of this VQGAN, "
                f"got {code_image_size}"
            )
        self._max_side = model.config.max_side or math.inf
        if code_image_size > self._max_side:
            raise ValueError(
                f"code_image_size: this VQGAN is for {self._max_side} pixels at most, got {code_image_size}"
            )
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.code_image_size = code_image_size
        self.num_codes = model.config.n_embed
        """Of the codebook: codes are 0 ... num_codes - 1."""
        self.side = code_image_size // self.pixels_per_code
        """Codes along the shorter side of a picture; a square one has side x side of them."""
        self.device = next(model.parameters()).device

    def encode(self, images: Sequence[np.ndarray], names: Sequence[str] = ()) -> list[np.ndarray]:
        """uint8 RGB [H, W, 3] each -> codes int64 [h, w] each, shorter of them `side`; nothing is cropped.

        Raises ValueError "NAME: ..." (else "picture N: ...", from 0) for one that is smaller than a code, or of another
        kind or form.
        """
        for k, image in enumerate(images):
            self._check_picture(names[k] if names else f"picture {k}", image)
        inputs = [to_input(image, self.code_image_size) for image in images]
        return self._by_batches(inputs, self._encode, Tensor.numpy)

    def paint(self, codes: Sequence[np.ndarray], names: Sequence[str] = ()) -> list[np.ndarray]:
        """Codes [h, w], or [side * side] of a square picture -> uint8 [H, W, 3] each.

        Raises ValueError "NAME: ..." (else "codes N: ...", from 0) for a wrong number of them, for one outside the
        codebook.
        """
        grids = [self._grid(names[k] if names else f"codes {k}", each) for k, each in enumerate(codes)]
        inputs = [torch.from_numpy(grid) for grid in grids]
        return self._by_batches(inputs, self.model.decode, to_picture)

    def _encode(self, image_B3HW: Tensor) -> Tensor:
        return self.model.encode(image_B3HW.contiguous(memory_format=torch.channels_last))

    def _check_picture(self, name: str, image: np.ndarray) -> None:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name}: want uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        height, width = image.shape[:2]
        if min(height, width) < self.pixels_per_code:
            side = self.pixels_per_code
            raise ValueError(f"{name}: {width} x {height} pixels are less than one code's, {side} x {side}")
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(f"{name}: {width} x {height}: one side is more than {MAX_ASPECT} times the other")

    def _grid(self, name: str, codes: np.ndarray) -> np.ndarray:
        """int64 [h, w]."""
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"{name}: want whole numbers, got {codes.dtype}")
        if codes.ndim == 1 and codes.size == self.side**2:
            codes = codes.reshape(self.side, self.side)
        if codes.ndim != 2 or min(codes.shape) != self.side:
            raise ValueError(
                f"{name}: want {self.side**2}, {self.side} x {self.side} of a picture of {self.code_image_size} "
                f"pixels, got {' x '.join(map(str, codes.shape))}"
            )
        if (longest := max(codes.shape) * self.pixels_per_code) > self._max_side:
            raise ValueError(f"{name}: this VQGAN is for {self._max_side} pixels at most, got {longest}")
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            outside = int(codes.min()) if codes.min() < 0 else int(codes.max())
            raise ValueError(f"{name}: want 0 ... {self.num_codes - 1} of the codebook, got {outside}")
        return codes.astype(np.int64)

    def _by_batches(
        self, inputs: Sequence[Tensor], function: Callable[[Tensor], Tensor], finish: Callable[[Tensor], np.ndarray]
    ) -> list[np.ndarray]:
        """What `function` makes of each, run on those of equal size together; finished before the next batch runs."""
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for k, each in enumerate(inputs):
            alike[tuple(each.shape)].append(k)
        size = 1 if self.device.type == "cpu" else GPU_BATCH
        made: dict[int, np.ndarray] = {}
        with torch.inference_mode(), _exact():
            for places in alike.values():
                for start in range(0, len(places), size):
                    mine = places[start : start + size]
                    filled = [*mine, *mine[-1:] * (size - len(mine))]
                    found = function(torch.stack([inputs[k] for k in filled]).to(self.device)).cpu()
                    made.update((k, finish(each)) for k, each in zip(mine, found, strict=False))
        return [made[k] for k in range(len(inputs))]


class Coders:
    """One VQGAN for pictures of every size."""

    def __init__(self, model: Vqgan) -> None:
        self._model = model
        self._of: dict[int, Coder] = {}

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    def encode(self, images: Sequence[np.ndarray], sides: Sequence[int], names: Sequence[str]) -> list[np.ndarray]:
        """As `Coder.encode`; sides: the code_image_size of each."""
        return self._by_side(sides, lambda coder, mine: coder.encode(*_those(mine, images, names)))

    def paint(self, codes: Sequence[np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
        """As `Coder.paint`, of square pictures [n] each."""
        sides = [math.isqrt(len(each)) * self._model.config.pixels_per_code for each in codes]
        return self._by_side(sides, lambda coder, mine: coder.paint(*_those(mine, codes, names)))

    def _by_side(self, sides: Sequence[int], make: Callable[[Coder, list[int]], list[np.ndarray]]) -> list[np.ndarray]:
        made: dict[int, np.ndarray] = {}
        for side in dict.fromkeys(sides):
            mine = [k for k, each in enumerate(sides) if each == side]
            if side not in self._of:
                self._of[side] = Coder(self._model, side)
            made.update(zip(mine, make(self._of[side], mine), strict=True))
        return [made[k] for k in range(len(sides))]


def _those(places: Sequence[int], *lists: Sequence[Any]) -> tuple[list[Any], ...]:
    return tuple([each[k] for k in places] for each in lists)


def load_coder(folder: Path, *, device: str | torch.device = "cpu", code_image_size: int | None = None) -> Coder:
    """code_image_size: the VQGAN's own resolution where none is given. Raises ValueError as `load_vqgan`, `Coder`."""
    model = load_vqgan(folder, device=device)
    return Coder(model, code_image_size or model.config.resolution)


@contextmanager
def _exact() -> Iterator[None]:
    """On a GPU: fp32 as it is written, where convolutions would round to 10 bits, and the same algorithm every time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def this_device(number: int = 0) -> str:
    """A GPU of this machine where it has any, of several the `number`-th by turns; else its processor."""
    return f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def num_devices() -> int:
    """GPUs of this machine where it has any; else cores that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))

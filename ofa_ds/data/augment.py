"""RandomAugment as OFA pretrains with it: two operations at level 7 of 10, each applied half of the time.

Images are uint8 [H, W, 3], in and out. Legend: H, W pixels; 3 is RGB.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

NUM_OPERATIONS = 2
PROBABILITY = 0.5
FILL = 128
"""What comes in from outside the picture."""

ENHANCE = 1.36
SHEAR = 0.21
TRANSLATE_PIXELS = 7
ROTATE_DEGREES = 21.0
"""Magnitudes at level 7: 1.8 * 0.7 + 0.1, 0.3 * 0.7, 10 * 0.7, 30 * 0.7."""


def random_augment(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two operations drawn with replacement; geometric ones get a random sign."""
    for choice in rng.integers(len(OPERATIONS), size=NUM_OPERATIONS):
        applied, sign = rng.random() < PROBABILITY, 1 if rng.random() < 0.5 else -1
        if applied:
            image_HW3 = list(OPERATIONS.values())[choice](image_HW3, sign)
    return image_HW3


def auto_contrast(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    """Each channel stretched to 0 ... 255."""
    out_HW3 = np.empty_like(image_HW3)
    for channel in range(3):
        values_HW = image_HW3[..., channel]
        low, high = int(values_HW.min()), int(values_HW.max())
        table_256 = np.arange(256.0)
        if high > low:
            table_256 = (table_256 - low) * (255 / (high - low))
        out_HW3[..., channel] = table_256.clip(0, 255).astype(np.uint8)[values_HW]
    return out_HW3


def equalize(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    """Each channel's histogram flattened, with Pillow's arithmetic."""
    out_HW3 = np.empty_like(image_HW3)
    for channel in range(3):
        values_HW = image_HW3[..., channel]
        counts_256 = np.bincount(values_HW.ravel(), minlength=256)
        step = int(counts_256[counts_256 > 0][:-1].sum()) // 255
        if step:
            below_256 = np.concatenate([[0], counts_256.cumsum()[:-1]])
            out_HW3[..., channel] = ((below_256 + step // 2) // step).clip(0, 255).astype(np.uint8)[values_HW]
        else:
            out_HW3[..., channel] = values_HW
    return out_HW3


def brightness(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    return (np.arange(256) * ENHANCE).clip(0, 255).astype(np.uint8)[image_HW3]


def sharpness(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    """Away from the 3 x 3 mean whose centre counts five times; the outermost pixels stay as they are."""
    wide = image_HW3.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    center = wide[1:-1, 1:-1]
    smooth_times_13 = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * center
    inner = center * np.float32(ENHANCE) + smooth_times_13 * np.float32((1 - ENHANCE) / 13)
    out_HW3 = image_HW3.copy()
    out_HW3[1:-1, 1:-1] = inner.clip(0, 255).astype(np.uint8)  # the original wraps round here: white specks turn black
    return out_HW3


def shear_x(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    return _affine(image_HW3, (1, sign * SHEAR, 0, 0, 1, 0))


def shear_y(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    return _affine(image_HW3, (1, 0, 0, sign * SHEAR, 1, 0))


def translate_x(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    out_HW3 = np.full_like(image_HW3, FILL)
    if sign > 0:
        out_HW3[:, TRANSLATE_PIXELS:] = image_HW3[:, :-TRANSLATE_PIXELS]
    else:
        out_HW3[:, :-TRANSLATE_PIXELS] = image_HW3[:, TRANSLATE_PIXELS:]
    return out_HW3


def translate_y(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    return translate_x(image_HW3.swapaxes(0, 1), sign).swapaxes(0, 1)


def rotate(image_HW3: np.ndarray, sign: int = 1) -> np.ndarray:
    picture = Image.fromarray(image_HW3)
    return np.array(picture.rotate(sign * ROTATE_DEGREES, Image.Resampling.BILINEAR, fillcolor=(FILL,) * 3))


def _affine(image_HW3: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Bilinear; `matrix` maps places of the result to places of the picture."""
    picture = Image.fromarray(image_HW3)
    moved = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(FILL,) * 3
    )
    return np.array(moved)


OPERATIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "identity": lambda image_HW3, sign: image_HW3,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}

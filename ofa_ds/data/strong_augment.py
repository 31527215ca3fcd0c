"""The augmentation that image classification is trained with: timm's for ImageNet, with RandomAugment between.

docs/downstream.md, Pictures. Every random number is drawn where timm draws it, so that the same numbers give the same
picture. Images are uint8 [H, W, 3], in and out. Legend: H, W pixels; 3 is RGB.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ofa_ds.data.augment import random_augment
from ofa_ds.data.image import Picture, resized_part

IMAGENET_MEAN = np.array((0.485, 0.456, 0.406))
IMAGENET_DEVIATION = np.array((0.229, 0.224, 0.225))
FILL = (124, 116, 104)
"""The mean, in 0 ... 255: what comes in from outside the picture."""

CROP_AREA = 0.08, 1.0
"""Share of the picture that a crop covers."""
CROP_RATIO = 3 / 4, 4 / 3
"""Its width over its height; drawn evenly in the logarithm."""
TRIES = 10

NUM_OPERATIONS = 2
PROBABILITY = 0.5
MAX_LEVEL = 10.0
LEVEL, LEVEL_DEVIATION = 9.0, 0.5

ERASING_PROBABILITY = 0.25
ERASED_AREA = 0.02, 1 / 3
ERASED_RATIO = 0.3, 1 / 0.3
"""Height over width."""

Operation = Callable[[Image.Image, float, int], Image.Image]
"""(picture, level / 10, sign) -> picture."""


def strong_augment(picture_HW3: Picture, side: int, rng: np.random.Generator) -> np.ndarray:
    """A random part, mirrored half of the time, RandAugment, RandomAugment, erasing: [side, side, 3]."""
    image_HW3 = random_resized_crop(picture_HW3, side, rng)
    if rng.random() < 0.5:
        image_HW3 = np.ascontiguousarray(image_HW3[:, ::-1])
    image_HW3 = random_augment(rand_augment(image_HW3, rng), rng)
    return random_erasing(image_HW3, rng)


def random_resized_crop(picture_HW3: Picture, side: int, rng: np.random.Generator) -> np.ndarray:
    return resized_part(picture_HW3, crop_box(*picture_HW3.shape[:2], rng), side)


def crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """top, left, height, width of a random part; the largest central one of a possible ratio where ten do not fit."""
    for _ in range(TRIES):
        area = rng.uniform(*CROP_AREA) * height * width
        ratio = math.exp(rng.uniform(*map(math.log, CROP_RATIO)))
        new_width, new_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= new_width <= width and 1 <= new_height <= height:
            top = int(rng.integers(height - new_height + 1))
            return top, int(rng.integers(width - new_width + 1)), new_height, new_width
    new_width = min(width, round(height * CROP_RATIO[1]))
    new_height = min(height, round(width / CROP_RATIO[0]))
    return (height - new_height) // 2, (width - new_width) // 2, new_height, new_width


def rand_augment(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """timm's `rand-m9-mstd0.5-inc1`: two operations drawn with replacement, each applied half of the time."""
    picture = Image.fromarray(image_HW3)
    for choice in rng.integers(len(OPERATIONS), size=NUM_OPERATIONS):
        if rng.random() > PROBABILITY:
            continue
        level = min(max(rng.normal(LEVEL, LEVEL_DEVIATION), 0.0), MAX_LEVEL)
        name = list(OPERATIONS)[choice]
        sign = -1 if name in SIGNED and rng.random() > 0.5 else 1
        picture = OPERATIONS[name](picture, level / MAX_LEVEL, sign)
    return np.array(picture)


def random_erasing(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A rectangle, a quarter of the time, becomes noise that is normal after the normalisation of ImageNet.

    Noise below black or above white is cut to it, since pictures are bytes until the model normalises them.
    """
    if rng.random() > ERASING_PROBABILITY:
        return image_HW3
    height, width = image_HW3.shape[:2]
    for _ in range(TRIES):
        area = rng.uniform(*ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(*map(math.log, ERASED_RATIO)))
        erased_height, erased_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if erased_width < width and erased_height < height:
            top = int(rng.integers(height - erased_height + 1))
            left = int(rng.integers(width - erased_width + 1))
            noise_HW3 = rng.standard_normal((erased_height, erased_width, 3), np.float32)
            pixels_HW3 = np.rint((noise_HW3 * IMAGENET_DEVIATION + IMAGENET_MEAN) * 255).clip(0, 255)
            out_HW3 = image_HW3.copy()
            out_HW3[top : top + erased_height, left : left + erased_width] = pixels_HW3
            return out_HW3
    return image_HW3


def _rotate(picture: Image.Image, level: float, sign: int) -> Image.Image:
    return picture.rotate(sign * level * 30, Image.Resampling.BICUBIC, fillcolor=FILL)


def _solarize_add(picture: Image.Image, level: float, sign: int) -> Image.Image:
    table = [min(255, value + int(level * 110)) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


def _enhance(enhancer: type) -> Operation:
    """Away from, or towards, what the enhancer makes of factor 0."""
    return lambda picture, level, sign: enhancer(picture).enhance(1 + sign * level * 0.9)


def _moved(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Operation:
    """Bicubic; the matrix maps places of the result to places of the picture."""

    def apply(picture: Image.Image, level: float, sign: int) -> Image.Image:
        places = matrix(sign * level, picture)
        bicubic = Image.Resampling.BICUBIC
        return picture.transform(picture.size, Image.Transform.AFFINE, places, bicubic, fillcolor=FILL)

    return apply


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda picture, level, sign: ImageOps.autocontrast(picture),
    "equalize": lambda picture, level, sign: ImageOps.equalize(picture),
    "invert": lambda picture, level, sign: ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": lambda picture, level, sign: ImageOps.posterize(picture, max(4 - int(level * 4), 1)),
    "solarize": lambda picture, level, sign: ImageOps.solarize(picture, 256 - int(level * 256)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _moved(lambda level, picture: (1, level * 0.3, 0, 0, 1, 0)),
    "shear_y": _moved(lambda level, picture: (1, 0, 0, level * 0.3, 1, 0)),
    "translate_x": _moved(lambda level, picture: (1, 0, level * 0.45 * picture.width, 0, 1, 0)),
    "translate_y": _moved(lambda level, picture: (1, 0, 0, 0, 1, level * 0.45 * picture.height)),
}
"""timm's increasing ones, in its order. At the highest level its posterize keeps no bit, which is black, or an error in
newer Pillows; here it keeps one."""

SIGNED = frozenset(OPERATIONS) - {"auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"}
"""Operations of either sign."""

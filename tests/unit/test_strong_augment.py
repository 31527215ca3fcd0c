"""The augmentation of image classification does what timm's does, operation by operation, and draws as it says."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageEnhance, ImageOps

from ofa_ds.data import strong_augment as augment

BICUBIC, AFFINE = Image.Resampling.BICUBIC, Image.Transform.AFFINE
WIDTH, HEIGHT = 60, 40
MEAN = (124, 116, 104)


def photo(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Smooth colours with an edge, neither symmetric nor of equal channels."""
    noise = np.random.default_rng(seed).integers(90, 170, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), BICUBIC))


PICTURE = Image.fromarray(photo())


def moved(*matrix: float) -> Image.Image:
    return PICTURE.transform(PICTURE.size, AFFINE, matrix, BICUBIC, fillcolor=MEAN)


AT_LEVEL_NINE = {
    ("auto_contrast", 1): ImageOps.autocontrast(PICTURE), ("equalize", 1): ImageOps.equalize(PICTURE),
    ("invert", 1): ImageChops.invert(PICTURE), ("posterize", 1): ImageOps.posterize(PICTURE, 1),
    ("solarize", 1): ImageOps.solarize(PICTURE, 26),
    ("solarize_add", 1): PICTURE.point(lambda value: min(255, value + 99) if value < 128 else value),
    ("rotate", 1): PICTURE.rotate(27.0, BICUBIC, fillcolor=MEAN),
    ("rotate", -1): PICTURE.rotate(-27.0, BICUBIC, fillcolor=MEAN),
    ("color", 1): ImageEnhance.Color(PICTURE).enhance(1.81), ("color", -1): ImageEnhance.Color(PICTURE).enhance(0.19),
    ("contrast", 1): ImageEnhance.Contrast(PICTURE).enhance(1.81),
    ("brightness", -1): ImageEnhance.Brightness(PICTURE).enhance(0.19),
    ("sharpness", 1): ImageEnhance.Sharpness(PICTURE).enhance(1.81),
    ("shear_x", 1): moved(1, 0.27, 0, 0, 1, 0), ("shear_x", -1): moved(1, -0.27, 0, 0, 1, 0),
    ("shear_y", 1): moved(1, 0, 0, 0.27, 1, 0),
    ("translate_x", 1): moved(1, 0, 0.405 * WIDTH, 0, 1, 0), ("translate_y", -1): moved(1, 0, 0, 0, 1, -0.405 * HEIGHT),
}  # fmt: skip
"""(operation, sign) -> what Pillow makes of the arguments that timm has at level 9."""


@pytest.mark.parametrize("name, sign", AT_LEVEL_NINE)
def test_an_operation_at_level_nine_is_pillow_s_with_timm_s_arguments(name: str, sign: int) -> None:
    got = np.array(augment.OPERATIONS[name](PICTURE, 0.9, sign))
    assert np.abs(got.astype(int) - np.array(AT_LEVEL_NINE[name, sign])).max() <= 1


def test_every_operation_is_compared_and_changes_the_picture() -> None:
    assert {name for name, _ in AT_LEVEL_NINE} == set(augment.OPERATIONS)
    assert len(augment.OPERATIONS) == 15
    for name, operation in augment.OPERATIONS.items():
        assert not np.array_equal(np.array(operation(PICTURE, 0.9, 1)), np.array(PICTURE)), name
        signs = [np.array(operation(PICTURE, 0.9, sign)).tolist() for sign in (1, -1)]
        assert (signs[0] != signs[1]) == (name in augment.SIGNED), name


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_an_operation_takes_every_level(name: str) -> None:
    """Pillow refuses to posterize to no bit at all, which is timm's level 10."""
    for level in (0.0, 0.5, 1.0):
        assert augment.OPERATIONS[name](PICTURE, level, 1).size == PICTURE.size


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_a_crop_lies_in_the_picture_with_a_possible_area_and_ratio(height: int, width: int, seed: int) -> None:
    top, left, new_height, new_width = augment.crop_box(height, width, np.random.default_rng(seed))
    assert 0 <= top <= height - new_height and 0 <= left <= width - new_width and new_height >= 1 <= new_width
    if min(height, width) >= 60:
        slack = 1.5 / min(new_height, new_width)
        assert 3 / 4 * (1 - slack) <= new_width / new_height <= 4 / 3 * (1 + slack)
        fallback = max(height, width) > 2 * min(height, width)
        assert fallback or 0.07 <= new_height * new_width / (height * width) <= 1


def test_crops_are_spread_evenly_over_area_and_place() -> None:
    rng = np.random.default_rng(1)
    boxes = np.array([augment.crop_box(1000, 1000, rng) for _ in range(4000)])
    areas, ratios = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 3] / boxes[:, 2]
    assert abs(np.median(areas[areas < 0.7]) - 0.39) < 0.02  # small ones always fit at the first try
    assert abs(np.log(ratios).mean()) < 0.01 and ratios.min() < 0.77 and ratios.max() > 1.3
    free = 1000 - boxes[:, 2]
    assert abs((boxes[free > 300, 0] / free[free > 300]).mean() - 0.5) < 0.02


def test_operations_are_drawn_evenly_and_applied_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    def recorder(name: str):
        return lambda picture, level, sign: (seen.append((name, level * 10, sign)), picture)[1]

    monkeypatch.setattr(augment, "OPERATIONS", {name: recorder(name) for name in augment.OPERATIONS})
    rng, rounds = np.random.default_rng(2), 6000
    for _ in range(rounds):
        augment.rand_augment(photo(8, 8), rng)
    assert abs(len(seen) / (2 * rounds) - 0.5) < 0.02
    counts = Counter(name for name, _, _ in seen)
    assert len(counts) == 15 and max(counts.values()) < 1.25 * min(counts.values())
    levels = np.array([level for _, level, _ in seen])
    assert abs(levels.mean() - 9) < 0.02 and abs(levels.std() - 0.49) < 0.02 and levels.max() == 10
    signs = np.array([sign for name, _, sign in seen if name in augment.SIGNED])
    assert abs(signs.mean()) < 0.05
    assert all(sign == 1 for name, _, sign in seen if name not in augment.SIGNED)


def test_a_quarter_of_the_pictures_loses_a_rectangle_to_normal_noise() -> None:
    grey, rng = np.full((120, 120, 3), 100, np.uint8), np.random.default_rng(3)
    shares, noise = [], []
    for _ in range(2000):
        out = augment.random_erasing(grey, rng)
        changed = (out != 100).any(-1)
        if not changed.any():
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        shares.append(height * width / 120**2)
        assert 0.28 < height / width < 3.6
        noise.append(out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].reshape(-1, 3))
    assert abs(len(shares) / 2000 - 0.25) < 0.03 and 0.015 < min(shares) and max(shares) < 0.35
    values = np.concatenate(noise) / 255
    inside = np.abs(values - (0.485, 0.456, 0.406)) < np.array((0.229, 0.224, 0.225))
    assert np.abs(inside.mean(0) - math.erf(1 / math.sqrt(2))).max() < 0.01  # one deviation to either side
    assert (grey == 100).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (90, 120)])
def test_any_picture_becomes_a_square_and_the_same_draws_give_the_same(size: tuple[int, int]) -> None:
    pixels = photo(*size)
    first, second, other = (augment.strong_augment(pixels, 48, np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8 and first.flags.c_contiguous
    assert np.array_equal(first, second) and (size == (1, 1) or not np.array_equal(first, other))

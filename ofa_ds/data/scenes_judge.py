"""A judge of painted scenes that knows what is right: shapes, colours and places by rule, from pixels alone.

Pictures may be blurred, noisy or compressed, as decoders of image codes paint them, and of any size. Legend: S = SIDE.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from ofa_ds.data.scenes import COLORS, GROUND, KINDS, SIDE, Look, mask

WHERE = ("above", "below", "left of", "right of")
"""What a caption may say of two shapes."""

MAX_DISTANCE = 100.0
"""Of a pixel from the colour that it is taken for, in steps of 255; of the palette the closest are 150 apart."""
MIN_PIXELS = 64
"""Of a shape, at SIDE: half of the smallest that is drawn."""
MIN_OVERLAP = 0.6
"""Intersection over union of a patch and the shape that it is taken for."""
MIN_GROUND = 0.25
"""Share of the picture that is ground; the largest shape that is drawn leaves 0.43."""
MIN_EXPLAINED = 0.9
"""Share that is ground or lies within a shape's box and the pixels around it; less is no scene, but noise."""

_NEAR = 2
"""Pixels between parts of one patch, and that a shape may be smaller or larger, or further on, than its patch."""
_LOOK = rf"an? ({'|'.join(COLORS)}) ({'|'.join(KINDS)})"
_CAPTION = re.compile(rf"{_LOOK}(?: ({'|'.join(WHERE)}) {_LOOK})?")
_PALETTE = np.array([GROUND, *COLORS.values()], np.float32)


class Found(NamedTuple):
    """A shape in a picture."""

    kind: str
    color: str
    center: tuple[float, float]
    """x, y in shares of the picture's width and height."""
    size: float
    """Side of its box, in shares of the picture's width."""


class Said(NamedTuple):
    """What a caption says."""

    looks: tuple[Look, ...]
    where: str
    """One of WHERE, of the first shape beside the second; empty of one shape."""


class Verdict(NamedTuple):
    """What of a caption a picture shows. Nothing more may be there, nothing may be missing."""

    color: bool
    """The colours are those named, however they are shaped."""
    shape: bool
    """The kinds are those named, in whatever colours."""
    looks: bool
    """Each shape has the colour that is named with it."""
    place: bool | None
    """Of two such shapes: they lie as said. None where the caption names one."""


def parse(caption: str) -> Said:
    """`a red circle`, `a red circle left of a blue square`, in any case. Raises ValueError for other texts."""
    found = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if found is None:
        raise ValueError(
            f"{caption[:80]!r}: no caption of a scene: want `a COLOR KIND`, or two of them with {', '.join(WHERE)} "
            f"between; colors {', '.join(COLORS)}, kinds {', '.join(KINDS)}"
        )
    color, kind, where, other_color, other_kind = found.groups()
    looks = ((kind, color),) if where is None else ((kind, color), (other_kind, other_color))
    return Said(looks, where or "")


def judge(picture_HW3: np.ndarray, caption: str) -> Verdict:
    """Picture uint8 RGB. Raises ValueError for a caption of something else."""
    return compare(look_at(picture_HW3), parse(caption))


def compare(found: Sequence[Found], said: Said) -> Verdict:
    """What is found beside what was said."""
    kinds, colors = zip(*said.looks, strict=True)
    looks = Counter((each.kind, each.color) for each in found) == Counter(said.looks)
    place = None
    if said.where:
        place = looks and _lie_as(found, said)
    return Verdict(
        Counter(each.color for each in found) == Counter(colors),
        Counter(each.kind for each in found) == Counter(kinds),
        looks,
        place,
    )


def _lie_as(found: Sequence[Found], said: Said) -> bool:
    a, b = found if (found[0].kind, found[0].color) == said.looks[0] else found[::-1]
    axis = int(said.where in ("above", "below"))
    first, second = (a, b) if said.where in ("above", "left of") else (b, a)
    return first.center[axis] < second.center[axis]


def look_at(picture_HW3: np.ndarray) -> tuple[Found, ...]:
    """The shapes of a picture, top to bottom; none where it is not mostly ground and shapes."""
    label_SS = _labels(picture_HW3)
    explained_SS = label_SS == 0
    if explained_SS.mean() < MIN_GROUND:
        return ()
    found = []
    for number, color in enumerate(COLORS, start=1):
        for patch_SS in _patches(label_SS == number):
            kind, overlap, (y, x, size) = _best_shape(patch_SS)
            if overlap >= MIN_OVERLAP:
                found.append(Found(kind, color, ((x + size / 2) / SIDE, (y + size / 2) / SIDE), size / SIDE))
                around = slice(max(y - _NEAR, 0), y + size + _NEAR), slice(max(x - _NEAR, 0), x + size + _NEAR)
                explained_SS[around] = True
    if explained_SS.mean() < MIN_EXPLAINED:
        return ()
    return tuple(sorted(found, key=lambda each: each.center[1]))


def _labels(picture_HW3: np.ndarray) -> np.ndarray:
    """Number of the palette's colour that each pixel is near, -1 for none: int [S, S]. Noise is averaged first."""
    image = Image.fromarray(np.ascontiguousarray(picture_HW3))
    if image.size != (SIDE, SIDE):
        image = image.resize(
            (SIDE, SIDE), Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BILINEAR
        )
    padded = np.pad(np.asarray(image, np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    pixels_SS3 = sum(padded[y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)) / 9
    distance_SSN = np.linalg.norm(pixels_SS3[:, :, None] - _PALETTE, axis=-1)
    return np.where(distance_SSN.min(-1) <= MAX_DISTANCE, distance_SSN.argmin(-1), -1)


def _patches(mask_SS: np.ndarray) -> list[np.ndarray]:
    """Its connected parts of at least MIN_PIXELS; parts up to _NEAR pixels apart are one."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask_SS)}
    steps = [(y, x) for y in range(-_NEAR, _NEAR + 1) for x in range(-_NEAR, _NEAR + 1) if y or x]
    patches = []
    while left:
        pending, part = [left.pop()], np.zeros_like(mask_SS)
        while pending:
            y, x = pending.pop()
            part[y, x] = True
            near = left.intersection((y + dy, x + dx) for dy, dx in steps)
            left -= near
            pending += near
        if part.sum() >= MIN_PIXELS:
            patches.append(part)
    return patches


def _best_shape(patch_SS: np.ndarray) -> tuple[str, float, tuple[int, int, int]]:
    """(kind, overlap, (y, x, size)) of the shape that covers a patch best; it may stand over the picture's edge."""
    places = [np.flatnonzero(patch_SS.any(axis)) for axis in (1, 0)]
    side = int(max(each[-1] - each[0] for each in places)) + 1
    padded = np.pad(patch_SS.astype(np.float32), SIDE)
    steps = range(-_NEAR, _NEAR + 1)
    best = ("", -1.0, (0, 0, 0))
    for size in range(max(side - _NEAR, 2), side + 2 * _NEAR + 1):
        y0, x0 = ((int(each[0] + each[-1]) + 1 - size) // 2 for each in places)
        corners = [(y0 + dy, x0 + dx) for dy in steps for dx in steps]
        windows = [padded[y + SIDE : y + SIDE + size, x + SIDE : x + SIDE + size].ravel() for y, x in corners]
        templates = _templates(size)
        shared = np.stack(windows) @ templates.T
        overlap = shared / (patch_SS.sum() + templates.sum(1) - shared)
        place, kind = np.unravel_index(overlap.argmax(), overlap.shape)
        if overlap[place, kind] > best[1]:
            best = (KINDS[kind], float(overlap[place, kind]), (*corners[place], size))
    return best


@cache
def _templates(size: int) -> np.ndarray:
    """The kinds, filling a box: float32 [KINDS, size * size]."""
    return np.stack([mask(kind, size).ravel() for kind in KINDS]).astype(np.float32)

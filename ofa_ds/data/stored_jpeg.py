"""JPEGs that are decoded when it is known how small they are to be, so that the DCT does most of the shrinking.

docs/reading.md, Decoding. Legend: H, W pixels; 3 is RGB.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import simplejpeg

from ofa_ds.data.picture import MAX_PIXELS, Buffer, decode_rgb, jpeg_rgb

JPEG_MAGIC = b"\xff\xd8"

DIVISORS = (8, 4, 2)
"""By which the DCT of 8 x 8 divides both sides without a resize."""

SMALLEST = 16
"""Shorter sides are decoded whole: rounded up, they would no longer tell one divisor from another."""

SPACES = ("YCbCr", "RGB", "Gray")
"""Colour spaces of which RGB is made while decoding; Pillow converts the others."""


@dataclass(frozen=True)
class StoredJpeg:
    """Stands in for the uint8 [height, width, 3] of a JPEG of which only the header was read."""

    data: Buffer
    height: int
    width: int
    mirrored: bool = False
    """Left to right. `pixels` are not yet."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, 3

    def mirror(self) -> StoredJpeg:
        return dataclasses.replace(self, mirrored=not self.mirrored)

    def pixels(self, scale: float = 1.0) -> tuple[np.ndarray, int]:
        """uint8 [H, W, 3] and the divisor: the largest that leaves no less than `scale` times the stored sides.

        H = ceil(height / divisor), W alike: the last ones may lie partly beyond the edge.
        Raises ValueError "image: reason" as decoding it whole does.
        """
        large_enough = min(self.height, self.width) >= SMALLEST
        divisor = next((each for each in DIVISORS if large_enough and scale * each <= 1), 1)
        size = (-(-self.height // divisor), -(-self.width // divisor))
        pixels_HW3 = jpeg_rgb(self.data, size if divisor > 1 else (0, 0))
        if pixels_HW3 is None or pixels_HW3.shape[:2] != size:
            pixels_HW3, divisor = decode_rgb(self.data), 1
        return pixels_HW3, divisor


def stored_jpeg(data: Buffer) -> StoredJpeg | None:
    """None for what is no JPEG, and for one that is converted by Pillow or refused."""
    if bytes(data[:2]) != JPEG_MAGIC:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return StoredJpeg(data, height, width) if height * width <= MAX_PIXELS and space in SPACES else None

"""Which part of a row's picture becomes codes, and what must be true of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ofa_ds.data.image import decode
from ofa_ds.data.tsv import NUM_CODES, PIXELS_PER_CODE
from ofa_ds.vision.code_rows import CodeTask
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.sources import Pictures

JPEG_QUALITY = 95
"""Of pictures that are made square."""


class Part(NamedTuple):
    pixels: np.ndarray
    """uint8 [H, H, 3]: what the codes are of."""
    code_image_size: int
    """The side that it is brought to, in pixels."""


@dataclass(frozen=True, kw_only=True)
class What:
    """What is encoded of each picture. Picklable."""

    task: CodeTask
    side: int
    """In pixels. Text to image: the whole picture is squeezed to it. Infilling: pictures are cut to their central
    square and brought to it, and the central half of that is encoded; 0 where they are square already and stay."""

    def __post_init__(self) -> None:
        multiple = PIXELS_PER_CODE * (1 if self.whole else 2)
        if self.side % multiple or (self.whole and not self.side):
            raise ValueError(f"--side: want a multiple of {multiple} for {self.task.name}, got {self.side}")

    @property
    def whole(self) -> bool:
        return self.task.family == "downstream"

    def stored(self, image: bytes) -> bytes:
        """The picture of the row that is written. Raises ValueError "image: reason"."""
        if self.whole or not self.side:
            return image
        pixels = decode(image)
        if pixels.shape[:2] == (self.side, self.side):
            return image
        square = min(pixels.shape[:2])
        _need_a_code(pixels)
        top, left = ((length - square) // 2 for length in pixels.shape[:2])
        cut = Image.fromarray(pixels[top : top + square, left : left + square])
        out = io.BytesIO()
        cut.resize((self.side, self.side), Image.Resampling.LANCZOS).save(
            out, "JPEG", quality=JPEG_QUALITY, subsampling=0
        )
        return out.getvalue()

    def part(self, image: bytes) -> Part:
        """Of a picture as it comes. Raises ValueError "image: reason"."""
        pixels = decode(self.stored(image))
        _need_a_code(pixels)
        if self.whole:
            if pixels.shape[:2] != (self.side, self.side):
                squeezed = Image.fromarray(pixels).resize((self.side, self.side), Image.Resampling.LANCZOS)
                pixels = np.asarray(squeezed)
            return Part(pixels, self.side)
        height, width = pixels.shape[:2]
        if height != width or height % (2 * PIXELS_PER_CODE):
            raise ValueError(
                f"image: want a square whose side is a multiple of {2 * PIXELS_PER_CODE}, got {width} x {height}; "
                "--side 256 cuts and resizes pictures of a TSV file or a folder"
            )
        quarter = height // 4
        return Part(pixels[quarter : 3 * quarter, quarter : 3 * quarter], height // 2)

    def part_of(self, pictures: Pictures, i: int) -> Part:
        """Raises ValueError with the picture's place."""
        try:
            return self.part(pictures.encoded(i))
        except ValueError as error:
            raise ValueError(f"{pictures.name(i)}: {error}") from error


def _need_a_code(pixels: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    if min(height, width) < PIXELS_PER_CODE:
        raise ValueError(
            f"image: {width} x {height} pixels are less than one code's, {PIXELS_PER_CODE} x {PIXELS_PER_CODE}"
        )


def need_codes_of_rows(config: VqganConfig, place: str) -> None:
    """Raises ValueError where rows cannot hold a VQGAN's codes."""
    if config.pixels_per_code != PIXELS_PER_CODE:
        raise ValueError(
            f"{place}: has a code for {config.pixels_per_code} x {config.pixels_per_code} pixels; rows have one for "
            f"{PIXELS_PER_CODE} x {PIXELS_PER_CODE}"
        )
    if config.n_embed > NUM_CODES:
        raise ValueError(f"{place}: has {config.n_embed} codes; rows have 0 ... {NUM_CODES - 1}")

"""From stored bytes to the square uint8 picture that the network sees, boxes moved along.

docs/ofa.md, Tasks: pictures.

Every random choice is drawn from the generator that is passed in. Legend: H, W pixels; 3 is RGB; N boxes.
Images are uint8 [H, W, 3]. Boxes are float32 [N, 4]: x0, y0, x1, y1 in pixels of the picture they come with.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ofa_ds.data.tsv import IMAGE_FORMATS, MAX_PIXELS

try:
    import simplejpeg
except ImportError:  # Pillow decodes the same bits, at about 0.8 of the speed
    simplejpeg = None

JPEG_MAGIC = b"\xff\xd8"

SHORT_SIDE_RANGE = 480 / 384
"""The largest random short side, relative to the network's picture."""

LONG_SIDE_LIMIT = 672 / 384
"""Longer sides are squeezed to this, relative to the network's picture."""

JITTER_RANGE = 1.5
"""The largest random scale of detection and infilling pictures."""

Buffer = bytes | bytearray | memoryview


class Framed(NamedTuple):
    """A picture and the boxes in its own pixels."""

    image: np.ndarray
    boxes: np.ndarray


def decode(data: Buffer) -> np.ndarray:
    """The picture as uint8 [H, W, 3], as stored: no EXIF turn (boxes are in stored pixels), transparency dropped.

    Raises ValueError: not a picture, truncated, or one that claims over MAX_PIXELS.
    """
    if simplejpeg is not None and bytes(data[:2]) == JPEG_MAGIC:
        try:
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            if height * width <= MAX_PIXELS:
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # CMYK and the like: Pillow converts them, and words the error where it cannot either
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(
                        f"claims {picture.width} x {picture.height} pixels, at most {MAX_PIXELS} are decoded"
                    )
                return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"image of {len(data)} bytes cannot be decoded: {error}") from error


def resize(image_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic, within 2 of Pillow's and 2.4 times as fast."""
    if image_HW3.shape[:2] == (height, width):
        return image_HW3
    if not image_HW3.flags.writeable:
        image_HW3 = image_HW3.copy()  # torch warns about read-only memory
    image_13HW = torch.from_numpy(image_HW3)[None].permute(0, 3, 1, 2)  # these strides take torch's fast path
    out_13HW = torch.nn.functional.interpolate(image_13HW, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(out_13HW[0].permute(1, 2, 0).numpy())


def resize_framed(framed: Framed, height: int, width: int) -> Framed:
    """Picture and boxes at a new size; the two axes may be scaled differently. Boxes end at the picture's edge."""
    old_height, old_width = framed.image.shape[:2]
    scale_x, scale_y = width / old_width, height / old_height
    scale_4 = np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
    edge_4 = np.array([width, height, width, height], np.float32)  # rounding may have carried a box past it
    return Framed(resize(framed.image, height, width), (framed.boxes * scale_4).clip(0, edge_4))


def random_resize(framed: Framed, side: int, rng: np.random.Generator) -> Framed:
    """Short side uniform over the integers side ... 1.25 side; then each side is clipped to 1.75 side."""
    short = int(rng.integers(side, round(side * SHORT_SIDE_RANGE) + 1))
    limit = round(side * LONG_SIDE_LIMIT)
    height, width = framed.image.shape[:2]
    if width < height:
        height, width = int(short * height / width), short
    else:
        height, width = short, int(short * width / height)
    return resize_framed(framed, min(height, limit), min(width, limit))


def center_crop(image_HW3: np.ndarray, side: int) -> np.ndarray:
    height, width = image_HW3.shape[:2]
    top, left = round((height - side) / 2), round((width - side) / 2)
    return np.ascontiguousarray(image_HW3[top : top + side, left : left + side])


def box_crop(framed: Framed, side: int) -> Framed:
    """A side x side crop around the first box, kept inside the picture.

    The boxes move by the exact offset, the pixels by the rounded one: at most half a pixel apart, as in the original.
    """
    height, width = framed.image.shape[:2]
    x0, y0, x1, y1 = (float(value) for value in framed.boxes[0])
    left = max(min((x0 + x1) / 2 - side / 2, width - side), 0.0)
    top = max(min((y0 + y1) / 2 - side / 2, height - side), 0.0)
    boxes_N4 = (framed.boxes - np.array([left, top, left, top], np.float32)).clip(0, side)
    row, column = round(top), round(left)
    return Framed(np.ascontiguousarray(framed.image[row : row + side, column : column + side]), boxes_N4)


def flip(framed: Framed) -> Framed:
    """Mirrored left to right."""
    width = framed.image.shape[1]
    boxes_N4 = framed.boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
    return Framed(np.ascontiguousarray(framed.image[:, ::-1]), boxes_N4 + np.array([width, 0, width, 0], np.float32))


def large_scale_jitter(framed: Framed, side: int, rng: np.random.Generator) -> Framed:
    """Random scale 1 ... 1.5 of the smallest that covers side x side, random crop; boxes are clipped, none dropped."""
    height, width = framed.image.shape[:2]
    short = round(rng.uniform(1.0, JITTER_RANGE) * side)
    scale = max(short / height, short / width)
    scaled = resize_framed(framed, round(height * scale), round(width * scale))
    height, width = scaled.image.shape[:2]
    top, left = int((height - side) * rng.random()), int((width - side) * rng.random())
    boxes_N4 = (scaled.boxes - np.array([left, top, left, top], np.float32)).clip(0, side)
    return Framed(np.ascontiguousarray(scaled.image[top : top + side, left : left + side]), boxes_N4)


def has_area(boxes_N4: np.ndarray) -> np.ndarray:
    """bool [N]: boxes that still cover something after clipping."""
    return (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1])

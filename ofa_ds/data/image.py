"""From stored bytes to the square uint8 picture that the network sees, boxes moved along.

docs/ofa.md, Tasks: pictures.

Every random choice is drawn from the generator that is passed in. Legend: H, W pixels; 3 is RGB; N boxes.
Images are uint8 [H, W, 3]. Boxes are float32 [N, 4]: x0, y0, x1, y1 in pixels of the picture they come with.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from ofa_ds.data.picture import Buffer, decode_rgb
from ofa_ds.data.stored_jpeg import StoredJpeg, stored_jpeg

Picture = np.ndarray | StoredJpeg
"""uint8 [H, W, 3], or what stands in for it until its size on the network's side is known."""

SHORT_SIDE_RANGE = 480 / 384
"""The largest random short side, relative to the network's picture."""

LONG_SIDE_LIMIT = 672 / 384
"""Longer sides are squeezed to this, relative to the network's picture."""

JITTER_RANGE = 1.5
"""The largest random scale of detection and infilling pictures."""

MAX_BETWEEN = 1 << 24
"""Pixels that may lie between the two passes of a resize: 50 MB. Only pictures over 30,000 pixels high need more."""

MAX_SCALED_SIDES = 8
"""A picture that a jitter makes longer than this many of its sides is cut before it is scaled, not after."""

CUBIC_REACH = 2
"""Pixels to either side of a place that bicubic weights reach, in pixels of the smaller of the two pictures."""


class Framed(NamedTuple):
    """A picture and the boxes in its own pixels, as stored; what was resized is an array."""

    image: Picture
    boxes: np.ndarray


def decode(data: Buffer) -> np.ndarray:
    """The picture as uint8 [H, W, 3], as stored: no EXIF turn (boxes are in stored pixels), transparency dropped.

    Raises ValueError "image: reason": not a picture, truncated, over MAX_PIXELS, or grey without a known white.
    """
    stored = stored_jpeg(data)
    return decode_rgb(data) if stored is None else stored.pixels()[0]


def load(data: Buffer, how: Literal["exact", "dct_scaled"]) -> Picture:
    """`decode`, or with `dct_scaled` a JPEG that `resize` decodes no larger than it needs. how: data.decode.

    Raises ValueError as `decode`; of a damaged JPEG `resize` raises it then.
    """
    stored = stored_jpeg(data) if how == "dct_scaled" else None
    return decode(data) if stored is None else stored


def resize(picture_HW3: Picture, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic, within 2 of Pillow's and 2.4 times as fast.

    A stored JPEG is decoded at 1/2, 1/4 or 1/8 where that is no smaller, and resized from there.
    """
    if not isinstance(picture_HW3, StoredJpeg):
        return _resized(picture_HW3, picture_HW3.shape[:2], height, width)
    pixels_HW3, divisor = picture_HW3.pixels(max(height / picture_HW3.height, width / picture_HW3.width))
    if divisor == 1:  # mirrored first, as what was decoded at once
        return resize(_mirrored(pixels_HW3, picture_HW3.mirrored), height, width)
    extent = (picture_HW3.height / divisor, picture_HW3.width / divisor)
    return _mirrored(_resized(pixels_HW3, extent, height, width), picture_HW3.mirrored)


def _mirrored(image_HW3: np.ndarray, is_so: bool) -> np.ndarray:
    return image_HW3[:, ::-1].copy() if is_so else image_HW3  # of one column torch takes no other reversal


def _resized(image_HW3: np.ndarray, extent: tuple[float, float], height: int, width: int) -> np.ndarray:
    """extent: height and width that count, less than a pixel short of those that there are."""
    old_height, old_width = image_HW3.shape[:2]
    if extent == (height, width):
        return image_HW3
    columns_first = width > old_width or old_height > 3 * old_width or old_height * width > MAX_BETWEEN
    if height < old_height and columns_first:  # as Pillow, which rounds between the two; torch goes along rows first
        image_HW3 = _interpolate(image_HW3, (extent[0], old_width), height, old_width)
        extent = (height, extent[1])
    return _interpolate(image_HW3, extent, height, width)


def _interpolate(image_HW3: np.ndarray, extent: tuple[float, float], height: int, width: int) -> np.ndarray:
    if not image_HW3.flags.writeable:
        image_HW3 = image_HW3.copy()  # torch warns about read-only memory
    image_13HW = torch.from_numpy(image_HW3)[None].permute(0, 3, 1, 2)  # these strides take torch's fast path
    wanted: dict[str, tuple[float, float]] = {"size": (height, width)}
    if extent != image_HW3.shape[:2]:  # torch rounds down to the size: a little more makes it that size or one more
        wanted = {"scale_factor": (height / extent[0] * (1 + 1e-9), width / extent[1] * (1 + 1e-9))}
    out_13HW = torch.nn.functional.interpolate(image_13HW, **wanted, mode="bicubic", antialias=True)
    return np.ascontiguousarray(out_13HW[0, :, :height, :width].permute(1, 2, 0).numpy())


def decoded(picture_HW3: Picture) -> np.ndarray:
    """Every pixel, uint8 [H, W, 3]."""
    if not isinstance(picture_HW3, StoredJpeg):
        return picture_HW3
    return _mirrored(picture_HW3.pixels()[0], picture_HW3.mirrored)


def resized_part(picture_HW3: Picture, part: tuple[int, int, int, int], side: int) -> np.ndarray:
    """`part` (top, left, height, width) resized to [side, side, 3]."""
    top, left, height, width = part
    if isinstance(picture_HW3, StoredJpeg):
        pixels_HW3, divisor = picture_HW3.pixels(side / min(height, width))
        if divisor > 1:
            if picture_HW3.mirrored:  # cut from the pixels as stored, then mirrored
                left = picture_HW3.width - left - width
            box = tuple(edge / divisor for edge in (left, top, left + width, top + height))
            part_HW3 = np.array(Image.fromarray(pixels_HW3).resize((side, side), Image.Resampling.BICUBIC, box=box))
            return _mirrored(part_HW3, picture_HW3.mirrored)
        picture_HW3 = _mirrored(pixels_HW3, picture_HW3.mirrored)
    return resize(np.ascontiguousarray(picture_HW3[top : top + height, left : left + width]), side, side)


def part_of_resized(picture_HW3: Picture, size: tuple[int, int], place: tuple[int, int], side: int) -> np.ndarray:
    """What a resize to `size` (height, width) shows at `place` (top, left): [side, side, 3], within 2 of `resize`.

    Costs memory for that part alone, however long the whole would be.
    """
    image_HW3 = decoded(picture_HW3)
    window = []
    for old, new, start in zip(image_HW3.shape[:2], size, place, strict=True):
        first, last = start * old / new, (start + side) * old / new
        reach = math.ceil(CUBIC_REACH * max(old / new, 1)) + 1
        window.append((first, last, max(int(first) - reach, 0), min(int(last) + reach, old)))
    (top, bottom, row, row_end), (left, right, column, column_end) = window
    picture = Image.fromarray(np.ascontiguousarray(image_HW3[row:row_end, column:column_end]))
    box = (left - column, top - row, right - column, bottom - row)
    return np.array(picture.resize((side, side), Image.Resampling.BICUBIC, box=box))


def resize_framed(framed: Framed, height: int, width: int) -> Framed:
    """Picture and boxes at a new size; the two axes may be scaled differently. Boxes end at the picture's edge."""
    return Framed(resize(framed.image, height, width), scale_boxes(framed, height, width))


def scale_boxes(framed: Framed, height: int, width: int) -> np.ndarray:
    """The boxes where the picture is resized to height x width."""
    old_height, old_width = framed.image.shape[:2]
    scale_x, scale_y = width / old_width, height / old_height
    scale_4 = np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
    edge_4 = np.array([width, height, width, height], np.float32)  # rounding may have carried a box past it
    return (framed.boxes * scale_4).clip(0, edge_4)


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
    stored = isinstance(framed.image, StoredJpeg)
    image_HW3 = framed.image.mirror() if stored else _mirrored(framed.image, True)
    boxes_N4 = framed.boxes[:, [2, 1, 0, 3]] * np.array([-1, 1, -1, 1], np.float32)
    return Framed(image_HW3, boxes_N4 + np.array([width, 0, width, 0], np.float32))


def large_scale_jitter(framed: Framed, side: int, rng: np.random.Generator) -> Framed:
    """Random scale 1 ... 1.5 of the smallest that covers side x side, random crop; boxes are clipped, none dropped."""
    height, width = framed.image.shape[:2]
    short = round(rng.uniform(1.0, JITTER_RANGE) * side)
    scale = max(short / height, short / width)
    new_height, new_width = round(height * scale), round(width * scale)
    top, left = int((new_height - side) * rng.random()), int((new_width - side) * rng.random())
    boxes_N4 = scale_boxes(framed, new_height, new_width)
    boxes_N4 = (boxes_N4 - np.array([left, top, left, top], np.float32)).clip(0, side)
    if max(new_height, new_width) > MAX_SCALED_SIDES * side:
        return Framed(part_of_resized(framed.image, (new_height, new_width), (top, left), side), boxes_N4)
    scaled_HW3 = resize(framed.image, new_height, new_width)
    return Framed(np.ascontiguousarray(scaled_HW3[top : top + side, left : left + side]), boxes_N4)


def has_area(boxes_N4: np.ndarray) -> np.ndarray:
    """bool [N]: boxes that still cover something after clipping."""
    return (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1])

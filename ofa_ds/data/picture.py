"""Stored pictures: which are accepted, and how each kind of pixel becomes 8-bit RGB. Build, verify, training share it.

Kept as stored: nothing is turned by EXIF data (but a TIFF by its own tag, which Pillow sees to), transparency and
colour profiles are dropped, and of an animation or a file of several pages the first picture counts.
Legend: H, W pixels.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image

Buffer = bytes | bytearray | memoryview

MAX_PIXELS = 1 << 26
"""Largest picture that is decoded, in pixels (8192 x 8192); a bigger one is taken for a decompression bomb."""

MAX_ASPECT = 100
"""Longer side over shorter side, at most: what is longer shows nothing once it is square, and costs memory."""

MAX_SIDE = 1 << 17
"""Longest side that is decoded, in pixels. MAX_ASPECT keeps what is built now within 81,920."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What may be decoded. Pillow knows more, some of which start other programs (EPS)."""

_BROKEN = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
           struct.error, zlib.error)  # fmt: skip
"""What Pillow's decoders raise on damaged input."""


class _Refused(ValueError):
    """The picture is whole, and not accepted."""


_CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")
"""Pillow's modes whose own conversion to RGB keeps black black and white white."""

_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
"""Modes of unsigned grey with up to 16 bits. Pillow's conversion clips them at 255, which makes them white."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION = 258, 262, 274
"""TIFF tags."""


def check_image(image: Buffer) -> tuple[int, int]:
    """(width, height) of a picture that decodes to its end. Raises ValueError "image: reason".

    Its size is looked at before its pixels are: a decompression bomb costs nothing.
    """
    with _opened(image) as picture:
        width, height = picture.size
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise _Refused(f"{width} x {height}: one side is more than {MAX_ASPECT} times the other; crop the picture")
        _need_known_white(picture)
        if picture.format != "JPEG" or _jpeg_rgb(image) is None:
            picture.load()
        return picture.size  # only now: Pillow turns a TIFF while it loads it


def _jpeg_rgb(image: Buffer, least: tuple[int, int] = (0, 0)) -> np.ndarray | None:
    """A JPEG as uint8 [H, W, 3]; None for a kind that only Pillow converts. Its size was looked at before.

    least: of height and width, to which the DCT may shrink it; not at all where 0.
    Raises _Refused for damage: where data are missing or are no codes, decoders go on, and paint grey or noise.
    """
    try:
        return simplejpeg.decode_jpeg(image, colorspace="RGB", min_height=least[0], min_width=least[1])
    except ValueError as error:
        if str(error).startswith(_DAMAGE):
            what = "truncated" if "remature end" in str(error) else "damaged"
            raise _Refused(f"undecodable, {what}: {error}") from error
        return None


def jpeg_rgb(image: Buffer, least: tuple[int, int] = (0, 0)) -> np.ndarray | None:
    """The same; raises ValueError "image: reason"."""
    try:
        return _jpeg_rgb(image, least)
    except _Refused as error:
        raise ValueError(f"image: {error}") from error


_DAMAGE = ("Corrupt JPEG data", "Premature end", "Invalid", "Bogus")
"""How libjpeg's words for damage begin."""


def decode_rgb(image: Buffer) -> np.ndarray:
    """The picture as uint8 [H, W, 3]. Raises ValueError "image: reason" as `check_image`, but of any proportions."""
    with _opened(image) as picture:
        _need_known_white(picture)
        bits = _wide_bits(picture)
        if bits is None:
            if picture.format == "JPEG":
                _jpeg_rgb(image)  # Pillow decodes what is damaged
            if picture.mode == "La":  # Pillow leads no other way from premultiplied grey to RGB
                picture = picture.convert("LA")
            return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
        grey_HW = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
        if picture.format == "TIFF" and picture.tag_v2.get(_PHOTOMETRIC) == 0:  # "white is zero"
            grey_HW = 255 - grey_HW
        return grey_HW[..., None].repeat(3, -1)


def orientation(image: Buffer) -> int:
    """How a viewer turns the picture that `decode_rgb` gives: 1 not at all, 2 ... 8 as EXIF data number turns."""
    with _opened(image) as picture:
        turn = 1 if picture.format == "TIFF" else picture.getexif().get(_ORIENTATION, 1)
        return turn if turn in range(2, 9) else 1


@contextlib.contextmanager
def _opened(image: Buffer) -> Iterator[Image.Image]:
    """The picture with its pixels not yet read. All that goes wrong inside is a ValueError "image: reason"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and of transparency that is dropped
            with Image.open(io.BytesIO(image), formats=IMAGE_FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS or max(picture.size) > MAX_SIDE:
                    size, most = f"{picture.width} x {picture.height}", f"{MAX_PIXELS} pixels, {MAX_SIDE} a side"
                    raise _Refused(f"{size} pixels are too large to decode; at most {most}")
                yield picture
    except _Refused as error:
        raise ValueError(f"image: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"image: too large to decode: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"image: undecodable: {len(image)} bytes that are no {', '.join(IMAGE_FORMATS)}") from error
    except _BROKEN as error:
        raise ValueError(f"image: undecodable: {error or type(error).__name__}") from error


def _need_known_white(picture: Image.Image) -> None:
    """Raises ValueError for pixels of which the file does not say what is white."""
    if picture.mode not in _CONVERTED and _wide_bits(picture) is None:
        kind = {"I": "32-bit or signed grey", "F": "floating-point grey"}.get(picture.mode, f"mode {picture.mode}")
        raise _Refused(f"{kind} does not say which value is white; store the picture with 8 or 16 unsigned bits")


def _wide_bits(picture: Image.Image) -> int | None:
    """Bits that a grey picture of more than 8 uses of its 16; None for every other picture."""
    if picture.format == "PNG" and picture.mode == "I":  # as Pillow before 11 calls a PNG of 16 bits
        return 16
    if picture.mode not in _WIDE:
        return None
    used = picture.tag_v2.get(_BITS_PER_SAMPLE, (16,)) if picture.format == "TIFF" else (16,)
    return int(used[0] if isinstance(used, tuple) else used)

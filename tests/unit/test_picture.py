"""Stored pictures of every kind: seen as a viewer shows them, or refused with the reason, at build as in training."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peak_memory import PeakMemory
from PIL import Image

from ofa_ds.data import image as pictures
from ofa_ds.data.picture import MAX_ASPECT, MAX_SIDE, check_image, decode_rgb, orientation

RAMP = np.linspace(0, 255, 96).astype(np.uint8)[None].repeat(8, 0)
"""uint8 [8, 96]: black to white."""


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def tiff(samples: bytes, bits: int, *, order: str = "<", white_is_zero: bool = False, kind: int = 1) -> bytes:
    """A TIFF of one strip, 96 x 8. kind: 1 unsigned, 2 signed, 3 floating point."""
    tags = {256: 96, 257: 8, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 0, 277: 1, 278: 8,
            279: len(samples), 339: kind}  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + samples


def packed_12_bits(values: np.ndarray) -> bytes:
    pairs = values.astype(np.uint32).reshape(-1, 2)
    whole = pairs[:, 0] << 12 | pairs[:, 1]
    return np.stack([whole >> 16, whole >> 8 & 255, whole & 255], 1).astype(np.uint8).tobytes()


WIDE = (RAMP.astype(np.uint16) * 257, RAMP.astype(np.uint16) * 16 + 15)
"""The ramp with 16 and with 12 bits."""

GREY = {
    "PNG, 16 bits": encode(Image.fromarray(WIDE[0]), "PNG"),
    "TIFF, 16 bits": tiff(WIDE[0].astype("<u2").tobytes(), 16),
    "TIFF, 16 bits, big endian": tiff(WIDE[0].astype(">u2").tobytes(), 16, order=">"),
    "TIFF, 16 bits, white is zero": tiff((65535 - WIDE[0]).astype("<u2").tobytes(), 16, white_is_zero=True),
    "TIFF, 16 bits, compressed": encode(Image.fromarray(WIDE[0]), "TIFF", compression="tiff_lzw"),
    "TIFF, 12 bits": tiff(packed_12_bits(WIDE[1]), 12),
    "TIFF, 8 bits, white is zero": tiff((255 - RAMP).tobytes(), 8, white_is_zero=True),
} | {f"{kind}, 8 bits": encode(Image.fromarray(RAMP), kind) for kind in ("PNG", "TIFF", "BMP", "GIF")}

UNKNOWN_WHITE = {
    "signed 16 bits": (tiff(WIDE[0].astype("<i2").tobytes(), 16, kind=2), "32-bit or signed grey"),
    "unsigned 32 bits": (tiff(WIDE[0].astype("<u4").tobytes(), 32), "32-bit or signed grey"),
    "signed 32 bits": (encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32-bit or signed grey"),
    "float in 0 ... 1": (encode(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"), "floating-point grey"),
    "float in 0 ... 255": (encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point grey"),
}

COLOUR = [
    ("1", "PNG"), ("1", "TIFF"), ("1", "BMP"), ("L", "JPEG"), ("LA", "PNG"), ("LA", "TIFF"), ("P", "PNG"), ("P", "GIF"),
    ("P", "BMP"), ("P", "TIFF"), ("PA", "TIFF"), ("RGB", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP"), ("RGBA", "PNG"),
    ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("RGBX", "TIFF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"),
    ("YCbCr", "JPEG"), ("LAB", "TIFF"),
]  # fmt: skip


@pytest.mark.parametrize("data", GREY.values(), ids=GREY)
def test_grey_of_any_unsigned_width_looks_like_its_8_bit_picture(data: bytes) -> None:
    assert check_image(data) == (96, 8)
    np.testing.assert_array_equal(decode_rgb(data), RAMP[..., None].repeat(3, -1))


@pytest.mark.parametrize("data, message", UNKNOWN_WHITE.values(), ids=UNKNOWN_WHITE)
def test_grey_without_a_known_white_is_refused_at_build_and_in_training(data: bytes, message: str) -> None:
    for read in (check_image, decode_rgb, pictures.decode):
        with pytest.raises(ValueError, match=f"^image: {message} does not say which value is white; store"):
            read(data)


@pytest.mark.parametrize("mode, kind", COLOUR)
def test_every_other_mode_comes_out_as_the_colours_that_went_in(mode: str, kind: str) -> None:
    tinted = Image.fromarray(np.dstack([RAMP, RAMP[:, ::-1], RAMP // 2 + 60])).convert(mode)
    data = encode(tinted, kind)
    assert check_image(data) == (96, 8)
    want = np.array(tinted.convert("RGB"), int)
    assert np.abs(decode_rgb(data) - want).mean() < (8 if kind in ("JPEG", "WEBP") else 1)


@pytest.mark.parametrize("colour, bits", [("RGB", 16), ("RGBA", 16), ("LA", 16)])
def test_colour_of_16_bits_keeps_its_upper_8(colour: str, bits: int) -> None:
    channels = np.dstack([WIDE[0]] * (len(colour)))
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
    data = png(96, 8, bits, {"RGB": 2, "LA": 4, "RGBA": 6}[colour], raw)
    np.testing.assert_array_equal(decode_rgb(data), RAMP[..., None].repeat(3, -1))


def png(width: int, height: int, bits: int, colour: int, raw: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_transparency_is_dropped_in_a_palette_too() -> None:
    picture = Image.fromarray(RAMP).convert("P")
    data = encode(picture, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode_rgb(data), np.array(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_pictures_the_first_counts(kind: str) -> None:
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    data = encode(first, kind, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2 and check_image(data) == (20, 10)
    red, _, blue = decode_rgb(data)[5, 10]
    assert red > 200 and blue < 50


@pytest.mark.parametrize("size", [(MAX_ASPECT + 1, 1), (1, MAX_ASPECT + 1), (60_000, 1), (2, 2 * MAX_ASPECT + 1)])
def test_strips_are_refused_at_build_and_still_decode(size: tuple[int, int]) -> None:
    data = encode(Image.new("L", size), "PNG")
    with pytest.raises(ValueError, match=f"^image: {size[0]} x {size[1]}: one side is more than 100 times the other"):
        check_image(data)
    assert pictures.decode(data).shape == (size[1], size[0], 3)


def test_a_picture_at_the_limit_of_proportions_is_taken() -> None:
    assert check_image(encode(Image.new("L", (MAX_ASPECT * 2, 2)), "PNG")) == (200, 2)


def test_a_side_beyond_the_limit_is_refused_in_training_too() -> None:
    data = png(MAX_SIDE + 1, 1, 8, 0, bytes(MAX_SIDE + 2))
    with pytest.raises(ValueError, match=f"^image: {MAX_SIDE + 1} x 1 pixels are too large"):
        pictures.decode(data)


@pytest.mark.parametrize("turn", [3, 6])
def test_a_tiff_is_turned_by_its_own_tag_and_has_the_size_of_what_is_seen(turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    data = encode(Image.fromarray(RAMP), "TIFF", exif=exif)
    width, height = check_image(data)
    assert decode_rgb(data).shape == (height, width, 3) and (width < height) == (turn == 6) and orientation(data) == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_the_turn_for_viewers_is_found_and_not_applied(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    data = encode(Image.fromarray(RAMP), kind, exif=exif)
    assert orientation(data) == turn and decode_rgb(data).shape == (8, 96, 3)
    assert orientation(encode(Image.fromarray(RAMP), kind)) == 1


@given(st.sampled_from([*GREY.values(), *(data for data, _ in UNKNOWN_WHITE.values())]), st.data())
def test_what_the_build_takes_the_training_decodes(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for place in draw.draw(st.lists(st.integers(0, len(data) - 1), max_size=3)):
        damaged[place] ^= draw.draw(st.integers(1, 255))
    try:
        width, height = check_image(damaged)
    except ValueError as error:
        assert str(error).startswith("image: ") and "\n" not in str(error)
    else:
        assert pictures.decode(damaged).shape == (height, width, 3)


@pytest.mark.parametrize("mode, kind", COLOUR)
def test_a_single_pixel_is_a_picture(mode: str, kind: str) -> None:
    data = encode(Image.new("RGB", (1, 1), (250, 250, 250)).convert(mode), kind)
    assert check_image(data) == (1, 1)
    for how in ("exact", "dct_scaled"):
        seen = pictures.resize(pictures.load(data, how), 24, 24)
        assert seen.shape == (24, 24, 3) and seen.min() >= 245 and np.ptp(seen, (0, 1)).max() <= 2


def large_jpeg(width: int, height: int, precision: int = 8) -> bytes:
    """A small picture whose header says another size."""
    data = encode(Image.fromarray(RAMP).convert("RGB"), "JPEG")
    at = data.index(b"\xff\xc0") + 4
    return data[:at] + struct.pack(">BHH", precision, height, width) + data[at + 5 :]


def large_gif(width: int, height: int) -> bytes:
    data = encode(Image.fromarray(RAMP).convert("P"), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def large_bmp(width: int, height: int) -> bytes:
    data = encode(Image.fromarray(RAMP), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def large_webp(width: int, height: int) -> bytes:
    data = encode(Image.new("RGBA", (8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGBA", (8, 8), "red")])
    at = data.index(b"VP8X") + 12
    return data[:at] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + data[at + 6 :]


def large_tiff(width: int, height: int) -> bytes:
    data = tiff(RAMP.tobytes(), 8)
    for tag, small, large in ((256, 96, width), (257, 8, height)):
        data = data.replace(struct.pack("<HHII", tag, 4, 1, small), struct.pack("<HHII", tag, 4, 1, large))
    return data


LARGE = {
    "PNG": lambda width, height: png(width, height, 8, 2, b""), "JPEG": large_jpeg, "GIF": large_gif, "BMP": large_bmp,
    "WEBP": large_webp, "TIFF": large_tiff,
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("size", [(10_000, 10_000), (16_000, 12_000)])
def test_a_hundred_megapixels_are_refused_from_the_header_alone(kind: str, size: tuple[int, int]) -> None:
    data = LARGE[kind](*size)
    too_large = "" if kind == "WEBP" else ".*too large"  # its decoder sees the lie before
    with PeakMemory() as peak:
        for read in (check_image, decode_rgb, pictures.decode, scaled):
            with pytest.raises(ValueError, match=f"^image: {too_large}") as error:
                read(data)
            assert "\n" not in str(error.value)
    assert peak.bytes < 30 << 20


def scaled(data: bytes) -> np.ndarray:
    return pictures.resize(pictures.load(data, "dct_scaled"), 9, 9)


def test_a_jpeg_that_lies_about_its_size_below_the_limit_is_refused() -> None:
    for data in (large_jpeg(97, 200), large_jpeg(2000, 2000)):
        for how in ("exact", "dct_scaled"):
            with pytest.raises(ValueError, match="^image: undecodable, (truncated|damaged)"):
                pictures.resize(pictures.load(data, how), 40, 40)


def test_a_jpeg_of_12_bits_is_refused() -> None:
    for read in (check_image, decode_rgb, pictures.decode):
        with pytest.raises(ValueError, match="^image: undecodable"):
            read(large_jpeg(96, 8, precision=12))


def noise(kind: str, **options) -> bytes:
    """A picture whose every part needs its own bytes."""
    pixels = np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


KINDS = {
    "JPEG": noise("JPEG"), "progressive": noise("JPEG", progressive=True), "PNG": noise("PNG"),
    "WEBP": noise("WEBP"), "GIF": noise("GIF"), "BMP": noise("BMP"), "TIFF": noise("TIFF"),
    "packed TIFF": noise("TIFF", compression="tiff_deflate"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(share=st.floats(0, 0.999), ended=st.booleans())
def test_a_picture_that_is_cut_is_refused_or_whole_and_never_partly_grey(kind: str, share: float, ended: bool) -> None:
    data = KINDS[kind]
    # A progressive file that ends after one of its scans is a whole, coarser picture.
    cut = data[: int(share * len(data))] + b"\xff\xd9" * (ended and kind == "JPEG")
    for read in (check_image, decode_rgb, pictures.decode):
        try:
            read(cut)
        except ValueError as error:
            assert str(error).startswith("image: ") and "\n" not in str(error)
        else:
            np.testing.assert_array_equal(decode_rgb(cut), decode_rgb(data), err_msg=read.__name__)


@pytest.mark.parametrize("kind, place", [("JPEG", 0.4), ("JPEG", 0.7), ("JPEG", 0.95), ("progressive", 0.4)])
def test_a_jpeg_with_a_hole_is_refused_at_build_and_in_training(kind: str, place: float) -> None:
    data, at = KINDS[kind], int(place * len(KINDS[kind]))
    holed = data[:at] + bytes(800) + data[at + 800 :]
    Image.open(io.BytesIO(holed)).load()  # which Pillow takes
    for read in (check_image, decode_rgb, pictures.decode):
        with pytest.raises(ValueError, match="image: undecodable, (damaged|truncated): "):
            read(holed)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    data = KINDS["JPEG"]
    np.testing.assert_array_equal(pictures.decode(data + b"more"), pictures.decode(data))
    assert check_image(data + b"more") == (120, 90)

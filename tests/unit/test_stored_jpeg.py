"""`data.decode = "dct_scaled"`: close to exact, never below the wanted size, boxes in place, damage refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ofa_ds.bench.photo_rows import photograph
from ofa_ds.data import image as pictures
from ofa_ds.data import stored_jpeg, strong_augment
from ofa_ds.data.image import Framed, decode, load, resize
from ofa_ds.data.stored_jpeg import StoredJpeg

MEAN, MOST = 1.6, 16
"""In 1/255: how far a scaled photograph may be from the exact one, on average and at its worst pixel."""

NO_BOXES = np.empty((0, 4), np.float32)


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0, **options: object) -> bytes:
    """A JPEG of smooth shapes with texture."""
    picture = Image.open(io.BytesIO(photograph(np.random.default_rng(seed), (width, height)))).convert(mode)
    picture.save(out := io.BytesIO(), "JPEG", quality=85, **options)
    return out.getvalue()


def scaled(data: bytes) -> StoredJpeg:
    loaded = load(data, "dct_scaled")
    assert isinstance(loaded, StoredJpeg)
    return loaded


def both(data: bytes, *, mirrored: bool) -> list[pictures.Picture]:
    """The scaled and the exact one."""
    frames = [Framed(picture, NO_BOXES) for picture in (scaled(data), decode(data))]
    return [pictures.flip(each).image if mirrored else each.image for each in frames]


def assert_close(found: np.ndarray, exact: np.ndarray, mean: float = MEAN, most: float = MOST) -> None:
    apart = np.abs(found.astype(int) - exact)
    assert found.shape == exact.shape and found.flags.c_contiguous
    assert apart.mean() <= mean and apart.max() <= most, f"{apart.mean():.2f} on average, {apart.max()} at most"


def turned(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = turn
    return exif


KINDS = {
    "4:2:0": photo(640, 480),
    "4:4:4": photo(640, 480, subsampling=0),
    "4:2:2": photo(640, 480, subsampling=1),
    "grey": photo(640, 480, "L"),
    "progressive": photo(640, 480, progressive=True),
    "turned by EXIF": photo(640, 480, exif=turned(6)),
    "RGB": photo(640, 480, keep_rgb=True),
    "odd": photo(641, 479),
    "odd at 1/8": photo(647, 487),
    "tall": photo(300, 901),
}


@pytest.mark.parametrize("size", [(200, 230), (100, 90), (51, 37)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_jpeg_is_close_to_the_exact_one_and_was_scaled(kind: str, size: tuple[int, int]) -> None:
    jpeg = scaled(KINDS[kind])
    exact = decode(KINDS[kind])
    assert jpeg.shape == exact.shape
    assert_close(resize(jpeg, *size), resize(exact, *size))
    scale = max(size[0] / jpeg.height, size[1] / jpeg.width)
    pixels, divisor = jpeg.pixels(scale)
    assert divisor == max(each for each in (1, 2, 4, 8) if each * scale <= 1) and (divisor > 1 or kind == "tall")
    assert pixels.shape == (-(-jpeg.height // divisor), -(-jpeg.width // divisor), 3)
    assert pixels.shape[0] >= size[0] and pixels.shape[1] >= size[1]


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(1, 60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_size_comes_out_of_any_other_as_close(width: int, height: int, to_height: int, to_width: int,
                                                  mirrored: bool) -> None:  # fmt: skip
    data = photo(width, height, seed=width)
    frames = [Framed(picture, NO_BOXES) for picture in (load(data, "dct_scaled"), decode(data))]
    found, exact = (
        resize(pictures.flip(each).image if mirrored else each.image, to_height, to_width) for each in frames
    )
    assert_close(found, exact, mean=12, most=64)  # of a few pixels each is a large share


@pytest.mark.parametrize("kind, data", {
    "CMYK": photo(640, 480, "CMYK"), "narrower than 16": photo(15, 640),
}.items())  # fmt: skip
def test_what_is_not_scaled_is_exact(kind: str, data: bytes) -> None:
    loaded = load(data, "dct_scaled")
    assert isinstance(loaded, np.ndarray) == (kind == "CMYK")
    np.testing.assert_array_equal(resize(loaded, 40, 1), resize(decode(data), 40, 1))


@pytest.mark.parametrize("size", [(480, 640), (479, 639), (241, 100), (100, 321), (700, 900)])
def test_a_picture_that_is_less_than_twice_too_large_is_exact(size: tuple[int, int]) -> None:
    data = photo(640, 480)
    np.testing.assert_array_equal(resize(scaled(data), *size), resize(decode(data), *size))
    np.testing.assert_array_equal(*(resize(each, *size) for each in both(data, mirrored=True)))


def test_the_edge_of_an_odd_picture_stays_where_it_is() -> None:
    """321 columns of 1/2 show 641: read as if they showed 642 they would be up to a pixel off at the right edge."""
    pixels = np.zeros((643, 641, 3), np.uint8)
    pixels[:, 620:] = pixels[620:] = 255
    Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG", quality=95)
    for mirrored in (False, True):
        found, exact = (resize(each, 300, 300) for each in both(out.getvalue(), mirrored=mirrored))
        assert_close(found, exact, mean=0.5, most=16)


@pytest.mark.parametrize("part", [(0, 0, 480, 640), (30, 0, 400, 320), (100, 400, 240, 240), (0, 333, 479, 301)])
def test_a_part_of_a_mirrored_picture_is_that_of_the_exact_one(part: tuple[int, int, int, int]) -> None:
    found, exact = (pictures.resized_part(each, part, 96) for each in both(KINDS["4:2:0"], mirrored=True))
    assert scaled(KINDS["4:2:0"]).pixels(96 / min(part[2:]))[1] > 1
    assert_close(found, exact)


def test_pretraining_views_draw_the_same_and_move_boxes_the_same() -> None:
    data = photo(1001, 777)
    box_14 = np.array([[100, 50, 700, 600]], np.float32)

    def views(picture: pictures.Picture) -> list[Framed]:
        rng = np.random.default_rng(5)
        framed = Framed(picture, box_14)
        flipped = pictures.flip(framed)
        return [
            pictures.resize_framed(framed, 96, 96), pictures.random_resize(framed, 96, rng),
            pictures.box_crop(pictures.random_resize(framed, 96, rng), 96),
            pictures.large_scale_jitter(flipped, 96, rng), pictures.large_scale_jitter(framed, 96, rng),
        ]  # fmt: skip

    for found, exact in zip(views(scaled(data)), views(decode(data)), strict=True):
        np.testing.assert_array_equal(found.boxes, exact.boxes)
        assert_close(found.image, exact.image)


def test_a_long_picture_is_cut_before_it_is_scaled_as_when_exact() -> None:
    data = photo(4000, 100)
    frames = [Framed(picture, NO_BOXES) for picture in (scaled(data), decode(data))]
    found, exact = (pictures.large_scale_jitter(each, 32, np.random.default_rng(1)).image for each in frames)
    np.testing.assert_array_equal(found, exact)


def test_parts_for_image_classification_are_close_and_where_they_were() -> None:
    data = photo(1001, 777)
    for seed in range(12):
        found, exact = (strong_augment.random_resized_crop(picture, 64, np.random.default_rng(seed))
                        for picture in (scaled(data), decode(data)))  # fmt: skip
        assert_close(found, exact)


@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "grey"])
def test_damage_is_refused_when_scaled_as_when_exact(kind: str) -> None:
    data, at = KINDS[kind], len(KINDS[kind]) // 2
    holed = data[:at] + bytes(800) + data[at + 800 :]  # of a later scan of a progressive one zeros are codes
    for damaged in (data[:at],) if kind == "progressive" else (data[:at], holed):
        with pytest.raises(ValueError, match="^image: undecodable, (damaged|truncated): ") as exact:
            decode(damaged)
        with pytest.raises(ValueError, match="^image: undecodable, ") as found:
            resize(load(damaged, "dct_scaled"), 100, 100)
        assert str(found.value) == str(exact.value)


def test_exact_is_what_every_pixel_was_decoded_for() -> None:
    assert isinstance(load(KINDS["4:2:0"], "exact"), np.ndarray)


def test_a_decoder_that_gives_another_size_is_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    data = KINDS["odd"]
    other = stored_jpeg.jpeg_rgb(data, (60, 81))
    monkeypatch.setattr(stored_jpeg, "jpeg_rgb", lambda image, least: other)
    np.testing.assert_array_equal(resize(scaled(data), 200, 230), resize(decode_whole(data), 200, 230))


def decode_whole(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))

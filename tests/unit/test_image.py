"""Decoding, resizing, cropping and augmentation: right pixels, boxes that stay on their objects, errors in one line."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peak_memory import PeakMemory
from PIL import Image

from ofa_ds.data import augment, image
from ofa_ds.data.image import Framed
from ofa_ds.data.strong_augment import random_resized_crop


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth noise: something to resize that is neither flat nor white noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def marked(height: int, width: int, box: tuple[int, int, int, int]) -> Framed:
    """A black picture whose box is white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    return Framed(pixels, np.array([box], np.float32))


def bright_box(pixels: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(pixels[..., 0] > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_jpeg_decodes_to_the_bits_that_pillow_gives():
    data = encode(photo(120, 173), "JPEG", quality=80)
    np.testing.assert_array_equal(image.decode(data), np.array(Image.open(io.BytesIO(data))))


def test_a_memoryview_decodes_like_bytes():
    data = encode(photo(40, 30), "JPEG")
    np.testing.assert_array_equal(image.decode(memoryview(data)), image.decode(data))


def test_png_is_lossless_and_loses_its_transparency():
    pixels = np.dstack([photo(9, 7), np.full((9, 7), 10, np.uint8)])
    np.testing.assert_array_equal(image.decode(encode(pixels)), pixels[..., :3])


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_become_rgb(mode):
    out = io.BytesIO()
    Image.fromarray(photo(20, 30)).convert(mode).save(out, "JPEG")
    assert image.decode(out.getvalue()).shape == (20, 30, 3)


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", encode(photo(50, 50), "JPEG")[:600], encode(photo(50, 50))[:200]]
)
def test_garbage_and_truncated_files_are_value_errors_of_one_line(data):
    with pytest.raises(ValueError, match="^image: undecodable") as error:
        image.decode(data)
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused_from_its_header_alone():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_001, 10_001, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="10001 x 10001"):
        image.decode(bomb)


@pytest.mark.parametrize("size", [(384, 480), (100, 90), (700, 33), (217, 217)])
def test_resize_is_within_two_of_pillows_antialiased_bicubic(size):
    pixels = photo(217, 301)
    want = np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))
    got = image.resize(pixels, *size)
    assert got.flags.c_contiguous and np.abs(got.astype(int) - want).max() <= 2


@given(st.integers(4, 90), st.integers(4, 90), st.integers(4, 90), st.integers(4, 90), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_resize_rounds_between_the_two_axes_in_pillows_order(old_height, old_width, height, width, seed):
    """Noise overshoots, and the other order differs by up to 24. Where both axes shrink Pillow's order is not known."""
    assume(height > old_height or width > old_width)
    pixels = np.random.default_rng(seed).integers(0, 256, (old_height, old_width, 3), dtype=np.uint8)
    want = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    assert np.abs(image.resize(pixels, height, width).astype(int) - want).max() <= 4


@given(st.integers(1, 60), st.integers(1, 900), st.booleans(), st.floats(0.3, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_a_part_of_a_resized_picture_is_that_part_of_the_whole(short, long, upright, scale, data):
    side = 16
    pixels = photo(long, short) if upright else photo(short, long)
    size = tuple(max(round(length * scale), side) for length in pixels.shape[:2])
    top, left = (data.draw(st.integers(0, length - side)) for length in size)
    want = image.resize(pixels, *size)[top : top + side, left : left + side]
    got = image.part_of_resized(pixels, size, (top, left), side)
    assert got.shape == want.shape and np.abs(got.astype(int) - want).max() <= 2


def test_a_tall_picture_resizes_the_same_with_a_small_limit_between_the_passes(monkeypatch):
    pixels = photo(900, 20)
    want = image.resize(pixels, 60, 50)
    monkeypatch.setattr(image, "MAX_BETWEEN", 1000)
    np.testing.assert_allclose(image.resize(pixels, 60, 50).astype(int), want, atol=2)


@pytest.mark.parametrize("height, width", [(1, 60_000), (60_000, 1), (1, 131_072), (131_072, 1), (3, 20_000)])
@pytest.mark.parametrize("change", ["jitter", "random_resize", "resize"])
def test_a_strip_costs_no_more_memory_than_the_picture_and_the_result(change, height, width):
    """Shards of earlier versions may hold such strips; the build refuses them."""
    framed = Framed(np.zeros((height, width, 3), np.uint8), np.array([[0, 0, width, height]], np.float32))
    rng = np.random.default_rng(0)
    with PeakMemory() as peak:
        if change == "jitter":
            out = image.large_scale_jitter(framed, 256, rng)
        elif change == "random_resize":
            out = image.random_resize(framed, 384, rng)
        else:
            out = image.resize_framed(framed, 384, 384)
    assert min(out.image.shape[:2]) >= 256 and peak.bytes < 80 << 20


def test_jitter_of_a_long_picture_is_what_it_is_of_any_other(monkeypatch):
    framed = Framed(photo(20, 500), np.array([[100, 2, 300, 15]], np.float32))
    parts = [image.large_scale_jitter(framed, 32, np.random.default_rng(seed)) for seed in range(8)]
    monkeypatch.setattr(image, "MAX_SCALED_SIDES", 1000)
    for seed, part in enumerate(parts):
        whole = image.large_scale_jitter(framed, 32, np.random.default_rng(seed))
        np.testing.assert_array_equal(part.boxes, whole.boxes)
        assert np.abs(part.image.astype(int) - whole.image).max() <= 2


def test_resize_moves_each_axis_of_a_box_by_its_own_factor():
    out = image.resize_framed(marked(100, 200, (20, 10, 60, 40)), 200, 300)
    np.testing.assert_allclose(out.boxes, [[30, 20, 90, 80]])


def test_random_short_sides_cover_384_to_480_and_long_sides_end_at_672():
    rng = np.random.default_rng(0)
    wide = Framed(photo(50, 100), np.empty((0, 4), np.float32))
    sides = {image.random_resize(wide, 384, rng).image.shape[:2] for _ in range(600)}
    shorts = {height for height, _ in sides}
    assert min(shorts) == 384 and max(shorts) == 480 and len(shorts) > 90
    assert max(width for _, width in sides) == 672
    assert all(width == min(2 * height, 672) for height, width in sides)


@given(st.integers(0, 2**32 - 1), st.integers(30, 90), st.integers(30, 90), st.data())
@settings(max_examples=60, deadline=None)
def test_a_box_crop_keeps_the_box_on_its_object(seed, height, width, data):
    x0, y0 = data.draw(st.integers(0, width - 4)), data.draw(st.integers(0, height - 4))
    x1, y1 = data.draw(st.integers(x0 + 3, width)), data.draw(st.integers(y0 + 3, height))
    rng = np.random.default_rng(seed)
    side = 48
    resized = image.random_resize(marked(height, width, (x0, y0, x1, y1)), side, rng)
    out = image.box_crop(resized, side)
    assert out.image.shape == (side, side, 3) and out.boxes.min() >= 0 and out.boxes.max() <= side
    assert np.abs(bright_box(out.image) - out.boxes[0]).max() <= 1.5
    # never further from the middle than the edge of the picture forces
    center = (resized.boxes[0, :2] + resized.boxes[0, 2:]) / 2
    size = np.array(resized.image.shape[1::-1])
    offset = np.clip(center - side / 2, 0, size - side)
    np.testing.assert_allclose(out.boxes[0], (resized.boxes[0] - np.tile(offset, 2)).clip(0, side), atol=1e-3)


def test_flip_mirrors_pixels_and_boxes():
    out = image.flip(marked(20, 30, (2, 3, 9, 8)))
    np.testing.assert_array_equal(out.boxes, [[21, 3, 28, 8]])
    np.testing.assert_array_equal(bright_box(out.image), out.boxes[0])


@pytest.mark.parametrize("height, width", [(1, 1), (40, 1), (1, 40)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("how", ["exact", "dct_scaled"])
def test_a_picture_of_one_pixel_row_or_column_goes_every_way_of_training(kind, how, height, width):
    data = encode(np.full((height, width, 3), 200, np.uint8), kind, **({"quality": 95} if kind == "JPEG" else {}))
    framed = Framed(image.load(data, how), np.array([[0, 0, width, height]], np.float32))
    rng = np.random.default_rng(0)
    for each in (framed, image.flip(framed)):
        views = [
            image.resize_framed(each, 32, 32).image, image.large_scale_jitter(each, 32, rng).image,
            image.box_crop(image.random_resize(each, 32, rng), 32).image,
            image.center_crop(image.random_resize(each, 32, rng).image, 32),
            random_resized_crop(each.image, 32, rng),
        ]  # fmt: skip
        assert all(view.shape == (32, 32, 3) and np.abs(view.astype(int) - 200).max() <= 2 for view in views)


def test_jitter_scales_between_one_and_one_and_a_half_and_keeps_boxes_on_objects():
    rng = np.random.default_rng(1)
    scales, offsets = [], []
    for _ in range(300):
        out = image.large_scale_jitter(marked(60, 80, (20, 20, 50, 40)), 64, rng)
        assert out.image.shape == (64, 64, 3)
        if image.has_area(out.boxes)[0]:
            assert np.abs(bright_box(out.image) - out.boxes[0]).max() <= 1.5
        inside = (out.boxes[0] > 0) & (out.boxes[0] < 64)
        if inside[1] and inside[3]:
            scales.append((out.boxes[0, 3] - out.boxes[0, 1]) / 20 * 60 / 64)
            offsets.append(out.boxes[0, 1])
    assert 0.98 < min(scales) < 1.1 and 1.4 < max(scales) < 1.53
    assert np.ptp(offsets) > 10


def test_boxes_without_area_after_clipping_are_found():
    boxes = np.array([[0, 0, 5, 5], [3, 3, 3, 9], [4, 7, 9, 7]], np.float32)
    assert image.has_area(boxes).tolist() == [True, False, False]


# RandomAugment ---------------------------------------------------------------------------------------------------


def test_augment_draws_every_operation_and_each_half_of_the_time(monkeypatch):
    calls: list[str] = []
    stand_ins = {
        name: (lambda pixels, sign, name=name: calls.append((name, sign)) or pixels) for name in augment.OPERATIONS
    }
    monkeypatch.setattr(augment, "OPERATIONS", stand_ins)
    rng = np.random.default_rng(0)
    rounds = 4000
    for _ in range(rounds):
        augment.random_augment(np.zeros((8, 8, 3), np.uint8), rng)
    assert abs(len(calls) / (2 * rounds) - 0.5) < 0.02
    names = [name for name, _ in calls]
    assert all(abs(names.count(name) / len(names) - 0.1) < 0.02 for name in stand_ins) and len(stand_ins) == 10
    assert abs(sum(sign for _, sign in calls) / len(calls)) < 0.05


@pytest.mark.parametrize("name", augment.OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_operation_keeps_size_and_type_and_leaves_its_input_alone(name, sign):
    pixels = photo(40, 56) // 2 + 40
    before = pixels.copy()
    out = augment.OPERATIONS[name](pixels, sign)
    assert out.shape == pixels.shape and out.dtype == np.uint8
    np.testing.assert_array_equal(pixels, before)
    assert name == "identity" or (out != before).any()


def test_equalize_and_contrast_agree_with_pillow():
    from PIL import ImageOps

    pixels = photo(64, 48)
    np.testing.assert_array_equal(augment.equalize(pixels), np.array(ImageOps.equalize(Image.fromarray(pixels))))
    low = (pixels // 2 + 30).astype(np.uint8)
    assert (
        np.abs(augment.auto_contrast(low).astype(int) - np.array(ImageOps.autocontrast(Image.fromarray(low)))).max()
        <= 1
    )


def test_flat_pictures_survive_equalize_and_contrast():
    flat = np.full((5, 6, 3), 77, np.uint8)
    np.testing.assert_array_equal(augment.equalize(flat), flat)
    np.testing.assert_array_equal(augment.auto_contrast(flat), flat)


def test_sharpness_agrees_with_pillow_and_clips_where_the_original_wraps_round():
    from PIL import ImageEnhance

    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8)
    want = np.array(ImageEnhance.Sharpness(Image.fromarray(pixels)).enhance(1.36))
    assert np.abs(augment.sharpness(pixels).astype(int) - want).max() <= 1


def test_brightness_multiplies_by_1_36():
    pixels = np.array([[[0, 100, 250]]], np.uint8)
    assert augment.brightness(pixels).tolist() == [[[0, 136, 255]]]


def test_translation_is_seven_pixels_and_fills_with_grey():
    pixels = photo(20, 24)
    right = augment.translate_x(pixels, 1)
    np.testing.assert_array_equal(right[:, 7:], pixels[:, :-7])
    assert (right[:, :7] == 128).all()
    np.testing.assert_array_equal(augment.translate_y(pixels, -1)[:-7], pixels[7:])


def test_geometric_operations_agree_with_opencv():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is only the reference here")
    pixels = photo(96, 96)
    turned = cv2.getRotationMatrix2D((47.5, 47.5), 21, 1)
    for ours, matrix in [
        (augment.rotate(pixels, 1), turned),
        (augment.shear_x(pixels, -1), np.float32([[1, 0.21, 0], [0, 1, 0]])),
        (augment.shear_y(pixels, -1), np.float32([[1, 0, 0], [0.21, 1, 0]])),
    ]:
        want = cv2.warpAffine(pixels, matrix, (96, 96), borderValue=(128, 128, 128))
        assert np.mean(np.abs(ours.astype(int) - want)) < 1.5

"""The judge of painted scenes: right on drawn ones, also blurred, noisy or compressed, and sees nothing in noise."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ofa_ds.data import scenes
from ofa_ds.data.scenes import COLORS, GROUND, KINDS, SIDE, Draw, Scene, Shape
from ofa_ds.data.scenes_judge import WHERE, Said, compare, judge, look_at, parse

SCENES = [scenes.any_scene(Draw(7, "train", "judge", i)) for i in range(60)]


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def jpeg(picture: np.ndarray, quality: int = 50) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=quality)
    return np.array(Image.open(data))


def blurred(picture: np.ndarray, radius: float = 1.5) -> np.ndarray:
    return np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noisy(picture: np.ndarray, deviation: float = 25) -> np.ndarray:
    noise = np.random.default_rng(int(picture.sum())).normal(0, deviation, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def faded(picture: np.ndarray) -> np.ndarray:
    """Colours halfway to others of the palette are not reached, but are off by a tint and less contrast."""
    return (picture * 0.8 + np.array([40, 25, 20])).astype(np.uint8)


DAMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda picture: picture,
    "JPEG 50": jpeg,
    "blur": blurred,
    "noise": noisy,
    "all three": lambda picture: jpeg(noisy(blurred(picture, 1.2), 12)),
    "256 pixels": lambda picture: jpeg(resized(picture, 256)),
    "32 pixels": lambda picture: resized(picture, 32),
    "faded": faded,
}


def looks(scene: Scene) -> list[tuple[str, str]]:
    return sorted((shape.kind, shape.color) for shape in scene)


@pytest.mark.parametrize("damage", DAMAGES)
def test_drawn_scenes_are_seen_as_drawn(damage: str) -> None:
    right = 0
    for scene in SCENES:
        found = look_at(DAMAGES[damage](scenes.paint(scene)))
        right += sorted((each.kind, each.color) for each in found) == looks(scene)
    assert right >= 0.99 * len(SCENES)


def test_places_and_sizes_are_those_drawn_to_a_pixel() -> None:
    for scene in SCENES[:30]:
        for found, shape in zip(look_at(noisy(scenes.paint(scene))), scene, strict=True):
            assert np.abs(np.array(found.center) * 2 * SIDE - shape.center2).max() <= 3
            assert abs(found.size * SIDE - shape.size) <= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("color", COLORS)
def test_the_one_big_shape_of_infilling_is_seen(kind: str, color: str) -> None:
    for size, place in ((40, 8), (44, 12), (48, 16)):
        (found,) = look_at(jpeg(scenes.paint((Shape(kind, color, size, place, 8),))))
        assert (found.kind, found.color) == (kind, color)


def test_nothing_is_seen_where_no_scene_is() -> None:
    rng = np.random.default_rng(0)
    ground = np.full((SIDE, SIDE, 3), GROUND, np.uint8)
    pictures = [ground, noisy(ground, 60), np.zeros_like(ground), np.full_like(ground, 255)]
    pictures += [np.full_like(ground, color) for color in COLORS.values()]
    for side in (4, 8, 16, 32, 64):  # noise, from coarse to fine
        for _ in range(8):
            noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            pictures += [resized(noise, SIDE), np.array(Image.fromarray(noise).resize((SIDE, SIDE), 0))]
    seen = [i for i, picture in enumerate(pictures) if look_at(picture)]
    assert len(seen) <= len(pictures) // 100, seen


def test_a_verdict_tells_colours_kinds_and_places_apart() -> None:
    scene = (Shape("circle", "red", 24, 0, 8), Shape("square", "blue", 16, 40, 24))
    picture = jpeg(scenes.paint(scene))
    verdicts = {
        "a red circle above a blue square": (True, True, True, True),
        "a red circle left of a blue square": (True, True, True, True),
        "a blue square right of a red circle": (True, True, True, True),
        "A blue  square below a red circle": (True, True, True, True),
        "a red circle below a blue square": (True, True, True, False),
        "a blue square left of a red circle": (True, True, True, False),
        "a blue circle above a red square": (True, True, False, False),
        "a red triangle above a blue square": (True, False, False, False),
        "a green circle above a blue square": (False, True, False, False),
        "a red circle": (False, False, False, None),
    }
    for caption, verdict in verdicts.items():
        assert judge(picture, caption) == verdict, caption
    assert judge(scenes.paint(scene[:1]), "a red circle") == (True, True, True, None)
    assert judge(np.full((SIDE, SIDE, 3), GROUND, np.uint8), "a red circle") == (False, False, False, None)


def test_two_shapes_of_one_colour_or_one_kind_are_two() -> None:
    scene = (Shape("circle", "red", 16, 0, 0), Shape("square", "red", 16, 24, 24))
    assert judge(scenes.paint(scene), "a red circle above a red square") == (True, True, True, True)
    assert judge(scenes.paint(scene), "a red circle") == (False, False, False, None)


def test_shuffled_captions_are_seldom_right() -> None:
    found = [look_at(scenes.paint(scene)) for scene in SCENES]
    verdicts = [compare(a, parse(scenes.caption(b))) for a, b in zip(found, SCENES[1:], strict=False)]
    assert np.mean([verdict.color for verdict in verdicts]) < 0.2
    assert np.mean([verdict.shape for verdict in verdicts]) < 0.35


def test_captions_of_scenes_are_read_back_and_others_refused() -> None:
    for scene in SCENES:
        want = tuple((shape.kind, shape.color) for shape in scene)
        assert parse(scenes.caption(scene)) == Said(want, "above" if len(scene) == 2 else "")
    for where in WHERE:
        assert parse(f"a red circle {where} a white triangle").where == where
    for text in ("", "a red", "a red circle above", "a red circle near a blue square", "a pink circle", "red circle"):
        with pytest.raises(ValueError, match="no caption of a scene: want `a COLOR KIND`") as error:
            parse(text)
        assert "\n" not in str(error.value)

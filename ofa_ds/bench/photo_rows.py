"""Shards of all four families with pictures like photographs, drawn from a seed: what a loader has to decode."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab, load_vocab, train_vocab

SIZE = (480, 360)
"""Width and height of a photograph, as most of the web's pictures have about."""
SQUARE = 256
"""Side of pictures that have image codes."""
QUALITY = 85
NUM_CODES = 1024
WORDS = (
    "a man on two dogs the street in front of old red house with some people and near water green cat table sits white "
    "large small tree standing under bridge woman holding umbrella city light train window"
).split()


def photograph(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> bytes:
    """JPEG of smooth shapes with texture: 480 x 360 are about 39 KB, as photographs of that size and quality are."""
    coarse = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
    texture = rng.normal(0, 5.5, (size[1], size[0], 1))
    out = io.BytesIO()
    Image.fromarray(np.clip(smooth + texture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def make(folder: Path, rows: int = 96, seed: int = 1) -> tuple[Shards, Vocab]:
    """Shards with `rows` rows of each family, and a small vocabulary."""
    rng = np.random.default_rng(seed)
    sources: dict[str, list[Path]] = {}
    for family, line in (("vision_language", _pair), ("text", _text), ("image", _image), ("detection", _detection)):
        sources[family] = [folder / f"{family}.tsv"]
        lines = ["\t".join([f"{family}{i}", *line(rng, i)]) for i in range(rows)]
        sources[family][0].write_text("\n".join(lines) + "\n")
    build_shards(folder / "shards", **sources, workers=1)
    train_vocab([_words(rng, 12) for _ in range(400)], 400, folder / "vocab", num_codes=NUM_CODES, num_bins=1000)
    return Shards(folder / "shards"), load_vocab(folder / "vocab")


def _words(rng: np.random.Generator, number: int) -> str:
    return " ".join(WORDS[k] for k in rng.integers(0, len(WORDS), number))


def _picture(rng: np.random.Generator, size: tuple[int, int] = SIZE) -> str:
    return base64.b64encode(photograph(rng, size)).decode()


def _box(rng: np.random.Generator) -> str:
    x, y = rng.integers(0, SIZE[0] // 2), rng.integers(0, SIZE[1] // 2)
    return f"{x},{y},{x + SIZE[0] // 3},{y + SIZE[1] // 3}"


def _pair(rng: np.random.Generator, i: int) -> list[str]:
    picture, words = _picture(rng), _words(rng, 10)
    if i % 3 == 0:
        return [picture, words, "", "", _words(rng, 1), "photos", "caption"]
    if i % 3 == 1:
        return [picture, "", f"what is {words}?", f"1.0|!+{_words(rng, 1)}", _words(rng, 1), "photos", "qa"]
    return [picture, words, "", _box(rng), "", "photos", "visual_grounding"]


def _text(rng: np.random.Generator, _: int) -> list[str]:
    return [_words(rng, 300)]


def _image(rng: np.random.Generator, _: int) -> list[str]:
    return [_picture(rng, (SQUARE, SQUARE)), " ".join(map(str, rng.integers(0, NUM_CODES, (SQUARE // 16) ** 2)))]


def _detection(rng: np.random.Generator, _: int) -> list[str]:
    objects = (f"{_box(rng)},{k},{WORDS[k]}" for k in rng.integers(0, len(WORDS), 7))
    return [_picture(rng), "&&".join(objects)]

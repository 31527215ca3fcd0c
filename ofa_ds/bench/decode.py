"""From a stored JPEG to the network's picture: `data.decode` exact and dct_scaled, beside plain Pillow.

Plain Pillow decodes the whole and resizes it with its bicubic. All three go over the same pictures in turn, in one
thread; times are CPU, which neighbours move less.
"""

from __future__ import annotations

import base64
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ofa_ds.bench.photo_rows import photograph
from ofa_ds.data.image import center_crop, load, resize

SIZES = ((480, 360), (640, 480), (1280, 960), (2048, 1536), (4000, 3000))
"""Width and height of drawn photographs."""
FEW_PIXELS = 30_000_000
"""Of the drawn photographs of one size, together, at most."""
SIDE, SHORT_SIDE = 384, 432
"""The network's picture in pixels, and the middle of the short sides that pretraining draws before it is cut out."""

PILLOW, EXACT, SCALED = "Pillow", "exact", "dct_scaled"
Way = Callable[[bytes, bool], np.ndarray]
"""(JPEG, whether its middle is cut out) -> uint8 [SIDE, SIDE, 3]."""


def _pillow(data: bytes, cut: bool) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = _size((picture.height, picture.width), cut)
    pixels_HW3 = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    return center_crop(pixels_HW3, SIDE) if cut else pixels_HW3


def _ours(how: str) -> Way:
    def way(data: bytes, cut: bool) -> np.ndarray:
        picture = load(data, how)  # type: ignore[arg-type]
        pixels_HW3 = resize(picture, *_size(picture.shape[:2], cut))
        return center_crop(pixels_HW3, SIDE) if cut else pixels_HW3

    return way


WAYS: dict[str, Way] = {PILLOW: _pillow, EXACT: _ours("exact"), SCALED: _ours("dct_scaled")}


def _size(stored: Sequence[int], cut: bool) -> tuple[int, int]:
    """Height and width of the resized picture."""
    if not cut:
        return SIDE, SIDE
    scale = SHORT_SIDE / min(stored)
    return round(stored[0] * scale), round(stored[1] * scale)


def bench_decode(tsv: Path | None, number: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Pictures and view -> milliseconds a picture of each way, and how far apart their pixels are, in 1/255.

    tsv: its second column holds JPEGs; `number` different ones are taken, beside as many drawn ones of each size.
    Raises OSError, or ValueError for a file that holds none.
    """
    sets = {} if tsv is None else {tsv.name: _of_file(tsv, number)}
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        few = max(min(number, FEW_PIXELS // (width * height)), 1)
        sets[f"{width} x {height}"] = [photograph(rng, (width, height)) for _ in range(few)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            f"{name}, {view}": _one(photos, cut, repeats)
            for name, photos in sets.items()
            for view, cut in ((f"whole as {SIDE} x {SIDE}", False), (f"short side {SHORT_SIDE}, middle", True))
        }
    finally:
        torch.set_num_threads(threads)


def _of_file(tsv: Path, number: int) -> list[bytes]:
    found: dict[bytes, None] = {}
    with tsv.open("rb") as file:
        for line in file:
            columns = line.rstrip(b"\n").split(b"\t")
            found[base64.urlsafe_b64decode(columns[1].translate(_URL_SAFE)) if len(columns) > 1 else b""] = None
            if len(found) == number:
                break
    photos = [data for data in found if data.startswith(b"\xff\xd8")]
    if not photos:
        raise ValueError(f"{tsv}: want JPEGs in base64 in the second column, found none")
    return photos


_URL_SAFE = bytes.maketrans(b"+/", b"-_")


def _one(photos: Sequence[bytes], cut: bool, repeats: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for k in range(repeats + 1):  # the first is for the caches
        for name, way in WAYS.items():
            began = time.process_time()
            for data in photos:
                way(data, cut)
            if k:
                taken[name].append((time.process_time() - began) / len(photos) * 1e3)
    result: dict[str, Any] = {"pictures": len(photos)}
    result["ms"] = {name: statistics.median(times) for name, times in taken.items()}
    result["apart"] = {"exact, Pillow": _apart(photos, cut, EXACT, PILLOW),
                       "dct_scaled, exact": _apart(photos, cut, SCALED, EXACT)}  # fmt: skip
    return result


def _apart(photos: Sequence[bytes], cut: bool, one: str, other: str) -> dict[str, float]:
    """Mean over all pixels, and the largest of any."""
    gaps = [np.abs(WAYS[one](data, cut).astype(np.int16) - WAYS[other](data, cut)) for data in photos]
    return {"mean": float(np.mean([gap.mean() for gap in gaps])), "most": int(max(gap.max() for gap in gaps))}


def table(result: dict[str, dict[str, Any]]) -> str:
    head = (
        f"{'CPU ms a picture':54}{'number':>7}{'Pillow':>8}{'exact':>8}{'':8}{'apart':>6}{'dct':>9}{'':8}{'apart':>12}"
    )
    lines = [head]
    for name, each in result.items():
        pillow, exact, scaled = (each["ms"][way] for way in (PILLOW, EXACT, SCALED))
        near, far = each["apart"]["exact, Pillow"], each["apart"]["dct_scaled, exact"]
        lines.append(
            f"{name:54}{each['pictures']:7}{pillow:8.2f}{exact:8.2f}{pillow / exact:7.2f}x{near['most']:6}{scaled:9.2f}"
            f"{exact / scaled:7.2f}x{far['mean']:7.2f}, {far['most']:3}"
        )
    lines.append("Apart in 1/255: exact from Pillow, at most; dct_scaled from exact, on average and at most.")
    return "\n".join(lines)

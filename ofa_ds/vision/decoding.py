"""Image codes -> PNG files, or one sheet of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import check_space, new_directory, sync
from ofa_ds.vision.code_rows import CodeRow
from ofa_ds.vision.coder import GPU_BATCH, Coders
from ofa_ds.vision.scenes_coder import ScenesCoder

SHEET_GAP = 2
"""Pixels between the pictures of a sheet."""


def paint_files(rows: Iterator[CodeRow], coders: Coders | ScenesCoder, out: Path, *, limit: int) -> int:
    """A new directory with a PNG of each row, in order, and how many they are. limit: of that many at most.

    Named by number and id. Raises ValueError, OSError, and leaves nothing.
    """
    progress, count = Progress(limit, "painting", "pictures"), 0
    with new_directory(out) as folder:
        try:
            rows = islice(rows, limit)
            while part := list(islice(rows, GPU_BATCH)):
                pictures = coders.paint([row.codes for row in part], [row.place for row in part])
                check_space(folder, sum(picture.nbytes for picture in pictures), len(pictures))
                for row, picture in zip(part, pictures, strict=True):
                    path = folder / f"{count:06d}_{_NOT_IN_A_NAME.sub('_', row.id)[:80]}.png"
                    Image.fromarray(picture).save(path)
                    sync(path)
                    count += 1
                progress.add(len(part))
        finally:
            progress.close()
        if not count:
            raise ValueError("no row has codes")
    return count


_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]")


def paint_sheet(rows: Sequence[CodeRow], coders: Coders | ScenesCoder) -> Image.Image:
    """All on one sheet, as near to a square as it goes. Raises ValueError where there are none."""
    if not rows:
        raise ValueError("no row has codes")
    return sheet_of(coders.paint([row.codes for row in rows], [row.place for row in rows]))


def sheet_of(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Pictures uint8 [H, W, 3], at least one, row by row."""
    columns = math.ceil(math.sqrt(len(pictures)))
    height, width = (max(picture.shape[axis] for picture in pictures) + SHEET_GAP for axis in (0, 1))
    sheet = Image.new("RGB", (columns * width - SHEET_GAP, -(-len(pictures) // columns) * height - SHEET_GAP), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (k % columns * width, k // columns * height))
    return sheet

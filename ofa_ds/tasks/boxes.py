"""Boxes as the vocabulary's coordinate bins, and back. Legend: N boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.judges import Box, Objects


def bin_ids(boxes_N4: np.ndarray, ctx: Context) -> list[list[int]]:
    """Vocabulary ids of each box: round-half-even in float32, over max_image_size (not the picture's size)."""
    scaled_N4 = boxes_N4.astype(np.float32) / np.float32(ctx.config.max_image_size) * np.float32(ctx.vocab.num_bins - 1)
    return [[ctx.vocab.bin(int(k)) for k in box] for box in np.rint(scaled_N4)]


def readable_bins(ids: Iterable[int], ctx: Context) -> str:
    return " ".join(f"<bin_{token - ctx.vocab.bin_start}>" for token in ids)


def boxes_of(ctx: Context, ids: Sequence[int]) -> list[Box]:
    """The boxes among generated ids, each four bins in a row, in pixels of the network's picture."""
    return [box for box, _ in objects_of(ctx, ids)]


def objects_of(ctx: Context, ids: Sequence[int]) -> Objects:
    """Boxes with the text that follows each; bins that do not come in fours are skipped."""
    found: Objects = []
    bins: list[int] = []
    words: list[int] = []
    for token in ids:
        if ctx.vocab.is_bin(token):
            if words and found:
                found[-1] = (found[-1][0], ctx.vocab.decode(words).strip())
            words = []
            bins.append(token)
            if len(bins) == 4:
                found.append((_box(ctx, bins), ""))
                bins = []
        else:
            bins = []
            words.append(token)
    if words and found:
        found[-1] = (found[-1][0], ctx.vocab.decode(words).strip())
    return found


def expected_objects(example: Example) -> Objects:
    """The boxes that an example holds, with their names."""
    names = example.labels or ("",) * len(example.boxes)
    return list(zip((tuple(map(float, box)) for box in example.boxes), names, strict=True))


def _box(ctx: Context, bins: Sequence[int]) -> Box:
    pixels_a_bin = ctx.config.max_image_size / (ctx.vocab.num_bins - 1)
    x0, y0, x1, y1 = ((token - ctx.vocab.bin_start) * pixels_a_bin for token in bins)
    return x0, y0, x1, y1

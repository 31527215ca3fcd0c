"""The codes of `scenes` as pictures, by the rule that made them: no VQGAN is needed, and none is more exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ofa_ds.data import scenes
from ofa_ds.vision.files import CONFIG, RELEASED_CONFIG

NAME = "scenes"
"""Given in place of a VQGAN's directory."""


def names_scenes(folder: Path) -> bool:
    """Whether the rule is meant: it is named, and no VQGAN is in a directory of that name."""
    return str(folder) == NAME and not any((folder / name).is_file() for name in (CONFIG, RELEASED_CONFIG))


class ScenesCoder:
    """Paints as `Coder` does."""

    pixels_per_code = scenes.CELL
    num_codes = scenes.NUM_CODES

    def paint(self, codes: Sequence[np.ndarray], names: Sequence[str] = ()) -> list[np.ndarray]:
        """Codes of a square picture each, in any shape -> uint8 [side, side, 3]; codes that the rule never gives black.

        Raises ValueError "NAME: ..." (else "codes N: ...") for a number of them that no square has, or one outside.
        """
        return [self._one(names[k] if names else f"codes {k}", each) for k, each in enumerate(codes)]

    def _one(self, name: str, codes: np.ndarray) -> np.ndarray:
        if codes.size < 1 or math.isqrt(codes.size) ** 2 != codes.size:
            raise ValueError(f"{name}: want as many codes as a square has, got {codes.size}")
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            outside = int(codes.min()) if codes.min() < 0 else int(codes.max())
            raise ValueError(f"{name}: want 0 ... {self.num_codes - 1} of the codebook, got {outside}")
        return scenes.picture_of_codes(codes.flatten().tolist())

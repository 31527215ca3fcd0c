"""Between 8-bit pictures and what a VQGAN takes and paints (docs/ofa.md; the original's code extraction)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_input(image_HW3: np.ndarray, short_side: int) -> Tensor:
    """uint8 RGB [H, W, 3] -> float32 [3, h, w] in [-1, 1]: shorter side resized to `short_side` by Lanczos, no crop."""
    height, width = image_HW3.shape[:2]
    if min(height, width) != short_side:
        if height < width:
            height, width = short_side, int(short_side * width / height)
        else:
            height, width = int(short_side * height / width), short_side
        image_HW3 = np.asarray(Image.fromarray(image_HW3).resize((width, height), Image.Resampling.LANCZOS))
    pixels_3HW = torch.from_numpy(np.array(image_HW3)).permute(2, 0, 1).to(torch.float32) / 255
    return 2.0 * pixels_3HW - 1.0


def to_picture(x_3HW: Tensor) -> np.ndarray:
    """What a decoder painted, any range -> uint8 [H, W, 3]: cut to [-1, 1], then fractions are cut off.

    Raises ValueError where a value is not finite, which would become some grey.
    """
    if not torch.isfinite(x_3HW).all():
        raise ValueError("the painted picture has values that are not finite; are the weights damaged?")
    pixels_3HW = (x_3HW.clamp(-1, 1) + 1) / 2 * 255
    return pixels_3HW.permute(1, 2, 0).cpu().numpy().astype(np.uint8)

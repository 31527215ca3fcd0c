"""TSVs of all four families with pictures of a few pixels, for tests that need shards."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(side: tuple[int, int], seed: int) -> str:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def write_sources(folder: Path) -> dict[str, list[Path]]:
    """Small TSVs of all four families."""
    kinds = [
        ("a cat {i} on a mat", "", "", "cat", "coco", "caption"),
        ("", "what is {i}?", "1.0|!+cat {i}", "", "vqa", "qa"),
        ("the cat {i}", "", "3,4,30,20", "", "refcoco", "visual_grounding"),
    ]
    vision_language = [
        "\t".join([f"vl{i}", picture((50, 40), i), *(text.format(i=i) for text in kinds[i % 3])]) for i in range(21)
    ]
    lines = {
        "vision_language": vision_language,
        "text": [f"t{i}\tthe cat {i} sat on the mat and looked at the dog" for i in range(7)],
        "image": [f"i{i}\t{picture((32, 32), i)}\t{' '.join(str((i + k) % 8) for k in range(4))}" for i in range(5)],
        "detection": [f"d{i}\t{picture((50, 40), i)}\t1,2,30,35,1,cat&&5,5,20,20,2,dog" for i in range(5)],
    }
    paths = {}
    for family, text in lines.items():
        paths[family] = [folder / f"{family}.tsv"]
        paths[family][0].write_text("\n".join(text) + "\n")
    return paths

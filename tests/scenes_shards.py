"""The embedded data as a training run wants it, small."""

from pathlib import Path

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.scenes import write_scenes
from ofa_ds.tasks.texts import train_from_shards


def build(folder: Path, rows: int) -> Path:
    """folder/shards and folder/vocab, from `rows` vision-language rows; returns the folder."""
    write_scenes(folder, rows=rows, seed=1)
    tsv = {name: [folder / f"{name}_examples.tsv"] for name in ("vision_language", "text", "image", "detection")}
    build_shards(folder / "shards", **tsv, negatives=folder / "negative_sample", workers=1)
    train_from_shards(folder / "shards", size=300, out=folder / "vocab", num_codes=128, num_bins=64)
    return folder

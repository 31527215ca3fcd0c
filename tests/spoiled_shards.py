"""Shards in which a picture was damaged after they were built."""

from __future__ import annotations

from pathlib import Path

from ofa_ds.data.shards import Shards


def spoil(folder: Path, family: str, row: int) -> str:
    """Zero the middle of a row's picture, in place; returns the row's id."""
    found = Shards(folder).row(family, row)
    image = bytes(found["image"])
    for file in sorted(folder.glob(f"{family}-*.arrow")):
        data = file.read_bytes()
        at = data.find(image)
        if at >= 0:
            middle, end = at + len(image) // 2, at + len(image) // 2 + 16
            file.write_bytes(data[:middle] + bytes(end - middle) + data[end:])
            return found["id"]
    raise AssertionError(f"{folder}: the picture of {family} row {row} is in no file")

"""Pictures that are to be encoded, by number: of a TSV file, a folder, or the rows of one family of shards."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ofa_ds.data.building.tsv_source import is_compressed, source_file
from ofa_ds.data.shards import Shards
from ofa_ds.vision.code_rows import CodeTask
from ofa_ds.vision.sources import Pictures, open_pictures


class RowPictures(Pictures):
    """Of the rows of a task."""

    def __init__(self, path: Path, task: CodeTask) -> None:
        self.shards, self._task = Shards(path), task
        if self._task.family not in self.shards.families:
            raise ValueError(f"{path}: has no rows of {task.name}, only {', '.join(self.shards.families)}")
        if others := sorted(set(self.shards.types) - {task.name}) if task.family == "downstream" else ():
            raise ValueError(f"{path}: has rows of {others[0]}, want {task.name}")
        self.fingerprint = self.shards.fingerprint

    def __len__(self) -> int:
        return self.shards.families[self._task.family]

    def encoded(self, i: int) -> bytes:
        image = bytes(self.shards.fields(self._task.family, i, ["image"])["image"])
        if not image:
            raise ValueError("the row has no picture")
        return image

    def name(self, i: int) -> str:
        return self.shards.named(self._task.family, i)


@lru_cache(maxsize=2)
def opened(path: Path, task: CodeTask, run: str) -> Pictures:
    """run: of one command; what a process keeps open is of it alone. Raises ValueError."""
    if is_shards(path):
        return RowPictures(path, task)
    if path.is_file() and is_compressed(source_file(str(path))):
        raise ValueError(f"{path}: is compressed; unpack it, as several processes read it at once")
    return open_pictures(path)


def is_shards(path: Path) -> bool:
    return (path / "manifest.json").is_file()

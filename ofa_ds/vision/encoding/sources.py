"""Pictures that are to be encoded, by number: of a TSV file, a folder, or the rows of one family of shards."""

from __future__ import annotations

from pathlib import Path

from ofa_ds.data.building.tsv_source import is_compressed, source_file
from ofa_ds.vision.code_rows import CodeTask
from ofa_ds.vision.sources import Pictures, ShardPictures, open_pictures


def opened(path: Path, task: CodeTask) -> Pictures:
    """Raises ValueError."""
    if (path / "manifest.json").is_file():
        return _rows_of(path, task)
    if path.is_file() and is_compressed(source_file(str(path))):
        raise ValueError(f"{path}: is compressed; unpack it, as several processes read it at once")
    return open_pictures(path)


def _rows_of(path: Path, task: CodeTask) -> ShardPictures:
    found = ShardPictures(path, [task.family])
    shards = found.shards
    if not len(found):
        raise ValueError(f"{path}: has no rows of {task.name}, only {', '.join(shards.families)}")
    if others := sorted(set(shards.types) - {task.name}) if task.family == "downstream" else ():
        raise ValueError(f"{path}: has rows of {others[0]}, want {task.name}")
    return found

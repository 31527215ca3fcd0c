"""Notes of all pieces put together: one file per source of bad lines, of what is wrong with each, of doubts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from ofa_ds.data.building.piece_builder import BAD_LINES, BAD_REASONS, DOUBTS, At, Built, Job, encoded

PLACES = {BAD_LINES: "quarantine/{}.tsv", BAD_REASONS: "quarantine/{}.log", DOUBTS: "warnings/{}.log"}
"""Where the notes of a source end up."""

_ENDS = (".gz", ".zst", ".tsv")


class Lines:
    """Numbers of records in their files, of pieces that only count from where they begin."""

    def __init__(self, jobs: Sequence[Job], built: Sequence[Built]) -> None:
        self._before: dict[tuple[str, int, int], int] = {}
        seen: dict[tuple[str, str], int] = {}
        for job, done in zip(jobs, built, strict=False):  # a build that stops has not done them all
            for part, (file, counts) in enumerate(zip(job.piece.files, done.parts, strict=True)):
                name = (job.family, file.location)
                self._before[job.family, job.number, part] = seen.get(name, 0)
                seen[name] = seen.get(name, 0) + counts.records
        self._seen = seen

    def number(self, job: Job, at: At) -> int:
        """Of a record, from 1 in its file."""
        name = (job.family, job.piece.files[at.part].location)
        return at.number + self._before.get((job.family, job.number, at.part), self._seen.get(name, 0))

    def place(self, job: Job, at: At, place: str = "") -> str:
        """file:line of a record."""
        return f"{job.piece.files[at.part].location}:{place or self.number(job, at)}"


def gather(folder: Path, jobs: Sequence[Job], lines: Lines) -> None:
    """Into `folder`: bad lines as they came, reasons and doubts with file and line."""
    names = _file_names(jobs)
    for job in jobs:
        for part, file in enumerate(job.piece.files):
            for suffix, place in PLACES.items():
                path = job.note(part, suffix)
                if not path.exists():
                    continue
                target = folder / place.format(names[file.location])
                target.parent.mkdir(exist_ok=True)
                with target.open("ab") as out, path.open("rb") as found:
                    if suffix == BAD_LINES:
                        shutil.copyfileobj(found, out)
                    else:
                        out.writelines(_messages(job, part, found, lines))


def _messages(job: Job, part: int, file: BinaryIO, lines: Lines) -> Iterator[bytes]:
    for line in file:
        number, place, message = json.loads(line)
        yield encoded(f"{lines.place(job, At(part, number), place)}: {message}\n")


def _file_names(jobs: Sequence[Job]) -> Mapping[str, str]:
    """Location -> a name of its own for its notes."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for job in jobs:
        for file in job.piece.files:
            if file.location in names:
                continue
            stem = file.name
            for end in _ENDS:
                stem = stem.removesuffix(end)
            name = stem if stem not in taken else f"{stem}-{len(names)}"
            names[file.location] = name
            taken.add(name)
    return names


def add_warning(folder: Path, jobs: Sequence[Job], location: str, message: bytes) -> None:
    """A warning about a whole data set, after those of one of its sources."""
    target = folder / PLACES[DOUBTS].format(_file_names(jobs)[location])
    target.parent.mkdir(exist_ok=True)
    with target.open("ab") as out:
        out.write(message)

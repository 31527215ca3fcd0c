"""Codes of many pictures, chunk by chunk on all processes, each kept as soon as it is there.

A chunk has a file of text, a line of codes a picture, in order. What a killed process left goes on at the first line
that is not whole; nothing is done twice but the batch that was under way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing import current_process
from pathlib import Path

import torch

from ofa_ds.data.building.work import CODES
from ofa_ds.data.pool import run_jobs
from ofa_ds.engine.host_memory import keep_freed_memory
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import replace_file
from ofa_ds.vision.coder import GPU_BATCH, Coders, this_device
from ofa_ds.vision.encoding.what import What, need_codes_of_rows
from ofa_ds.vision.files import load_vqgan
from ofa_ds.vision.sources import Pictures

MIN_CHUNK, MAX_CHUNKS = 4, 1000
"""Batches of a chunk at least; chunks of a source, about, at most."""

_LINE = re.compile(rb"\d+( \d+)*\n")


@dataclass(frozen=True)
class Chunk:
    """Some pictures of a source, which one process encodes into a file. Picklable."""

    pictures: Pictures
    what: What
    model: Path
    file: Path
    run: str


@dataclass(frozen=True)
class Journal:
    """Where the codes of a command are kept until all is written. folder: of the files."""

    folder: Path
    num_rows: int
    chunk_rows: int

    @classmethod
    def of(cls, folder: Path, num_rows: int) -> Journal:
        least = MIN_CHUNK if this_device() == "cpu" else MIN_CHUNK * GPU_BATCH
        return cls(folder, num_rows, max(least, -(-num_rows // MAX_CHUNKS)))

    def file(self, number: int) -> Path:
        return self.folder / f"{CODES}-{number:05d}.txt"

    def texts(self, first: int, stop: int) -> Iterator[str]:
        """Codes of rows `first` ... `stop` - 1, with blanks between."""
        while first < stop:
            number, skipped = divmod(first, self.chunk_rows)
            with self.file(number).open(encoding="ascii") as lines:
                for line in islice(lines, skipped, skipped + stop - first):
                    yield line.rstrip("\n")
                    first += 1

    def fill(self, pictures: Pictures, what: What, model: Path, key: str, *, workers: int, run: str) -> None:
        """Encode what is not there yet. key: what codes depend on; files of another one are dropped.

        Raises ValueError with the place of a picture that cannot be encoded, RuntimeError where a process dies.
        """
        known = self.folder / f"{CODES}.key"
        if not known.is_file() or known.read_text() != key:
            for path in self.folder.glob(f"{CODES}*"):
                path.unlink()
            replace_file(known, key)
        starts = range(0, self.num_rows, self.chunk_rows)
        jobs = [
            Chunk(pictures.piece(first, min(first + self.chunk_rows, self.num_rows)), what, model, self.file(n), run)
            for n, first in enumerate(starts)
        ]
        progress = Progress(self.num_rows, "encoding", "pictures")
        left = [job for job in jobs if _lines(job.file) < len(job.pictures)]
        progress.skip(self.num_rows - sum(len(job.pictures) for job in left))
        try:
            for job, _ in zip(left, run_jobs(encode_chunk, left, workers), strict=True):
                progress.add(len(job.pictures))
        finally:
            progress.close()


def encode_chunk(chunk: Chunk) -> None:
    """Runs in a worker, on one core of a processor or on one GPU."""
    keep_freed_memory()  # each picture wants the same blocks as the one before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # another number adds up in another order
    try:
        _encode(chunk)
    finally:
        torch.set_num_threads(threads)


def _encode(chunk: Chunk) -> None:
    pictures, coders = chunk.pictures, _coders(chunk.model, chunk.run)
    done = _lines(chunk.file, cut=True)
    step = GPU_BATCH if coders.device.type == "cuda" else 1
    with chunk.file.open("ab") as file:
        for first in range(done, len(pictures), step):
            numbers = range(first, min(first + step, len(pictures)))
            names = [pictures.name(i) for i in numbers]
            parts = [chunk.what.part_of(pictures, i) for i in numbers]
            pixels, sides = [part.pixels for part in parts], [part.code_image_size for part in parts]
            for codes in coders.encode(pixels, sides, names):
                file.write(" ".join(map(str, codes.ravel().tolist())).encode() + b"\n")
            file.flush()  # and not synced: after a power failure, lines from the first that is not whole are made again


def _lines(path: Path, *, cut: bool = False) -> int:
    """Whole lines at the start of a chunk's file. cut: drop what comes after them."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return 0
    count = end = 0
    while (line := _LINE.match(found, end)) is not None:
        count, end = count + 1, line.end()
    if cut and end < len(found):
        os.truncate(path, end)
    return count


@lru_cache(maxsize=1)
def _coders(model: Path, run: str) -> Coders:
    number = current_process().name.rpartition("-")[2]
    found = load_vqgan(model, device=this_device(int(number) if number.isdigit() else 0), say=_told_before)
    need_codes_of_rows(found.config, str(model))
    return Coders(found)


def _told_before(message: str) -> None:
    """The command has loaded the model once, and said it."""

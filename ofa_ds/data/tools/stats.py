"""What is in shards: rows, bytes, lengths, sizes, boxes, how a vocabulary fits, pictures that are there twice.

Everything is counted in one pass by several processes, in memory that does not grow with the rows: lengths and sizes as
counts of each value, hashes of pictures in files by their first bits.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ofa_ds.data.manifest import Manifest, read_manifest
from ofa_ds.data.pool import need_one_process, run_jobs
from ofa_ds.data.text import clean_caption, clean_question
from ofa_ds.data.tools.chunks import Chunk, chunks_of
from ofa_ds.data.tools.sweep import record_batches
from ofa_ds.data.tsv import PIXELS_PER_CODE
from ofa_ds.data.vocab import Vocab, load_vocab
from ofa_ds.progress import Progress

HASH_FILES = 64
"""Hashes of 10^9 pictures are looked at 125 MB at a time."""


@dataclass
class Rows:
    """Of rows of one family and type."""

    rows: int = 0
    picture_bytes: int = 0
    text_bytes: int = 0
    values: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """What was measured -> value -> how often."""

    def add(self, other: Rows) -> None:
        self.rows += other.rows
        self.picture_bytes += other.picture_bytes
        self.text_bytes += other.text_bytes
        for name, counts in other.values.items():
            self.values[name].update(counts)


@dataclass
class Coverage:
    """Of the texts by a vocabulary: as the tasks clean them, with a space before each."""

    texts: int = 0
    characters: int = 0
    tokens: int = 0
    unknown: int = 0
    """Tokens that are <unk>."""
    size: int = 0
    """Text entries of the vocabulary."""
    used: set[int] = field(default_factory=set)
    """Which of them occur."""

    def add(self, other: Coverage) -> None:
        self.texts += other.texts
        self.characters += other.characters
        self.tokens += other.tokens
        self.unknown += other.unknown
        self.size = max(self.size, other.size)
        self.used |= other.used


@dataclass
class Pictures:
    """By the hash of their bytes, over all families."""

    rows: int = 0
    """That have one."""
    different: int = 0
    most: int = 0
    """Rows that the most frequent one has."""


@dataclass
class Stats:
    path: Path
    manifest: Manifest
    kinds: dict[str, Rows] = field(default_factory=lambda: defaultdict(Rows))
    """"family" or "family type" -> its rows."""
    coverage: Coverage | None = None
    pictures: Pictures = field(default_factory=Pictures)


@dataclass
class Counted:
    """Of a chunk."""

    kinds: dict[str, Rows]
    coverage: Coverage
    hashes: np.ndarray
    """uint64 [pictures]."""


def shards_stats(path: Path, *, vocab: Path | None = None, workers: int = 2) -> Stats:
    """Raises ValueError for what is no shards or vocabulary, RuntimeError where rows are damaged, OSError."""
    need_one_process("shards stats")
    found = Stats(path, read_manifest(path), coverage=Coverage() if vocab else None)
    if vocab:
        load_vocab(vocab)  # a wrong one is told here, not by a worker
    chunks = []
    for chunk in chunks_of(path, found.manifest):
        if not isinstance(chunk, Chunk):
            raise chunk
        chunks.append(chunk)
    progress = Progress(sum(chunk.num_bytes for chunk in chunks) >> 20, "counting", "MB")
    with tempfile.TemporaryDirectory() as folder:
        hashes = _HashFiles(Path(folder))
        try:
            for chunk, counted in zip(chunks, run_jobs(partial(_count, vocab=vocab), chunks, workers), strict=True):
                for kind, rows in counted.kinds.items():
                    found.kinds[kind].add(rows)
                if found.coverage is not None:
                    found.coverage.add(counted.coverage)
                hashes.add(counted.hashes)
                progress.add(chunk.num_bytes / (1 << 20))
        finally:
            progress.close()
        found.pictures = hashes.counted()
    return found


class _HashFiles:
    def __init__(self, folder: Path) -> None:
        self._paths = [folder / str(number) for number in range(HASH_FILES)]

    def add(self, hashes: np.ndarray) -> None:
        numbers = hashes % np.uint64(HASH_FILES)
        for number in np.unique(numbers).tolist():
            with self._paths[number].open("ab") as file:
                file.write(hashes[numbers == number].tobytes())

    def counted(self) -> Pictures:
        found = Pictures()
        for path in self._paths:
            if path.exists():
                _, counts = np.unique(np.fromfile(path, np.uint64), return_counts=True)
                found.rows += int(counts.sum())
                found.different += len(counts)
                found.most = max(found.most, int(counts.max()))
        return found


def _count(chunk: Chunk, *, vocab: Path | None) -> Counted:
    """Runs in a worker."""
    kinds: dict[str, Rows] = defaultdict(Rows)
    coverage = Coverage()
    hashes = []
    read = _vocab(vocab) if vocab else None
    for file, batch in record_batches(chunk):
        for i in file.rows_of(batch):
            row = file.row(i)
            kind = f"{chunk.family} {row['type']}" if "type" in row else chunk.family
            _count_row(kinds[kind], row)
            if row.get("image"):
                hashes.append(xxhash.xxh3_64_intdigest(row["image"]))
            if read is not None:
                _cover(coverage, read, row)
    return Counted(dict(kinds), coverage, np.array(hashes, np.uint64))


@lru_cache(maxsize=1)
def _vocab(path: Path) -> Vocab:
    return load_vocab(path)


def _count_row(rows: Rows, row: Mapping[str, Any]) -> None:
    rows.rows += 1
    for name, text in texts_of(row):
        rows.text_bytes += len(text.encode())
        rows.values[f"{name}: words"][len(text.split())] += 1
    if "answers" in row:
        rows.values["answers a row"][len(row["answers"])] += 1
    if row.get("image"):
        rows.picture_bytes += len(row["image"])
        rows.values["picture: KB"][len(row["image"]) >> 10] += 1
        width = row.get("width", round(len(row.get("codes", ())) ** 0.5) * 2 * PIXELS_PER_CODE)
        rows.values["picture: width"][width] += 1
        rows.values["picture: height"][row.get("height", width)] += 1
    if "boxes" in row or row.get("box"):
        _count_boxes(rows, np.array(row.get("boxes", [row.get("box")]), np.float64), row)


def _count_boxes(rows: Rows, boxes_N4: np.ndarray, row: Mapping[str, Any]) -> None:
    rows.values["boxes a row"][len(boxes_N4)] += 1
    area = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    for percent in (100 * area / max(row["width"] * row["height"], 1)).tolist():
        rows.values["box: % of picture"][round(percent)] += 1


def texts_of(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what it is, text) of every text of a row that a model reads or writes."""
    for name in ("caption", "question", "text", "text_pair"):
        if row.get(name):
            yield name, row[name]
    for text, _ in row.get("answers", ()):
        yield "answer", text
    for name in ("gt_objects", "objects", "cat_names"):
        for text in row.get(name, ()):
            yield "object", text


def _cover(coverage: Coverage, vocab: Vocab, row: Mapping[str, Any]) -> None:
    coverage.size = vocab.mask
    for name, text in texts_of(row):
        if name in ("caption", "question"):
            text = (clean_caption if name == "caption" else clean_question)(text)
        ids = vocab.encode(f" {text}")
        coverage.texts += 1
        coverage.characters += len(text) + 1
        coverage.tokens += len(ids)
        coverage.unknown += ids.count(vocab.unk)
        coverage.used.update(ids)

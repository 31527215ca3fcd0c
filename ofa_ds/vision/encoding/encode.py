"""`ofa-ds codes encode`: rows get the codes of their pictures, as new shards or as a new TSV file.

Codes come first, into the journal of a work directory beside the target; then all is written. What is written depends
on the pictures, the VQGAN and the kind of device, not on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ofa_ds.data.building.build import LINE_BYTES, How, build_pieces, refuse_target
from ofa_ds.data.building.source import Piece
from ofa_ds.data.building.work import JOURNAL, PLAN, work_directory
from ofa_ds.data.manifest import NEGATIVES
from ofa_ds.data.pool import need_one_process
from ofa_ds.data.tsv import PIXELS_PER_CODE
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import check_space, place_file, refuse_inside, sync
from ofa_ds.vision.coder import Coder, this_device
from ofa_ds.vision.encoding.journal import Journal
from ofa_ds.vision.encoding.row_pieces import pieces_of
from ofa_ds.vision.encoding.sources import opened
from ofa_ds.vision.encoding.tsv_lines import caption_of, check_lines, filled_lines, id_of, lines_of_pictures
from ofa_ds.vision.encoding.what import What, need_codes_of_rows
from ofa_ds.vision.files import load_vqgan, model_files
from ofa_ds.vision.sources import Pictures, ShardPictures

VERSION = 1
"""Of what codes depend on; with another one, what a killed command left is dropped."""

CODE_BYTES = 5
"""Of one code as text, with its blank."""

SAMPLED = 8
"""Pictures that say how much is written of each, evenly spaced among all."""


class Encoded(NamedTuple):
    rows: int
    """That have codes now."""
    without_caption: int
    """Pictures of a folder, for text to image, beside which no text lies."""


def encode_codes(source: Path, out: Path, model: Path, what: What, *, workers: int, say: Any = print) -> Encoded:
    """New shards of shards; a new TSV file of one, or of a folder of pictures, whose names become ids.

    say: is told what of a released VQGAN is left out. A command that was killed or stopped goes on where it was. Raises
    ValueError with the place of what does not fit, before anything is encoded where it can be seen then; RuntimeError
    where a process dies, OSError where the disk is full.
    """
    need_one_process("codes encode")
    if what.side and not what.whole and (source / "manifest.json").is_file():
        raise ValueError(f"--side: pictures of shards stay as they are; leave it out, or give a TSV file for {source}")
    loaded = load_vqgan(model, say=say)
    need_codes_of_rows(loaded.config, str(model))
    if what.side:
        Coder(loaded, what.side if what.whole else what.side // 2)  # tells a side that the VQGAN is not for
    job = _Job(source, out, model, what, workers, secrets.token_hex(8))
    if isinstance(job.pictures, ShardPictures):
        job.to_shards(job.pictures)
        return Encoded(len(job.pictures), 0)
    return Encoded(len(job.pictures), job.to_tsv())


@dataclass(frozen=True)
class _Job:
    source: Path
    out: Path
    model: Path
    what: What
    workers: int
    run: str

    @cached_property
    def pictures(self) -> Pictures:
        return opened(self.source, self.what.task)

    @cached_property
    def key(self) -> str:
        """Of what codes depend on."""
        weights = [_checksum(path) for path in model_files(self.model)]
        kind = this_device().partition(":")[0]
        return json.dumps([VERSION, str(self.source.resolve()), self.stamp, weights, repr(self.what), kind])

    @cached_property
    def stamp(self) -> str:
        """As it was in the beginning."""
        return self._stamp()

    def to_shards(self, pictures: ShardPictures) -> None:
        refuse_inside(self.out, self.source)
        placed = self.out / JOURNAL / PLAN
        if not placed.is_file():
            refuse_target(str(self.out), self.out)

        def pieces(work: Path, _: str) -> dict[str, list[Piece]]:
            journal = Journal.of(work / JOURNAL, len(pictures))
            if not placed.is_file():  # of a try that was killed when all was in its place
                self._fill(journal, work)
            return pieces_of(pictures.shards, self.what.task, journal, self.key)

        manifest = pictures.shards.manifest
        own_ids = next((part.own_ids for part in manifest.families.values() if part.own_ids is not None), None)
        build_pieces(
            str(self.out), pieces, How(rows_per_shard=1 << 62, shard_bytes=1 << 62, workers=self.workers),
            negatives=self.source / NEGATIVES if manifest.negatives else None, answers=pictures.shards.answers,
            own_ids=own_ids,
        )  # fmt: skip

    def to_tsv(self) -> int:
        """How many pictures have no caption."""
        if self.source.is_dir():
            refuse_inside(self.out, self.source)
            names = [id_of(self.source, self.pictures, i) for i in range(len(self.pictures))]
            captions = [caption_of(self.pictures, i) for i in range(len(names))] if self.what.whole else []
        else:
            check_lines(self.source, self.what)
            captions = []
        with work_directory(str(self.out), None) as work:
            made = work / self.out.name
            if not (made.is_file() and self.out.is_file() and made.samefile(self.out)):  # else only this was left to do
                if self.out.exists() or self.out.is_symlink():
                    raise ValueError(f"{self.out}: is there already; remove it, or give another --out")
                journal = Journal.of(work / JOURNAL, len(self.pictures))
                self._fill(journal, work)
                self._write(made, journal)
                self._need_no_change()
                place_file(made, self.out)
            shutil.rmtree(work)
        return captions.count("")

    def _fill(self, journal: Journal, work: Path) -> None:
        check_space(work, self._bytes_to_write() - _bytes_in(work), 0)
        journal.fill(self.pictures, self.what, self.model, self.key, workers=self.workers, run=self.run)
        self._need_no_change()

    def _write(self, path: Path, journal: Journal) -> None:
        progress = Progress(len(self.pictures), "writing", "rows")
        try:
            with path.open("wb") as file:
                for line in self._lines(journal.texts(0, len(self.pictures))):
                    file.write(line)
                    progress.add(1)
        finally:
            progress.close()
        sync(path)

    def _lines(self, texts: Iterator[str]) -> Iterator[bytes]:
        if self.source.is_dir():
            return lines_of_pictures(self.source, self.pictures, self.what, texts)
        return filled_lines(self.source, self.what, texts)

    def _files(self) -> list[Path]:
        if isinstance(self.pictures, ShardPictures):
            shards = self.pictures.shards
            return [shards.path / shard.file for part in shards.manifest.families.values() for shard in part.shards]
        if self.source.is_dir():
            return [Path(self.pictures.name(i)) for i in range(len(self.pictures))]
        return [self.source]

    def _stamp(self) -> str:
        """Another one where any file that is read has changed."""
        found = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in self._files()]
        return xxhash.xxh3_128_hexdigest(json.dumps(found).encode())

    def _need_no_change(self) -> None:
        """Raises ValueError where codes might be of other pictures than those that are there now."""
        if self._stamp() != self.stamp:
            raise ValueError(f"{self.source}: changed while it was encoded; begin again, by the same command")

    def _bytes_to_write(self) -> int:
        """About: codes, in the journal and in what is made of it, and all that is copied or stored anew beside them."""
        pictures, what = self.pictures, self.what
        some = sorted({len(pictures) * k // SAMPLED for k in range(SAMPLED)})
        of_all = len(pictures) / len(some)
        codes = sum((what.part_of(pictures, i).code_image_size // PIXELS_PER_CODE) ** 2 for i in some) * of_all
        if what.side and not what.whole:
            stored = sum(len(what.stored(pictures.encoded(i))) for i in some) * of_all * LINE_BYTES
        else:
            is_folder = self.source.is_dir() and not isinstance(pictures, ShardPictures)
            stored = sum(path.stat().st_size for path in self._files()) * (LINE_BYTES if is_folder else 1)
        return int(stored + 2 * codes * CODE_BYTES)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

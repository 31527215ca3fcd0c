"""Lines of a TSV file with codes, made of those of a TSV file or of the pictures of a folder."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path

from ofa_ds.data import tsv
from ofa_ds.data.building.tsv_source import cut, lines_of
from ofa_ds.vision.encoding.what import What
from ofa_ds.vision.sources import Pictures

_GIVEN = {"image_infilling": ("uniq_id", "image"), "text_to_image": ("uniq_id", "image", "caption")}
"""Columns of what comes; the codes may be there as one more, and are made anew."""


def check_lines(path: Path, what: What) -> None:
    """Before anything is encoded: every line has the columns that it should. Raises ValueError with the line."""
    names = _GIVEN[what.task.name]
    for number, line in _lines(path):
        width = line.count(b"\t") + 1
        if width - len(names) not in (0, 1):
            wanted = " ".join([*names, "(code)"])
            raise ValueError(f"{path}:{number}: columns: want {wanted} with tabs between, got {width}")
        try:
            tsv.split(line, names)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error


def filled_lines(path: Path, what: What, codes: Iterable[str]) -> Iterator[bytes]:
    """Lines of a file, the codes of each in its last column."""
    count = len(_GIVEN[what.task.name])
    for (_, line), text in zip(_lines(path), codes, strict=True):
        columns = line.split(b"\t")[:count]
        if what.side and not what.whole:
            image = tsv.decode_base64(columns[1])
            stored = what.stored(image)
            columns[1] = columns[1] if stored is image else base64.b64encode(stored)
        yield b"\t".join([*columns, text.encode()]) + b"\n"


def lines_of_pictures(root: Path, pictures: Pictures, what: What, codes: Iterable[str]) -> Iterator[bytes]:
    """A line of each picture of a folder: its name there, it, of text to image its caption, its codes."""
    for i, text in enumerate(codes):
        columns = [id_of(root, pictures, i).encode(), base64.b64encode(what.stored(pictures.encoded(i)))]
        if what.whole:
            columns.append(caption_of(pictures, i).encode())
        yield b"\t".join([*columns, text.encode()]) + b"\n"


def id_of(root: Path, pictures: Pictures, i: int) -> str:
    """Raises ValueError for a name that no TSV file can hold."""
    name = str(Path(pictures.name(i)).relative_to(root))
    if name != " ".join(name.splitlines()) or "\t" in name or not name.isprintable():
        raise ValueError(f"{root}: {name!r}: want a name of printable characters, as it becomes an id; rename it")
    return name


def caption_of(pictures: Pictures, i: int) -> str:
    """Of the text that lies beside a picture, in one line; empty where none does. Raises ValueError."""
    path = Path(pictures.name(i)).with_suffix(".txt")
    if not path.is_file():
        return ""
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {error.start}") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    return lines_of(cut([str(path)], 1 << 62)[0][0])

"""Foreign data sets -> shards, by the same builder as OFA's TSV files: checked, restartable, with any workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ofa_ds.data.building.build import How, build_pieces
from ofa_ds.data.building.source import Piece, SourceError, source_file
from ofa_ds.data.building.work import JOURNAL
from ofa_ds.data.importing import annotations, folder, tables, tars
from ofa_ds.data.importing.item import Into, Shrink
from ofa_ds.data.manifest import Manifest
from ofa_ds.data.pool import serve_if_worker
from ofa_ds.storage import file_systems
from ofa_ds.terms import ANNOTATIONS, IMPORT_FORMATS, IMPORTED

TABLES = {
    "folder": folder.COLUMNS, "webdataset": tars.COLUMNS, "parquet": tables.COLUMNS, "huggingface": tables.COLUMNS,
}  # fmt: skip
"""Where each field is looked for, of formats that say nothing about it themselves."""


def import_shards(
    out: str, form: str, sources: Sequence[str], *, kind: str = "", images: str = "",
    columns: Mapping[str, str] | None = None, shrink: Shrink | None = None, dataset: str = "", how: How | None = None,
) -> Manifest:  # fmt: skip
    """Turn `sources` of a format of IMPORT_FORMATS into shards.

    kind: what its rows are (terms.IMPORTED); caption where a format does not say. images: folder of the pictures of
    annotation files. columns: field -> where it is, in place of TABLES' own. Raises ValueError, OSError as
    `build_shards`.
    """
    serve_if_worker()
    if form not in IMPORT_FORMATS:
        raise ValueError(f"want one of {', '.join(IMPORT_FORMATS)}, got {form!r}")
    own = ANNOTATIONS.get(form, "caption")
    if kind and form in ANNOTATIONS and kind != own:
        raise ValueError(f"--kind {kind}: rows of {form} are {own}")
    if form == "folder" and kind not in ("", "caption"):
        raise ValueError(f"--kind {kind}: rows of a folder are captions")
    if (kind or own) not in IMPORTED:
        raise ValueError(f"--kind: want one of {', '.join(IMPORTED)}, got {kind!r}")
    if (form in ANNOTATIONS) != bool(images):
        way = "has no --images" if images else "want --images DIR, the folder of its pictures"
        raise ValueError(f"{form}: {way}")
    into = Into(kind=kind or own, dataset=dataset or form, shrink=shrink or Shrink())
    locations = file_systems.expand(sources)
    found = _columns(form, columns or {})

    def pieces(work: Path, _: str) -> dict[str, list[Piece]]:
        if form in ANNOTATIONS:
            return {into.family: [*annotations.pieces_of(form, locations, images, into, work / JOURNAL)]}
        if form == "folder":
            return {into.family: [*folder.pieces_of(locations, into, found, work / JOURNAL)]}
        if form == "webdataset":
            return {into.family: [tars.TarPiece(source_file(each), into, found) for each in locations]}
        return {into.family: [*tables.pieces_of(locations, into, found)]}

    return build_pieces(str(out), pieces, how or How())


def _columns(form: str, given: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    known = TABLES.get(form, {})
    if unknown := sorted(set(given) - set(known)):
        fields = f"want one of {', '.join(known)}" if known else f"{form} says itself where everything is"
        raise SourceError(f"--column {unknown[0]}: {fields}")
    return tuple((known | dict(given)).items())

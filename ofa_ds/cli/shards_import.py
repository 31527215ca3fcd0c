"""`ofa-ds shards import`: what other programs wrote becomes a directory of shards."""

from __future__ import annotations

import argparse

from ofa_ds.cli.parser import Commands, command, positive
from ofa_ds.cli.shards_build import add_how, add_shard_bytes, print_manifest
from ofa_ds.terms import IMPORT_FORMATS, IMPORTED


def add_import(shards: Commands) -> None:
    parser = command(
        shards, "import", _import, "Turn a foreign data set into shards, every record checked as a TSV line is.",
        example="ofa-ds shards import coco-captions captions_train2017.json --images train2017 --out data/coco",
    )  # fmt: skip
    parser.add_argument("format", choices=IMPORT_FORMATS, metavar="FORMAT", help=f"one of {', '.join(IMPORT_FORMATS)}")
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="folders, tars, Parquet files, annotation files")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to make, or s3://...")
    parser.add_argument("--images", default="", metavar="DIR", help="folder of the pictures of annotation files")
    parser.add_argument(
        "--kind", default="", choices=("", *IMPORTED), metavar="KIND",
        help=f"what the rows are: {', '.join(IMPORTED)}; caption where the format does not say",
    )  # fmt: skip
    parser.add_argument(
        "--column", type=_column, action="append", default=[], metavar="FIELD=NAME",
        help="where a field is: a column, the end of a member's name, or json:KEY of a WebDataset's JSON",
    )  # fmt: skip
    parser.add_argument("--dataset", default="", metavar="NAME", help="for the dataset column; else the format")
    parser.add_argument(
        "--max-side", type=positive, default=0, metavar="N", help="shrink larger pictures; boxes follow"
    )
    parser.add_argument(
        "--quality", type=_quality, default=0, metavar="Q", help="write pictures again as JPEG, 1 to 95"
    )
    add_shard_bytes(parser)
    add_how(parser)


def _column(given: str) -> tuple[str, str]:
    field, _, name = given.partition("=")
    if not field or not name:
        raise argparse.ArgumentTypeError(f"want FIELD=NAME, got {given!r}")
    return field, name


def _quality(given: str) -> int:
    if not (given.isascii() and given.isdigit()) or not 1 <= int(given) <= 95:
        raise argparse.ArgumentTypeError(f"want a JPEG quality of 1 to 95, got {given!r}")
    return int(given)


def _import(options: argparse.Namespace) -> None:
    from ofa_ds.data.building.build import How
    from ofa_ds.data.importing.importing import import_shards
    from ofa_ds.data.importing.item import Shrink

    how = How(shard_bytes=options.shard_bytes, workers=options.workers, on_error=options.on_error, work=options.work)
    manifest = import_shards(
        options.out, options.format, options.source, kind=options.kind, images=options.images,
        columns=dict(options.column), shrink=Shrink(max_side=options.max_side, quality=options.quality),
        dataset=options.dataset, how=how,
    )  # fmt: skip
    print_manifest(options.out, manifest)

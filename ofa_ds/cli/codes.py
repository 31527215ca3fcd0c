"""`ofa-ds codes`: pictures to image codes and back."""

from __future__ import annotations

import argparse

from ofa_ds.cli.codes_train import add_train
from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, UsageError, command, drawing, group, positive
from ofa_ds.cli.shards_tools import here

TASKS = ("image_infilling", "text_to_image")
"""Those that paint; `ofa_ds.vision.code_rows.CODE_TASKS`."""

SHEET_ROWS = 64
"""Pictures on one sheet, where not said otherwise."""


def add_codes(commands: Commands) -> None:
    about = "Image codes: fill them into rows, and paint what they mean, by a VQGAN; train one."
    codes = group(commands, "codes", about)
    _add_decode(codes)
    add_train(codes)


def _add_decode(codes: Commands) -> None:
    decode = command(
        codes, "decode", _decode, "Paint the pictures that codes stand for.",
        example="ofa-ds codes decode data/shards --model vqgan --png sheet.png",
    )  # fmt: skip
    decode.add_argument("source", type=here, nargs="?", metavar="SHARDS|TSV", help="rows with codes")
    decode.add_argument("--codes", metavar='"1 2 3 ..."', help="in place of rows: as many codes as a square has")
    _add_model(decode)
    _add_task(decode)
    decode.add_argument("--rows", type=positive, metavar="N", help=f"the first N; on a sheet {SHEET_ROWS}, else all")
    decode.add_argument("--png", type=drawing, metavar="FILE", help="all of them on one sheet")
    decode.add_argument("--out", type=here, metavar="DIR", help="directory to make, with a PNG of each row")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=here, required=True, metavar="DIR",
        help="VQGAN: vqgan.json and vqgan.safetensors, or the released model.yaml and last.ckpt",
    )  # fmt: skip


def _add_task(parser: argparse.ArgumentParser) -> None:
    about = f"whose rows they are: {', '.join(TASKS)}"
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], metavar="TASK", help=about)


def _decode(options: argparse.Namespace) -> None:
    if (options.codes is None) == (options.source is None):
        raise UsageError("want SHARDS or a TSV, or --codes; one of them")
    if (options.png is None) == (options.out is None):
        raise UsageError("want --png FILE or --out DIR; one of them")
    with heavy_imports():
        from itertools import islice

        from ofa_ds.vision.code_rows import CODE_TASKS, code_rows, given_row
        from ofa_ds.vision.coder import this_device
        from ofa_ds.vision.decoding import Painter, paint_files, paint_sheet

    task = CODE_TASKS[options.task]
    rows = code_rows(options.source, task) if options.codes is None else iter([given_row(options.codes)])
    painter = Painter(options.model, this_device())
    if options.out is not None:
        print(f"pictures: {paint_files(rows, painter, options.out, limit=options.rows)} in {options.out}")
        return
    shown = list(islice(rows, options.rows or SHEET_ROWS))
    paint_sheet(shown, painter).save(options.png)
    print(f"pictures: {len(shown)} in {options.png}")

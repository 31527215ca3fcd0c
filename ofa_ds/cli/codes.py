"""`ofa-ds codes`: pictures to image codes and back."""

from __future__ import annotations

import argparse
import sys

from ofa_ds.cli.codes_judge import add_judge
from ofa_ds.cli.codes_train import add_train
from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, UsageError, command, drawing, group, positive
from ofa_ds.cli.shards_tools import here

TASKS = ("image_infilling", "text_to_image")
"""Those that paint; `ofa_ds.vision.code_rows.CODE_TASKS`."""

WHOLE_SIDE = 256
"""Pixels of a picture of text to image, where not said otherwise."""

SHEET_ROWS = 64
"""Pictures on one sheet, where not said otherwise."""


def add_codes(commands: Commands) -> None:
    about = "Image codes: fill them into rows, and paint what they mean, by a VQGAN; train one, or take that of scenes."
    codes = group(commands, "codes", about)
    _add_encode(codes)
    _add_decode(codes)
    add_train(codes)
    add_judge(codes)
    _add_scenes(codes)


def _add_encode(codes: Commands) -> None:
    encode = command(
        codes, "encode", _encode, "Fill the codes of pictures into rows. Killed or stopped, it goes on where it was.",
        example="ofa-ds codes encode photos --task text_to_image --model vqgan --out photos.tsv",
    )  # fmt: skip
    encode.add_argument(
        "source", type=here, metavar="SHARDS|TSV|FOLDER",
        help="shards become shards; a TSV file (id, picture; of text_to_image also caption), or a folder of pictures "
        "with captions in .txt files beside them, becomes a TSV file",
    )  # fmt: skip
    _add_model(encode)
    _add_task(encode)
    encode.add_argument("--out", type=here, required=True, metavar="DIR|TSV", help="to make")
    encode.add_argument(
        "--side", type=positive, metavar="N",
        help="pixels. Of text_to_image: pictures are squeezed to N x N, 256 where not given, all of which is encoded. "
        "Of image_infilling: they are cut to their central square, brought to N x N and written so; where not given "
        "they must be square. Their central half is encoded",
    )  # fmt: skip
    encode.add_argument("--workers", type=positive, metavar="N", help="processes; where not given one a GPU, or core")


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


def _add_scenes(codes: Commands) -> None:
    scenes = command(
        codes, "scenes", _scenes, "Write the VQGAN of the embedded data set: constructed, not trained.",
        example="ofa-ds codes scenes --out vqgan",
    )  # fmt: skip
    scenes.add_argument("--out", type=here, required=True, metavar="DIR", help="directory to make")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=here, required=True, metavar="DIR",
        help="VQGAN: vqgan.json and vqgan.safetensors, or the released model.yaml and last.ckpt",
    )  # fmt: skip


def _add_task(parser: argparse.ArgumentParser) -> None:
    about = f"whose rows they are: {', '.join(TASKS)}"
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], metavar="TASK", help=about)


def _encode(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.vision.code_rows import CODE_TASKS
        from ofa_ds.vision.coder import num_devices
        from ofa_ds.vision.encoding.encode import encode_codes
        from ofa_ds.vision.encoding.what import What

    task = CODE_TASKS[options.task]
    side = options.side or (WHOLE_SIDE if task.family == "downstream" else 0)
    try:
        what = What(task=task, side=side)
    except ValueError as error:
        raise UsageError(error) from error
    workers = options.workers or num_devices()
    done = encode_codes(options.source, options.out, options.model, what, workers=workers, say=_say)
    print(f"codes: {done.rows} rows of {task.name} in {options.out}")
    if done.without_caption:
        _say(f"{done.without_caption} pictures have no caption: no text of their name, .txt, lies beside them")


def _decode(options: argparse.Namespace) -> None:
    if (options.codes is None) == (options.source is None):
        raise UsageError("want SHARDS or a TSV, or --codes; one of them")
    if (options.png is None) == (options.out is None):
        raise UsageError("want --png FILE or --out DIR; one of them")
    with heavy_imports():
        from itertools import islice

        from ofa_ds.storage.atomic import new_content
        from ofa_ds.vision.code_rows import CODE_TASKS, code_rows, count_rows, given_row
        from ofa_ds.vision.coder import Coders, this_device
        from ofa_ds.vision.decoding import paint_files, paint_sheet
        from ofa_ds.vision.files import load_vqgan
        from ofa_ds.vision.scenes_coder import ScenesCoder, names_scenes

    task = CODE_TASKS[options.task]
    rows = code_rows(options.source, task) if options.codes is None else iter([given_row(options.codes)])
    is_rule = names_scenes(options.model)
    coders = ScenesCoder() if is_rule else Coders(load_vqgan(options.model, device=this_device(), say=_say))
    if options.out is not None:
        count = 1 if options.codes is not None else count_rows(options.source, task)
        limit = min(count, options.rows or count)
        print(f"pictures: {paint_files(rows, coders, options.out, limit=limit)} in {options.out}")
        return
    shown = list(islice(rows, options.rows or SHEET_ROWS))
    with new_content(options.png) as partial:
        paint_sheet(shown, coders).save(partial)
    print(f"pictures: {len(shown)} in {options.png}")


def _scenes(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.vision.files import save_vqgan
        from ofa_ds.vision.scenes_vqgan import scenes_vqgan

    save_vqgan(scenes_vqgan(), options.out)
    print(f"VQGAN: that of scenes in {options.out}")


def _say(message: str) -> None:
    print(message, file=sys.stderr)

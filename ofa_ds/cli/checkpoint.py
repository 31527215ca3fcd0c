"""`ofa-ds checkpoint ...`: what each action takes and prints. Light: heavy modules come with the action."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, command, group, positive
from ofa_ds.terms import FORMATS

DTYPES = ("float32", "bfloat16", "float16")
_SOURCE = "a checkpoint, or a run directory (its newest valid one)"


def add_checkpoint(commands: Commands) -> None:
    """Add `checkpoint` and its actions."""
    about = "Checkpoints: look into them, check them, cut them anew, bring them in and out."
    actions = group(commands, "checkpoint", about)
    show = command(
        actions, "show", _show, "Print what a checkpoint holds.", example="ofa-ds checkpoint show runs/tiny --tensors"
    )
    show.add_argument("checkpoint", type=Path, help=_SOURCE)
    show.add_argument("--json", action="store_true", help="one JSON object")
    show.add_argument("--tensors", action="store_true", help="also name, shape and kinds of every tensor")
    verify = command(
        actions, "verify", _verify, "Compare every byte with its checksum; names each damaged tensor and file.",
        example="ofa-ds checkpoint verify runs/tiny",
    )  # fmt: skip
    verify.add_argument("checkpoint", type=Path, help=_SOURCE)
    verify.add_argument("--json", action="store_true", help="one JSON object")
    prune = command(
        actions, "prune", _prune, "Delete all but the newest checkpoints of a run.",
        example="ofa-ds checkpoint prune runs/tiny --keep 2 --dry-run",
    )  # fmt: skip
    prune.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run")
    prune.add_argument("--keep", type=positive, default=3, metavar="N", help="how many whole ones stay")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    _add_conversions(actions)


def _add_conversions(actions: Commands) -> None:
    reshard = command(
        actions, "reshard", _reshard,
        "Write a checkpoint as other ranks would have. Resuming needs no such thing: any run reads any checkpoint.",
        example="ofa-ds checkpoint reshard runs/base staged/step_00010000 --ranks 64",
    )  # fmt: skip
    reshard.add_argument("source", type=Path, metavar="SRC", help=_SOURCE)
    reshard.add_argument("destination", type=Path, metavar="DST", help="directory to make")
    reshard.add_argument("--ranks", type=positive, required=True, metavar="N", help="one file for each")
    reshard.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage to lay out for; else its own")
    export = command(
        actions, "export", _export, "Write another program's format.",
        example="ofa-ds checkpoint export runs/base exported --format huggingface",
    )  # fmt: skip
    export.add_argument("source", type=Path, metavar="SRC", help=_SOURCE)
    export.add_argument("destination", type=Path, metavar="DST", help="directory to make; fairseq: the .pt file")
    export.add_argument("--format", choices=FORMATS, required=True, help="whose")
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; float32 loses nothing")
    export.add_argument(
        "--vocab", type=Path, metavar="DIR", help="vocabulary directory; else the one that the run keeps"
    )
    export.add_argument("--ema", action="store_true", help="the moving average in the place of the weights")
    export.add_argument(
        "--ranks", type=positive, metavar="N", help="deepspeed: world size that will load it; else its own"
    )
    export.add_argument("--stage", type=int, choices=(1, 2, 3), help="deepspeed: ZeRO stage that will load it")
    export.add_argument(
        "--sub-group-size",
        type=positive,
        default=10**9,
        metavar="N",
        help="deepspeed: of the loading engine's ZeRO stage 3",
    )
    load = command(
        actions, "import", _import, "Make a checkpoint from another program's. Every name must be accounted for.",
        example="ofa-ds checkpoint import ofa_base.pt runs/base/step_00000000 --vocab data/vocab",
    )  # fmt: skip
    load.add_argument("source", type=Path, metavar="SRC", help="a .pt file or a folder")
    load.add_argument("destination", type=Path, metavar="DST", help="directory to make")
    load.add_argument("--format", choices=FORMATS, help="found out where not given")
    load.add_argument(
        "--vocab", type=Path, metavar="DIR", help="vocabulary directory; else the tokenizer's files in SRC"
    )
    load.add_argument(
        "--allow-missing", action="append", default=[], metavar="PATTERN", help="such names may start fresh; repeatable"
    )
    load.add_argument(
        "--drop", action="append", default=[], metavar="PATTERN", help="leave such names of SRC out; repeatable"
    )
    load.add_argument("--ema", action="store_true", help="take the moving average as the weights")
    load.add_argument("--grow-vocab", type=positive, metavar="ROWS", help="append vocabulary rows up to so many")
    load.add_argument("--image-positions", type=positive, metavar="N", help="interpolate to a grid of N x N patches")
    load.add_argument(
        "--ranks", type=positive, default=1, metavar="N", help="one file for each; any run reads any number"
    )
    load.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=3, help="ZeRO stage to lay out for")


def _show(options: argparse.Namespace) -> None:
    from ofa_ds.checkpoint.manifest import read_manifest
    from ofa_ds.checkpoint.verifying import describe

    facts = describe(options.checkpoint)
    tensors = read_manifest(Path(facts["path"])).tensors if options.tensors else {}
    rows = {name: {"shape": list(each.shape), "kinds": list(each.kinds)} for name, each in tensors.items()}
    if options.json:
        print(json.dumps(facts | ({"tensor_list": rows} if rows else {})))
        return
    for name, value in facts.items():
        shown = " ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
        shown = ", ".join(value) if isinstance(value, list) else shown
        print(f"{name:12} {f'{value:,}' if name in ('parameters', 'trainable', 'bytes') else shown}")
    for name, row in rows.items():
        print(f"  {name:70} {'x'.join(map(str, row['shape'])) or 'scalar':>16}  {' '.join(row['kinds'])}")


def _verify(options: argparse.Namespace) -> int:
    from ofa_ds.checkpoint.runs import find
    from ofa_ds.checkpoint.verifying import verify

    directory = find(options.checkpoint)
    problems = verify(directory)
    if options.json:
        print(json.dumps({"path": str(directory), "problems": problems, "ok": not problems}))
        return 1 if problems else 0
    for problem in problems:
        print(problem)
    print(f"{directory}: {f'problems: {len(problems)}' if problems else 'every checksum is right'}")
    return 1 if problems else 0


def _prune(options: argparse.Namespace) -> None:
    from ofa_ds.checkpoint.runs import prune

    gone = prune(options.run_dir, options.keep, dry_run=options.dry_run)
    for path in gone:
        print(f"{'would delete' if options.dry_run else 'deleted'} {path}")
    print(f"{options.run_dir}: {len(gone)} checkpoints {'would go' if options.dry_run else 'are gone'}")


def _reshard(options: argparse.Namespace) -> None:
    from ofa_ds.checkpoint.reshard import reshard
    from ofa_ds.data import kept_vocabulary

    source, manifest = reshard(options.source, options.destination, ranks=options.ranks, stage=options.stage)
    kept_vocabulary.carry(source, options.destination, manifest.identity.get("vocab"))
    print(f"{options.destination}: {options.ranks} ranks")


def _export(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.convert.commands import ExportPlan, export_checkpoint

    plan = ExportPlan(
        format=options.format, dtype=options.dtype, use_ema=options.ema, ranks=options.ranks, stage=options.stage,
        sub_group_size=options.sub_group_size, vocab=options.vocab,
    )  # fmt: skip
    result = export_checkpoint(options.source, options.destination, plan)
    print(f"{result['path']}: step {result['step']} as {result['format']}{''.join(f'; {n}' for n in result['notes'])}")


def _import(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.convert.commands import ImportPlan, import_checkpoint
        from ofa_ds.convert.foreign import Options

    allowed = Options(allow_missing=options.allow_missing, drop=options.drop, use_ema=options.ema)
    plan = ImportPlan(
        format=options.format, options=allowed, vocab=options.vocab, grow_vocab=options.grow_vocab,
        image_positions=options.image_positions, ranks=options.ranks, stage=options.stage,
    )  # fmt: skip
    result = import_checkpoint(options.source, options.destination, plan)
    print(f"{result['path']}: {result['preset']}, {result['parameters']:,} parameters, from {result['format']}")

"""`ofa-ds scenes`, `shards` and `vocab`: from TSV files to what the model sees."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

from ofa_ds.cli.parser import Commands, UsageError, command, drawing, group, natural, positive, recipe_of, text
from ofa_ds.terms import TASKS

WARNINGS_SHOWN = 5
"""Of `shards build`, on the console; all are in the directory."""


def add_scenes(commands: Commands) -> None:
    about = "Draw the embedded data set: pictures with known answers for all eight tasks, as OFA's TSV files."
    parser = command(
        commands, "scenes", _scenes, about, example="ofa-ds scenes --out data/scenes --rows 12000 --seed 1"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the TSV files")
    parser.add_argument(
        "--rows", type=positive, default=12000, metavar="N", help="vision-language rows; the other files follow 8:2:1:1"
    )
    parser.add_argument("--seed", type=natural, default=1, metavar="N", help="the same seed draws the same files")
    parser.add_argument("--split", default="train", choices=("train", "heldout"), help="the two never share a scene")
    parser.add_argument(
        "--questions",
        type=int,
        choices=range(11),
        default=4,
        metavar="N",
        help="of ten vision-language rows, N (0 to 10) are questions",
    )


def _scenes(options: argparse.Namespace) -> None:
    from ofa_ds.data.scenes import write_scenes

    write_scenes(options.out, rows=options.rows, seed=options.seed, split=options.split, questions=options.questions)
    print(f"scenes: {options.rows} vision-language rows in {options.out}")


def add_shards(commands: Commands) -> None:
    about = "Arrow shards: build them from OFA's TSV files, verify them, look at what the model will see."
    shards = group(commands, "shards", about)
    build = command(
        shards, "build", _shards_build, "Turn TSV files into Arrow shards, every line checked.",
        example="ofa-ds shards build --out data/shards --vision-language vl.tsv --text text.tsv --on-error quarantine",
    )  # fmt: skip
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    for family in ("vision-language", "text", "image", "detection"):
        build.add_argument(
            f"--{family}", type=Path, nargs="+", default=[], metavar="TSV", help=f"files of {family} rows"
        )
    build.add_argument(
        "--negatives", type=Path, metavar="DIR", help="OFA's negative_sample: wrong captions and answers"
    )
    build.add_argument("--rows-per-shard", type=positive, default=50_000, metavar="N", help="rows of one Arrow file")
    build.add_argument("--workers", type=positive, default=2, metavar="N", help="processes that parse and check")
    build.add_argument("--on-error", choices=("stop", "quarantine"), default="stop", help="what a bad line does")
    build.add_argument("--strict", action="store_true", help="a line that looks like a mistake is a bad line")
    verify = command(
        shards, "verify", _shards_verify, "Check every checksum and decode every picture.",
        example="ofa-ds shards verify data/shards",
    )  # fmt: skip
    verify.add_argument("dir", type=Path, metavar="DIR", help="shards")
    show = command(
        shards, "show", _shards_show, "Show what the model sees: picture with boxes, source text, target text.",
        example="ofa-ds shards show data/scenes/train --recipe pretrain-nano --task vqa --row 3 --png vqa.png",
    )  # fmt: skip
    show.add_argument("dir", type=Path, metavar="DIR", help="shards")
    show.add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"one of {', '.join(TASKS)}; all that the recipe trains where not given",
    )
    show.add_argument("--row", type=natural, default=0, metavar="N", help="row number within the task's source rows")
    show.add_argument("--png", type=drawing, metavar="FILE", help="write the picture here")
    show.add_argument("--recipe", default="pretrain-tiny", help="a recipe, whose settings to apply")
    show.add_argument("--vocab", default="", metavar="DIR", help="vocabulary; else the recipe's")
    show.add_argument("set", nargs="*", metavar="KEY=VALUE", help="recipe overrides, such as data.image_size=256")


def _shards_build(options: argparse.Namespace) -> None:
    from ofa_ds.data.shards_build import build_shards

    manifest = build_shards(
        options.out,
        vision_language=options.vision_language,
        text=options.text,
        image=options.image,
        detection=options.detection,
        negatives=options.negatives,
        rows_per_shard=options.rows_per_shard,
        workers=options.workers,
        on_error=options.on_error,
        strict=options.strict,
    )
    _print_warnings(options.out / "warnings", sum(part.warnings for part in manifest.families.values()))
    for family, part in manifest.families.items():
        bad = f", {part.quarantined} bad lines in quarantine" if part.quarantined else ""
        print(f"{family:16} {part.rows:>10} rows{bad}{f', warnings: {part.warnings}' if part.warnings else ''}")
    print(f"shards in {options.out}")


def _print_warnings(folder: Path, count: int) -> None:
    """The first few of them."""
    shown = 0
    for log in sorted(folder.glob("*.log")):
        with log.open(encoding="utf-8") as lines:
            for line in islice(lines, WARNINGS_SHOWN - shown):
                print(f"warning: {line.rstrip()}", file=sys.stderr)
                shown += 1
    if count > shown:
        print(f"warning: {count - shown} more in {folder}", file=sys.stderr)


def _shards_verify(options: argparse.Namespace) -> int:
    from ofa_ds.data.shards_verify import verify_shards

    problems = verify_shards(options.dir)
    for problem in problems:
        print(problem)
    print(f"{options.dir}: {f'problems: {len(problems)}' if problems else 'every checksum and picture is right'}")
    return 1 if problems else 0


def _shards_show(options: argparse.Namespace) -> None:
    import dataclasses

    from ofa_ds.data.shards import Shards
    from ofa_ds.data.vocab import load_vocab
    from ofa_ds.model.config import model_config
    from ofa_ds.tasks.context import Context
    from ofa_ds.tasks.preview import show_shards

    recipe = recipe_of(options.recipe, options.set)
    directory = options.vocab or recipe.data.vocab
    if not directory:
        raise UsageError("no vocabulary: give --vocab DIR, or a recipe whose data.vocab names one")
    shards, vocab = Shards(options.dir), load_vocab(directory)
    model = model_config(recipe, vocab.size)
    ctx = Context(
        vocab=vocab, negatives=shards.negatives, config=dataclasses.replace(recipe.data, shards=str(options.dir)),
        patch_size=model.patch_size, max_positions=model.max_positions,
    )  # fmt: skip
    show_shards(shards, ctx, task=options.task, row=options.row, png=options.png)


def add_vocab(commands: Commands) -> None:
    about = "Vocabularies: train a byte-level BPE on your own shards, or import and look at OFA's."
    vocab = group(commands, "vocab", about)
    train = command(
        vocab, "train", _vocab_train, "Train a byte-level BPE on the text of shards.",
        example="ofa-ds vocab train --shards data/shards --size 30000 --out data/vocab",
    )  # fmt: skip
    train.add_argument("--shards", type=Path, required=True, metavar="DIR", help="whose text to learn from")
    train.add_argument(
        "--size", type=positive, default=30_000, metavar="N", help="text entries, the 256 bytes included"
    )
    train.add_argument("--codes", type=natural, default=8192, metavar="N", help="image codes appended")
    train.add_argument("--bins", type=natural, default=1000, metavar="N", help="coordinate bins appended")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    load = command(
        vocab, "import", _vocab_import, "Bring OFA's, Hugging Face's or BERT's files into one directory.",
        example="ofa-ds vocab import OFA-base --out data/vocab",
    )  # fmt: skip
    load.add_argument("source", type=Path, metavar="SRC", help="directory with their files")
    load.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    show = command(
        vocab, "show", _vocab_show, "Print the layout of a vocabulary, or the ids of a text.",
        example="ofa-ds vocab show data/vocab --text ' a red circle'",
    )  # fmt: skip
    show.add_argument("dir", type=Path, metavar="DIR", help="vocabulary")
    show.add_argument("--text", type=text, help="encode this, as given (a leading space matters)")


def _vocab_train(options: argparse.Namespace) -> None:
    from ofa_ds.tasks.texts import train_from_shards

    vocab = train_from_shards(
        options.shards, size=options.size, out=options.out, num_codes=options.codes, num_bins=options.bins
    )
    print(f"vocabulary: {vocab.size} entries in {options.out}")


def _vocab_import(options: argparse.Namespace) -> None:
    from ofa_ds.data.vocab import import_vocab

    vocab = import_vocab(options.source, options.out)
    print(f"vocabulary: {vocab.size} entries in {options.out}")


def _vocab_show(options: argparse.Namespace) -> None:
    from ofa_ds.data.vocab import load_vocab

    vocab = load_vocab(options.dir)
    if options.text is not None:
        print(" ".join(str(token) for token in vocab.encode(options.text)))
        return
    rows = (("special", 0, 4), ("text", 4, vocab.mask), ("mask", vocab.mask, vocab.mask + 1),
            ("codes", vocab.code_start, vocab.code_start + vocab.num_codes),
            ("bins", vocab.bin_start, vocab.bin_start + vocab.num_bins))  # fmt: skip
    for name, start, end in rows:
        print(f"{name:8} {start:>7} ... {end - 1:>7}" if end > start else f"{name:8} none")
    print(f"total    {vocab.size:>7}    fingerprint {vocab.fingerprint}")

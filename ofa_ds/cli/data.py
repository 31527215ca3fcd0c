"""`ofa-ds scenes`, `shards` and `vocab`: from TSV files to what the model sees."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ofa_ds.cli.inference import add_codes_model
from ofa_ds.cli.parser import Commands, UsageError, command, drawing, group, natural, positive, recipe_of, text
from ofa_ds.cli.shards_build import add_build
from ofa_ds.cli.shards_import import add_import
from ofa_ds.cli.shards_tools import add_tools
from ofa_ds.terms import DOWNSTREAM_TASKS, TASKS

if TYPE_CHECKING:
    from ofa_ds.config import Recipe


FROM_A_FOLDER = """\
from a folder of pictures to a verified data set:
  1. a caption for each picture: NAME.txt beside NAME.jpg, or one metadata.csv (or .jsonl) with file_name and text
  2. ofa-ds shards import folder pictures --out data/mine --on-error quarantine
     what was left out, and why, is in data/mine/quarantine
  3. ofa-ds shards verify data/mine
     every checksum, row and picture; exit code 0 where all is right
  4. ofa-ds shards stats data/mine --png stats.png
     sizes, lengths, pictures that are there twice
  5. ofa-ds shards split data/mine --part train=rest --part heldout=0.1 --by-image --out data/split
     no picture is in both parts
  6. ofa-ds vocab train --shards data/split/train --out data/vocab
     ofa-ds shards show data/split/train --vocab data/vocab --task caption --png seen.png
     what the model sees

WebDataset, Parquet, Hugging Face, COCO, VQA, RefCOCO come by `import` too, OFA's TSV files by `build`."""


def add_scenes(commands: Commands) -> None:
    about = "Draw the embedded data set: pictures with known answers, as the TSV files of all eight tasks or of --task."
    parser = command(
        commands, "scenes", _scenes, about, example="ofa-ds scenes --out data/scenes --rows 12000 --seed 1"
    )
    out = "directory for the TSV files; none is overwritten"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
    parser.add_argument(
        "--rows", type=positive, default=12000, metavar="N", help="vision-language rows; the other files follow 8:2:1:1"
    )
    parser.add_argument(
        "--task",
        choices=DOWNSTREAM_TASKS,
        metavar="TASK",
        help=f"rows of this downstream task alone: {', '.join(DOWNSTREAM_TASKS)}",
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
    if options.task:
        from ofa_ds.data.scenes_tasks import write_task_scenes

        path = write_task_scenes(options.out, options.task, options.rows, options.seed, options.split)
        print(f"scenes: {options.rows} rows of {options.task} in {path}")
        return
    from ofa_ds.data.scenes import write_scenes

    write_scenes(options.out, rows=options.rows, seed=options.seed, split=options.split, questions=options.questions)
    print(f"scenes: {options.rows} vision-language rows in {options.out}")


def add_shards(commands: Commands) -> None:
    about = "Arrow shards: make them of pictures and texts, verify them, look at what the model will see."
    shards = group(commands, "shards", about, way=FROM_A_FOLDER)
    add_build(shards)
    add_import(shards)
    add_tools(shards)
    answers = command(
        shards, "answers", _shards_answers, "Check a list of answers and write it as JSON; nothing of a pickle is run.",
        example="ofa-ds shards answers trainval_ans2label.pkl --out data/answers.json",
    )  # fmt: skip
    answers.add_argument("source", type=Path, metavar="FILE", help="text, an answer a line; JSON; a .pkl")
    answers.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    recast = command(
        shards, "recast", _shards_recast, "Write pretraining rows in the form of a downstream task, as TSV files.",
        example="ofa-ds shards recast data/shards --task vqa --out data/vqa --rows 64",
    )  # fmt: skip
    recast.add_argument("dir", type=str, metavar="DIR", help="shards of pretraining")
    recast.add_argument(
        "--task", choices=DOWNSTREAM_TASKS, required=True, metavar="TASK", help=f"one of {', '.join(DOWNSTREAM_TASKS)}"
    )
    out = "directory for TASK.tsv and answers.txt; none is overwritten"
    recast.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
    recast.add_argument("--rows", type=positive, metavar="N", help="rows at most; all where not given")
    recast.add_argument("--seed", type=natural, default=1, metavar="N", help="of what is drawn")
    frequencies = command(
        shards, "frequencies", _shards_frequencies, "Count the n-grams of captions, by which CIDEr-D weighs words.",
        example="ofa-ds shards frequencies data/coco/train --out data/coco/frequencies.json",
    )  # fmt: skip
    frequencies.add_argument("dir", type=str, metavar="DIR", help="shards of captions to train on")
    frequencies.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file to make")
    show = command(
        shards, "show", _shards_show, "Show what the model sees: picture with boxes, source text, target text.",
        example="ofa-ds shards show data/scenes/train --recipe pretrain-nano --task vqa --row 3 --png vqa.png",
    )  # fmt: skip
    show.add_argument("dir", type=str, metavar="DIR", help="shards")
    show.add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"one of {', '.join(TASKS)}; all that the recipe trains where not given",
    )
    show.add_argument("--row", type=natural, default=0, metavar="N", help="row number within the task's source rows")
    show.add_argument("--png", type=drawing, metavar="FILE", help="write the picture here")
    show.add_argument(
        "--recipe", default="", help="a recipe, whose settings to apply; else pretrain-tiny, or the task's own"
    )
    show.add_argument("--vocab", default="", metavar="DIR", help="vocabulary; else the recipe's")
    add_codes_model(show)
    show.add_argument("set", nargs="*", metavar="KEY=VALUE", help="recipe overrides, such as data.image_size=256")


def _shards_answers(options: argparse.Namespace) -> None:
    from ofa_ds.data.answer_list import read_answers_file, write_answer_list
    from ofa_ds.data.answer_pickle import read_answer_pickle

    if options.out.suffix != ".json":
        raise UsageError(f"--out {options.out}: want a file name that ends in .json")
    is_pickle = options.source.suffix in (".pkl", ".pickle")
    found = (read_answer_pickle if is_pickle else read_answers_file)(options.source)
    write_answer_list(options.out, found)
    print(f"answers: {len(found)} in {options.out}, from {found[0]!r} to {found[-1]!r}")


def _shards_recast(options: argparse.Namespace) -> None:
    from ofa_ds.data.recast import write_recast

    path, count = write_recast(options.dir, options.out, options.task, rows=options.rows, seed=options.seed)
    print(f"recast: {count} rows of {options.task} in {path}")


def _shards_frequencies(options: argparse.Namespace) -> None:
    from ofa_ds.data.document_frequency import of_shards, write_document_frequency
    from ofa_ds.data.shards import Shards

    frequency = of_shards(Shards(options.dir, task="caption"))
    write_document_frequency(frequency, options.out)
    print(f"{len(frequency.counts)} n-grams with two pictures or more, of {frequency.images}, in {options.out}")


def _shards_show(options: argparse.Namespace) -> None:
    import dataclasses

    from ofa_ds.data.shards import Shards
    from ofa_ds.data.vocab import load_vocab
    from ofa_ds.model.config import model_config
    from ofa_ds.tasks.preview import show_shards
    from ofa_ds.tasks.task import context_of
    from ofa_ds.tasks.task_shards import task_shown

    shards = Shards(options.dir)
    task = task_shown(shards, options.task)
    recipe = _recipe_shown(options.recipe, options.set, task)
    directory = options.vocab or recipe.data.vocab
    if not directory:
        raise UsageError("no vocabulary: give --vocab DIR, or a recipe whose data.vocab names one")
    vocab = load_vocab(directory)
    model = model_config(recipe, vocab.size)
    config = dataclasses.replace(recipe.data, shards=str(options.dir))
    paint = None
    if options.codes_model is not None:
        from ofa_ds.inference.painting import painter
        from ofa_ds.vision.coder import this_device

        paint = painter(options.codes_model, vocab, config.code_image_size, this_device())
    ctx = context_of(shards, vocab, config, patch_size=model.patch_size, max_positions=model.max_positions, paint=paint)
    show_shards(shards, ctx, task=task or options.task, row=options.row, png=options.png)


def _recipe_shown(name: str, overrides: list[str], task: str) -> Recipe:
    """The recipe that is asked for; else that of the downstream task, where the shards are of one."""
    from ofa_ds.config.recipe import shipped_recipes

    if task and not name and f"finetune-{task}-tiny" in shipped_recipes():
        return recipe_of(f"finetune-{task}-tiny", overrides)
    named = [f"data.task.name={task}"] if task else []
    if any(each.partition("=")[0].strip() == "data.task.name" for each in overrides):
        named = []
    return recipe_of(name or "pretrain-tiny", [*named, *overrides])


def add_vocab(commands: Commands) -> None:
    about = "Vocabularies: train a byte-level BPE on your own shards, or import and look at OFA's."
    vocab = group(commands, "vocab", about)
    train = command(
        vocab, "train", _vocab_train, "Train a byte-level BPE on the text of shards.",
        example="ofa-ds vocab train --shards data/shards --size 30000 --out data/vocab",
    )  # fmt: skip
    train.add_argument("--shards", type=str, required=True, metavar="DIR", help="whose text to learn from")
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

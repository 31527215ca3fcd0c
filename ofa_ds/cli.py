"""`ofa-ds`: parses and delegates. Heavy modules are imported by the command that needs them, so `--help` is instant.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or a wrong recipe, 130 stopped by Ctrl-C. Failures are one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ofa_ds.heavy_imports import heavy_imports

TASK_NAMES = "caption vqa itm visual_grounding grounded_caption detection image_infilling text_infilling"


class UsageError(ValueError):
    """The command line or the recipe is wrong: exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UsageError as error:
        return _fail(error, 2)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130)


def _fail(message: object, code: int) -> int:
    print(f"ofa-ds: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ofa-ds",
        description="Pretrain OFA, one model for pictures, text, boxes and image codes, with DeepSpeed ZeRO-3.",
        epilog="A first run: bash launchers/quickstart.sh. Each command explains itself: ofa-ds COMMAND --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_scenes, _add_shards, _add_vocab, _add_pretrain, _add_evaluate, _add_generate, _add_checkpoint):
        add(commands)
    return parser


def _command(commands, name: str, run: Callable[[argparse.Namespace], int | None], about: str, *, example: str = ""):  # noqa: ANN001, ANN202
    parser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"Example: {example}" if example else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"want a whole number of at least 1, got {text}")
    return value


def _add_scenes(commands) -> None:  # noqa: ANN001
    about = "Draw the embedded data set: pictures with known answers for all eight tasks, as OFA's TSV files."
    parser = _command(
        commands, "scenes", _scenes, about, example="ofa-ds scenes --out data/scenes --rows 12000 --seed 1"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the TSV files")
    parser.add_argument(
        "--rows", type=_positive, default=12000, help="vision-language rows; the other files follow 8:2:1:1"
    )
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same files")
    parser.add_argument("--split", default="train", choices=("train", "heldout"), help="the two never share a scene")
    parser.add_argument(
        "--questions", type=int, default=4, metavar="N", help="of ten vision-language rows, N are questions"
    )


def _scenes(options: argparse.Namespace) -> None:
    from ofa_ds.data.scenes import write_scenes

    write_scenes(options.out, rows=options.rows, seed=options.seed, split=options.split, questions=options.questions)
    print(f"scenes: {options.rows} vision-language rows in {options.out}")


def _add_shards(commands) -> None:  # noqa: ANN001
    about = "Arrow shards: build them from OFA's TSV files, verify them, look at what the model will see."
    shards = commands.add_parser("shards", help=about, description=about).add_subparsers(
        metavar="ACTION", required=True
    )
    build = _command(shards, "build", _shards_build, "Turn TSV files into Arrow shards.")
    build.add_argument("--out", type=Path, required=True, help="directory to make")
    for family in ("vision-language", "text", "image", "detection"):
        build.add_argument(f"--{family}", type=Path, nargs="+", default=[], metavar="TSV", help=f"{family} rows")
    build.add_argument("--negatives", type=Path, help="OFA's negative_sample directory")
    build.add_argument("--rows-per-shard", type=_positive, default=50_000, help="rows of one Arrow file")
    build.add_argument("--workers", type=_positive, default=2, help="processes that parse and check")
    build.add_argument("--on-error", choices=("stop", "quarantine"), default="stop", help="what a bad line does")
    verify = _command(shards, "verify", _shards_verify, "Check every checksum and decode every picture.")
    verify.add_argument("dir", type=Path)
    show = _command(
        shards, "show", _shards_show, "Show what the model sees: picture with boxes, source text, target text."
    )
    show.add_argument("dir", type=Path)
    show.add_argument("--task", choices=TASK_NAMES.split(), help="one task; all eight where not given")
    show.add_argument("--row", type=int, default=0, help="row number within the task's source rows")
    show.add_argument("--png", type=Path, help="write the picture here")
    show.add_argument("--recipe", default="pretrain-tiny", help="whose [data] settings to apply")
    show.add_argument("--vocab", default="", help="vocabulary directory; else the recipe's")
    show.add_argument("set", nargs="*", metavar="KEY=VALUE", help="recipe overrides, such as data.image_size=256")


def _shards_build(options: argparse.Namespace) -> None:
    from ofa_ds.data.shards import build_shards

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
    )
    for family, part in manifest["families"].items():
        print(f"{family:16} {part['rows']:>10} rows{_quarantined(part['quarantined'])}")
    print(f"shards in {options.out}")


def _quarantined(count: int) -> str:
    return f", {count} bad lines in quarantine" if count else ""


def _shards_verify(options: argparse.Namespace) -> int:
    from ofa_ds.data.shards import verify_shards

    problems = verify_shards(options.dir)
    for problem in problems:
        print(problem)
    print(f"{options.dir}: {f'problems: {len(problems)}' if problems else 'every checksum and picture is right'}")
    return 1 if problems else 0


def _shards_show(options: argparse.Namespace) -> None:
    import dataclasses

    from ofa_ds.data.preview import show_shards

    recipe = _recipe(options.recipe, options.set)
    vocab = options.vocab or recipe.data.vocab
    data = dataclasses.replace(recipe.data, shards=str(options.dir), vocab=vocab)
    show_shards(options.dir, data, task=options.task, row=options.row, png=options.png)


def _add_vocab(commands) -> None:  # noqa: ANN001
    about = "Vocabularies: train a byte-level BPE on your own shards, or import and look at OFA's."
    vocab = commands.add_parser("vocab", help=about, description=about).add_subparsers(metavar="ACTION", required=True)
    train = _command(vocab, "train", _vocab_train, "Train a byte-level BPE on the text of shards.")
    train.add_argument("--shards", type=Path, required=True)
    train.add_argument("--size", type=_positive, default=30_000, help="text entries, the 256 bytes included")
    train.add_argument("--codes", type=int, default=8192, help="image codes appended")
    train.add_argument("--bins", type=int, default=1000, help="coordinate bins appended")
    train.add_argument("--out", type=Path, required=True)
    load = _command(vocab, "import", _vocab_import, "Bring OFA's, Hugging Face's or BERT's files into one directory.")
    load.add_argument("source", type=Path)
    load.add_argument("--out", type=Path, required=True)
    show = _command(vocab, "show", _vocab_show, "Print the layout of a vocabulary, or the ids of a text.")
    show.add_argument("dir", type=Path)
    show.add_argument("--text", help="encode this, as given (a leading space matters)")


def _vocab_train(options: argparse.Namespace) -> None:
    from ofa_ds.data.vocab import train_from_shards

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


def _add_pretrain(commands) -> None:  # noqa: ANN001
    about = "Pretrain by RECIPE: alone, or on every rank under deepspeed, torchrun, srun or mpirun."
    parser = _command(
        commands, "pretrain", _pretrain, about, example="deepspeed --module ofa_ds.pretrain pretrain-nano"
    )
    parser.add_argument("recipe", help="a TOML file, or a shipped recipe such as pretrain-nano or pretrain-6b")
    parser.add_argument(
        "set", nargs="*", metavar="KEY=VALUE", help="overrides, such as optim.peak_lr=2e-4 run_dir=runs/a"
    )
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def _pretrain(options: argparse.Namespace) -> int:
    recipe = _recipe(options.recipe, options.set)
    with heavy_imports():
        from ofa_ds.trainer import run

    return run(recipe)


def _recipe(name: str, overrides: Sequence[str]):  # noqa: ANN202
    from ofa_ds.config import load_recipe

    try:
        return load_recipe(name, overrides)
    except ValueError as error:
        raise UsageError(error) from error


def _add_evaluate(commands) -> None:  # noqa: ANN001
    about = "Held-out loss and accuracy per task, beside what a blind model reaches."
    parser = _command(
        commands, "evaluate", _evaluate, about, example="ofa-ds evaluate runs/nano --shards data/scenes/heldout"
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest one)")
    parser.add_argument("--shards", type=Path, required=True, help="held-out shards")
    parser.add_argument("--task", choices=TASK_NAMES.split(), action="append", help="only this task; may be repeated")
    parser.add_argument("--rows", type=_positive, default=1000, help="examples per task at most")
    parser.add_argument("--beam", type=_positive, default=1, help="1 is greedy")
    _add_ema(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--png", type=Path, help="write one picture per task: boxes, source, expected and generated text"
    )


def _evaluate(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.evaluate import evaluate
        from ofa_ds.report import format_table

    result = evaluate(
        options.checkpoint, options.shards, tasks=options.task, rows=options.rows, beam=options.beam, png=options.png,
        average=options.ema,
    )  # fmt: skip
    print(json.dumps(result) if options.json else format_table(result))


def _add_generate(commands) -> None:  # noqa: ANN001
    about = "Generate the answer to one task for one picture and text."
    parser = _command(commands, "generate", _generate, about)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest one)")
    parser.add_argument("--task", choices=TASK_NAMES.split(), required=True)
    parser.add_argument("--image", type=Path, help="a JPEG or PNG file")
    parser.add_argument("--text", default="", help="question, expression, caption to check, or text to complete")
    parser.add_argument("--beam", type=_positive, default=5, help="1 is greedy")
    _add_ema(parser)
    parser.add_argument("--png", type=Path, help="write the picture with the generated boxes and text here")


def _generate(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.samples import generate_one

    answer = generate_one(
        options.checkpoint, options.task, image=options.image, text=options.text, beam=options.beam, png=options.png,
        average=options.ema,
    )  # fmt: skip
    print(answer)


def _add_ema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema_decay)")


def _add_checkpoint(commands) -> None:  # noqa: ANN001
    from ofa_ds.checkpoint_commands import add_actions

    about = "Checkpoints: look into them, check them, cut them anew, bring them in and out."
    actions = commands.add_parser("checkpoint", help=about, description=about).add_subparsers(
        metavar="ACTION", required=True
    )
    add_actions(actions, _command, _positive)


if __name__ == "__main__":
    sys.exit(main())

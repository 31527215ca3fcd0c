"""`ofa-ds evaluate` and `generate`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, command, drawing, positive, text
from ofa_ds.terms import TASKS


def add_evaluate(commands: Commands) -> None:
    about = "Held-out loss and accuracy per task, beside what a blind model reaches."
    parser = command(
        commands, "evaluate", _evaluate, about, example="ofa-ds evaluate runs/nano --shards data/scenes/heldout"
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest one)")
    parser.add_argument("--shards", type=Path, required=True, metavar="DIR", help="held-out shards")
    parser.add_argument(
        "--task",
        choices=TASKS,
        action="append",
        metavar="TASK",
        help=f"only this one of {', '.join(TASKS)}; may be repeated; all that were trained where not given",
    )
    parser.add_argument("--rows", type=positive, default=1000, metavar="N", help="examples per task at most")
    parser.add_argument(
        "--beam", type=positive, default=1, metavar="N", help="answers kept while one is searched; 1 is greedy"
    )
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--png",
        type=drawing,
        metavar="FILE",
        help="write a sheet for each task: boxes, source, expected and generated text",
    )


def _evaluate(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.inference.evaluate import evaluate
        from ofa_ds.inference.table import format_table

    result = evaluate(
        options.checkpoint, options.shards, tasks=options.task, rows=options.rows, beam=options.beam, png=options.png,
        average=options.ema, vocab=options.vocab,
    )  # fmt: skip
    print(json.dumps(_plain(result), allow_nan=False) if options.json else format_table(result))


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is not finite is null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_generate(commands: Commands) -> None:
    about = "Generate the answer to one task for one picture and text."
    parser = command(
        commands, "generate", _generate, about,
        example="ofa-ds generate runs/nano --task vqa --image a.png --text 'what color is the circle?'",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest one)")
    parser.add_argument("--task", choices=TASKS, required=True, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a JPEG or PNG file")
    parser.add_argument(
        "--text", type=text, default="", help="question, expression, caption to check, or text to complete"
    )
    parser.add_argument(
        "--beam", type=positive, default=5, metavar="N", help="answers kept while one is searched; 1 is greedy"
    )
    _add_model(parser)
    parser.add_argument(
        "--png", type=drawing, metavar="FILE", help="write the picture with the generated boxes and text here"
    )


def _generate(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.inference.answers import generate_one

    answer = generate_one(
        options.checkpoint, options.task, image=options.image, text=options.text, beam=options.beam, png=options.png,
        average=options.ema, vocab=options.vocab,
    )  # fmt: skip
    print(answer)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights (optim.ema_decay)")
    parser.add_argument("--vocab", type=Path, metavar="DIR", help="vocabulary directory; else the one the run keeps")

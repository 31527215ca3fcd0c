"""`ofa-ds codes judge`: what a model paints into the middle of pictures, beside the truth."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, command, drawing, positive
from ofa_ds.cli.shards_tools import here


def add_judge(actions: Commands) -> None:
    """Add `codes judge`."""
    parser = command(
        actions, "judge", _judge,
        "How far colours are off in the middle of pictures that a model paints (image infilling), beside the same "
        "model that sees a grey picture or another row's.",
        example="ofa-ds codes judge runs/nano --shards data/scenes/heldout --model scenes --png painted.png",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=here, help="a checkpoint, or a run directory (its newest one)")
    parser.add_argument("--shards", type=here, required=True, metavar="DIR", help="held-out shards")
    parser.add_argument("--model", type=here, required=True, metavar="DIR", help="the VQGAN, as of codes decode")
    parser.add_argument("--rows", type=positive, default=400, metavar="N", help="pictures at most")
    parser.add_argument("--vocab", type=here, metavar="DIR", help="vocabulary directory; else the one the run keeps")
    parser.add_argument(
        "--png", type=drawing, metavar="FILE", help="pictures: as they were, with a hole, painted, painted blindly"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _judge(options: argparse.Namespace) -> None:
    with heavy_imports():
        from ofa_ds.data.shards import Shards
        from ofa_ds.inference.loaded_model import load_model
        from ofa_ds.inference.painted import judge_painted
        from ofa_ds.inference.painting import coder_of

    model = load_model(options.checkpoint, vocab=options.vocab)
    coder = coder_of(options.model, model.recipe.data.code_image_size, model.device)
    found = judge_painted(model, Shards(options.shards), coder, rows=options.rows, png=options.png)
    print(json.dumps(found) if options.json else _in_words(found))


def _in_words(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"{found['examples']} pictures; blind: the better of a grey picture and another row's",
            f"{'':34}{'own':>9}{'blind':>9}{'grey':>9}{'shuffled':>9}",
            _line("colours are off by, of 255", found["colour_error"], 1),
            _line("codes that are right, %", found["token_accuracy"], 100),
            f"  painted from the rows' own codes, colours are off by {found['right_codes']:.1f}",
        ]
    )


def _line(name: str, values: dict[str, float | None], factor: float) -> str:
    cells = (values[how] for how in ("own", "blind", "grey", "shuffled"))
    return f"  {name:32}" + "".join(f"{'-' if cell is None else f'{factor * cell:.1f}':>9}" for cell in cells)

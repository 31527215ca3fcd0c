"""`ofa-ds evaluate`, `generate` and `predict`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofa_ds.cli.heavy_imports import heavy_imports
from ofa_ds.cli.parser import Commands, UsageError, above_zero, command, drawing, finite, natural, positive, text
from ofa_ds.terms import DOWNSTREAM_TASKS, TASKS

if TYPE_CHECKING:
    from ofa_ds.inference.asking import How

INSTRUCTION = "instruction"
"""`ofa_ds.tasks.instruction.NAME`."""
PAINTING = "text_to_image"
"""`ofa_ds.inference.samples.NAME`."""


def add_evaluate(commands: Commands) -> None:
    about = "Held-out loss and accuracy per task, beside what a blind model reaches."
    parser = command(
        commands, "evaluate", _evaluate, about, example="ofa-ds evaluate runs/nano --shards data/scenes/heldout"
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest one)")
    parser.add_argument("--shards", type=str, required=True, metavar="DIR", help="held-out shards")
    parser.add_argument(
        "--task",
        choices=TASKS,
        action="append",
        metavar="TASK",
        help=f"only this one of {', '.join(TASKS)}; may be repeated; all that were trained where not given",
    )
    parser.add_argument("--rows", type=positive, default=1000, metavar="N", help="examples per task at most")
    _add_how(parser, "as many as the task says; of pretraining tasks 1, which is greedy")
    _add_model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--png",
        type=drawing,
        metavar="FILE",
        help="write a sheet for each task: boxes, source, expected and generated text",
    )
    add_codes_model(parser)
    _add_score_files(parser)
    _add_settings(parser)


def _add_score_files(parser: argparse.ArgumentParser) -> None:
    of = parser.add_argument_group(
        "pictures that --codes-model paints of a text", "Files of yours: none is downloaded."
    )
    of.add_argument(
        "--samples",
        type=positive,
        default=1,
        metavar="N",
        help="of each text; the best are told beside the first",
    )
    of.add_argument("--clip", type=Path, metavar="FILE", help="weights of CLIP, for the CLIP score")
    of.add_argument("--inception", type=Path, metavar="FILE", help="torch-fidelity's InceptionV3, for FID and IS")
    of.add_argument(
        "--reference", type=Path, metavar="PATH", help="pictures, or an .npz with mu and sigma, that FID compares with"
    )


def _evaluate(options: argparse.Namespace) -> None:
    if options.codes_model is None and (options.clip or options.inception or options.reference or options.samples > 1):
        raise UsageError(
            "--samples, --clip, --inception and --reference judge pictures: say what paints them, --codes-model DIR"
        )
    if options.samples > 1 and options.beam is not None:
        raise UsageError("--beam gives the most probable of so many samples: want --samples or --beam, one of them")
    if options.reference is not None and options.inception is None:
        raise UsageError("--reference: FID wants --inception too")
    is_alone = int(_rendezvous()["WORLD_SIZE"]) == 1
    with heavy_imports():
        from ofa_ds.inference.evaluate import evaluate
        from ofa_ds.inference.share import ALONE, Share
        from ofa_ds.inference.table import format_table
        from ofa_ds.vision.picture_scores import ScoreFiles

    named = {name: getattr(options, name) for name in ("clip", "inception", "reference")}
    share, device = ALONE, None
    if not is_alone:
        from ofa_ds.engine.process_group import gather, init_distributed, leave_distributed

        ranks = init_distributed()
        share = Share(
            rank=ranks.rank, world_size=ranks.world_size, gather=functools.partial(gather, ranks),
            leave=leave_distributed,
        )  # fmt: skip
        device = ranks.device
    result = evaluate(
        options.checkpoint, options.shards, tasks=options.task, rows=options.rows,
        how=dataclasses.replace(_how(options), samples=options.samples), png=options.png, device=device,
        average=options.ema, vocab=options.vocab, codes_model=options.codes_model, score_files=ScoreFiles(**named),
        share=share,
    )  # fmt: skip
    if share.rank:
        return
    print(json.dumps(_plain(result), allow_nan=False) if options.json else format_table(result))


def _plain(value: Any) -> Any:
    """JSON has no NaN: what is not finite is null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def add_generate(commands: Commands) -> None:
    about = "Generate the answer to one task, or to a free instruction, for one picture and text."
    parser = command(
        commands, "generate", _generate, about,
        example="ofa-ds generate runs/nano --task vqa --image a.png --text 'what color is the circle?'",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest one)")
    names = (*TASKS, INSTRUCTION)
    parser.add_argument(
        "--task", choices=names, required=True, metavar="TASK",
        help=f"one of {', '.join(TASKS)}; or {INSTRUCTION}, whose text the model reads as it stands",
    )  # fmt: skip
    parser.add_argument("--image", type=Path, metavar="FILE", help="a JPEG or PNG file")
    parser.add_argument(
        "--text", type=text, default="",
        help="question, expression, caption to check, text to complete, a pair of sentences with a tab between; in an "
        "instruction <box:x0,y0,x1,y1> is a region of the picture",
    )  # fmt: skip
    _add_how(parser, "as many as the task says; of pretraining tasks 5")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="the answers that may be given (vqa, imagenet)")
    _add_model(parser)
    parser.add_argument(
        "--png", type=drawing, metavar="FILE", help="write the picture with the generated boxes and text here"
    )
    add_codes_model(parser)
    _add_sampling(parser)
    _add_settings(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    of = parser.add_argument_group("text_to_image", "Pictures are sampled; with --rerank the best is first.")
    of.add_argument("--samples", type=positive, metavar="N", help="pictures of the text; 24 where not given")
    of.add_argument("--top-k", type=natural, metavar="K", help="draw among the K most probable codes; 256, 0 for all")
    of.add_argument("--top-p", type=above_zero, metavar="P", help="among those that together reach this probability")
    of.add_argument("--temperature", type=finite, metavar="T", help="1 where not given")
    of.add_argument("--seed", type=natural, metavar="S", help="of the first sample, then S + 1 and so on; 0")
    of.add_argument("--rerank", choices=("clip",), help="order by the likeness of picture and text; wants --clip")
    of.add_argument("--clip", type=Path, metavar="FILE", help="weights of CLIP")
    of.add_argument("--json", action="store_true", help="print codes, seeds and scores")


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What was said of samples. Raises UsageError for what does not go together."""
    names = ("samples", "top_k", "top_p", "temperature", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.task != PAINTING:
        others = {name: getattr(options, name) for name in ("rerank", "clip", "json")}
        for name in (*given, *(name for name, value in others.items() if value)):
            raise UsageError(f"--{name.replace('_', '-')}: is of {PAINTING}, not of {options.task}")
        return {}
    for name in ("image", "beam", "answers", "decoding", "prompt"):
        if getattr(options, name):
            raise UsageError(f"--{name}: {PAINTING} has none; it is sampled from --text")
    if (options.rerank is None) != (options.clip is None):
        raise UsageError("want --rerank clip and --clip FILE together")
    if options.top_p is not None and options.top_p > 1:
        raise UsageError(f"--top-p: want a probability, at most 1, got {options.top_p:g}")
    if options.top_p is not None and options.top_k:
        raise UsageError("want --top-k or --top-p, one of them")
    return given | ({"top_k": 0} if options.top_p is not None else {})


def _paint(options: argparse.Namespace, sampling: dict[str, Any]) -> None:
    with heavy_imports():
        from ofa_ds.inference.samples import Sampling, paint_text

    found = paint_text(
        options.checkpoint, options.text, Sampling(**sampling), how=_how(options), codes_model=options.codes_model,
        clip=options.clip, png=options.png, average=options.ema, vocab=options.vocab,
    )  # fmt: skip
    if options.json:
        print(json.dumps(found))
        return
    for sample in found["samples"]:
        similarity = "" if sample["similarity"] is None else f"  similarity {sample['similarity']:.4f}"
        print(f"seed {sample['seed']}  log-probability of a code {sample['log_probability']:.4f}{similarity}")


def _generate(options: argparse.Namespace) -> None:
    sampling = _sampling(options)
    if options.task == PAINTING:
        return _paint(options, sampling)
    with heavy_imports():
        from ofa_ds.inference.answers import generate_one

    answer = generate_one(
        options.checkpoint, options.task, image=options.image, text=options.text, how=_how(options),
        answers=options.answers, png=options.png, average=options.ema, vocab=options.vocab,
        codes_model=options.codes_model,
    )  # fmt: skip
    print(answer)


def add_predict(commands: Commands) -> None:
    about = (
        "Answer every row of shards of a downstream task and write what its leaderboard takes. Alone, or on every rank "
        "of torchrun or deepspeed --module ofa_ds.predict; run again after a kill, it goes on."
    )
    parser = command(
        commands, "predict", _predict, about,
        example="ofa-ds predict runs/vqa --task vqa --shards shards/vqa-test --out vqa-test.json",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its newest one)")
    parser.add_argument(
        "--task", choices=DOWNSTREAM_TASKS, required=True, metavar="TASK", help=f"one of {', '.join(DOWNSTREAM_TASKS)}"
    )
    parser.add_argument("--shards", type=str, required=True, metavar="DIR", help="rows of the task, answered or not")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE",
        help="the result: JSON, GLUE's TSV, or lines; what is not complete yet stands in FILE.partial",
    )  # fmt: skip
    _add_how(parser, "as many as the task says")
    _add_model(parser)
    _add_settings(parser)
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def _predict(options: argparse.Namespace) -> None:
    from ofa_ds.beat import Pulse

    found = _rendezvous()
    pulse = Pulse(int(found["RANK"]))
    with heavy_imports():
        from ofa_ds.data.shards import Shards
        from ofa_ds.engine.ranks import choose_device
        from ofa_ds.inference.loaded_model import load_model
        from ofa_ds.inference.predict import check_out, predict
        from ofa_ds.inference.share import Share

    share = Share(rank=int(found["RANK"]), world_size=int(found["WORLD_SIZE"]))
    check_out(options.out, share)
    shards = Shards(options.shards, task=options.task)
    device = choose_device(int(found["LOCAL_RANK"]), os.environ, None)
    model = load_model(
        options.checkpoint, device, average=options.ema, vocab=options.vocab, precision=options.precision
    )
    if share.rank == 0:
        print(model.describe(), file=sys.stderr)
    how = _how(options)
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        pulse.beat("sample", done)  # and no `step`: ranks need not wait for each other

    if predict(model, shards, options.task, options.out, how=how, average=options.ema, share=share, told=told):
        print(f"{options.out}: written")


def _rendezvous() -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK. Raises UsageError where the launcher of this process left them unclear."""
    from ofa_ds.engine.rendezvous import rendezvous

    try:
        return rendezvous(os.environ)
    except ValueError as error:
        raise UsageError(error) from error


def _add_how(parser: argparse.ArgumentParser, beams: str) -> None:
    parser.add_argument(
        "--beam", type=positive, metavar="N", help=f"answers kept while one is searched; where not given {beams}"
    )
    parser.add_argument(
        "--decoding", choices=("all", "beam", "open"), default="",
        help="of downstream tasks: score every answer of the list, search among them, or search among all texts; as "
        "the task says where not given",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", choices=("none", "src", "prev_output"),
        help="of downstream tasks: what the decoder reads before the answer; as the model was fine-tuned where not "
        "given, none where it was not",
    )  # fmt: skip


def add_codes_model(parser: argparse.ArgumentParser) -> None:
    """For commands that draw image codes."""
    parser.add_argument(
        "--codes-model", type=Path, metavar="DIR",
        help="VQGAN that paints image codes in --png, or `scenes` for the rule of scenes; else each has some colour",
    )  # fmt: skip


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "set", nargs="*", metavar="KEY=VALUE",
        help="settings of data that are to differ, or model.pixel_norm: data.image_size=480 data.task.premise=true",
    )  # fmt: skip


def _how(options: argparse.Namespace) -> How:
    from ofa_ds.inference.asking import How

    prompt = () if options.prompt is None else (f"data.task.prompt={options.prompt}",)
    settings = (*prompt, *options.set)
    return How(beams=options.beam, search=options.decoding, settings=settings, precision=options.precision)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights (optim.ema_decay)")
    parser.add_argument("--vocab", type=Path, metavar="DIR", help="vocabulary directory; else the one the run keeps")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="compute in bfloat16, which halves the memory, or in fp32; where not given bf16 on a GPU, fp32 on a CPU",
    )  # fmt: skip

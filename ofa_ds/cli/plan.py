"""`ofa-ds plan`: what a run will be like before it is one. Light: the arithmetic comes with the command."""

from __future__ import annotations

import argparse
from pathlib import Path

from ofa_ds.cli.parser import Commands, UsageError, above_zero, command, drawing, finite, from_zero, positive
from ofa_ds.cli.plan_goodput import add_goodput, plan_goodput


def add_plan(commands: Commands) -> None:
    """Add `plan`."""
    parser = command(
        commands, "plan", _plan,
        "Will RECIPE fit, how fast will it go, how long and what will it take: peak memory by part, FLOPs, time of a "
        "step, days, GPU-hours, and the cheapest change where it does not fit. Needs no GPU and no data. --scaling: "
        "the same on several sizes of cluster. --goodput: time lost where hosts fail, by simulated runs.",
        example="ofa-ds plan pretrain-6b --hosts 32 --gpus-per-host 8 --gpu a100-80gb batch.micro_rows=11",
    )  # fmt: skip
    parser.add_argument(
        "words", nargs="*", metavar="RECIPE KEY=VALUE",
        help="a TOML file or a shipped recipe such as pretrain-6b, and keys that are to differ, such as "
        "batch.micro_rows=4 deepspeed=zero3_offload",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--png", type=drawing, metavar="FILE", help="draw it")
    parser.add_argument("--gpus-per-host", type=positive, metavar="N", help="ranks of a host; else 8, and 1 of cpu")
    _add_machine(parser.add_argument_group("of a recipe"))
    several = parser.add_argument_group("of several sizes of cluster")
    several.add_argument("--scaling", action="store_true", help="plan RECIPE on each of --gpus, as many rows a GPU")
    several.add_argument("--goodput", action="store_true", help="plan saving on each of --gpus; wants no recipe")
    several.add_argument("--gpus", type=_sizes, metavar="N,...", help="sizes of the cluster; else 256,512,1024")
    _add_saving(parser.add_argument_group("of failures and saving"))
    add_goodput(parser)


def _add_machine(of: argparse._ArgumentGroup) -> None:
    of.add_argument("--gpu", metavar="NAME", help="a100-40gb, a100-80gb, h100, h200 or cpu")
    of.add_argument("--hosts", type=positive, default=1, metavar="N", help="hosts of the cluster")
    of.add_argument("--network", metavar="NAME", help="between hosts; else what such hosts come with")
    of.add_argument("--calibration", type=Path, metavar="FILE", help="what ofa-ds bench measured on such a machine")
    of.add_argument("--steps", type=positive, metavar="N", help="of the run; else the recipe's train.num_steps")
    of.add_argument("--price-per-gpu-hour", type=from_zero, metavar="X", help="in any currency")
    of.add_argument("--host-memory", type=finite, metavar="GB", help="of a host; else what such hosts come with")
    of.add_argument(
        "--measure", type=positive, metavar="N",
        help="take lengths of texts from N micro-batches of data.shards; else those of OFA's data are assumed",
    )  # fmt: skip
    of.add_argument("--write-recipe", type=Path, metavar="FILE", help="write the recipe that fits")


def _add_saving(of: argparse._ArgumentGroup) -> None:
    """Their sources: docs/cluster.md, `Goodput`."""
    of.add_argument(
        "--gpu-hours", type=above_zero, metavar="HOURS",
        help="GPU-hours from one failure to the next, inf for none; else Llama 3's 50,700",
    )  # fmt: skip
    for name, default, about in (
        ("stall", None, "training waits so long for a save; else as planned, or 1"),
        ("write", None, "from then until the checkpoint is whole, beside training; else as planned, or 30"),
        ("detect", 15.0, "until a failure is noticed"),
        ("stop", 10.0, "until every rank has ended"),
        ("restart", 275.0, "until training goes on"),
    ):
        of.add_argument(f"--{name}", type=from_zero, default=default, metavar="S", help=f"seconds: {about}")


def _plan(options: argparse.Namespace) -> int | None:
    recipes = [word for word in options.words if "=" not in word]
    if len(recipes) > 1:
        raise UsageError(f"want one recipe, got {' and '.join(recipes)}")
    if options.goodput:
        if options.words or options.scaling:
            raise UsageError("--goodput plans any run: leave the recipe and --scaling out")
        return plan_goodput(options)
    if not recipes:
        raise UsageError("want a recipe, such as: ofa-ds plan pretrain-6b --gpu a100-80gb --hosts 32; or --goodput")
    options.recipe, options.set = recipes[0], [word for word in options.words if "=" in word]
    if options.gpus and not options.scaling:
        raise UsageError("--gpus is of --scaling and --goodput; say --hosts and --gpus-per-host")
    if options.scaling:
        from ofa_ds.cli.plan_scaling import plan_scaling

        return plan_scaling(options)
    from ofa_ds.cli.plan_recipe import plan_recipe

    return plan_recipe(options)


def _sizes(text: str) -> list[int]:
    return [positive(each) for each in text.split(",")]

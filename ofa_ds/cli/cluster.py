"""`ofa-ds preflight`, `launch`, `runs`: many hosts from one, and runs. Light: heavy modules come with the command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ofa_ds.cli.parser import Commands, UsageError, command, drawing, group, natural, positive

_RUNNERS = ("deepspeed", "torchrun", "slurm", "openmpi", "mpich")


def add_preflight(commands: Commands) -> None:
    """Add `preflight`."""
    about = "Look at every host of a hostfile: login, program, clock, disks, limits, GPUs, fabric, speed between them."
    parser = command(commands, "preflight", _preflight, about, example="ofa-ds preflight --hostfile hosts --json")
    parser.add_argument("--hostfile", type=Path, required=True, metavar="FILE", help="a line 'HOST slots=N' a host")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--write-healthy", type=Path, metavar="FILE", help="the hostfile, less the hosts that fail")
    parser.add_argument(
        "--directory", type=Path, default=Path(), metavar="DIR", help="where runs are written, on every host"
    )
    parser.add_argument("--skip-bandwidth", action="store_true", help="measure no exchange between hosts")
    parser.add_argument("--timeout", type=positive, default=60, metavar="SECONDS", help="for one answer of one host")


def _preflight(options: argparse.Namespace) -> int:
    from ofa_ds.cluster.preflight.command import Options, preflight, wanted_of

    chosen = Options(
        hostfile=options.hostfile, directory=options.directory, as_json=options.json,
        write_healthy=options.write_healthy, bandwidth=not options.skip_bandwidth, timeout_s=options.timeout,
    )  # fmt: skip
    try:
        wanted = wanted_of(chosen)
    except ValueError as error:
        raise UsageError(error) from error
    return preflight(chosen, wanted)


def add_launch(commands: Commands) -> None:
    about = (
        "Start a command on every rank of the hosts of a hostfile, watch it, and start it again where hosts or ranks "
        "fail: launch --hostfile FILE [options] -- pretrain|finetune RECIPE [KEY=VALUE ...], or -- predict ..."
    )
    example = "ofa-ds launch --hostfile hosts --retries 3 -- pretrain pretrain-6b run_dir=/shared/runs/6b"
    parser = command(commands, "launch", _launch, about, example=example)
    parser.usage = "ofa-ds launch --hostfile FILE [options] -- pretrain|finetune RECIPE [KEY=VALUE ...]"
    add = parser.add_argument
    add("-H", "--hostfile", default="", metavar="FILE", help="one `[USER@]HOST slots=N` a line; `# spare` ends spares")
    add("--runner", choices=_RUNNERS, default="deepspeed", help="what starts the ranks")
    add("-i", "--include", default="", metavar="FILTER", help="only these, such as HOST@HOST:0,2")
    add("-e", "--exclude", default="", metavar="FILTER", help="all but these")
    add("--env", default="", metavar="FILE", help="settings for bash to source, instead of a profile chosen by itself")
    add("--preflight", default="", metavar="FILE", help="what `ofa-ds preflight --json` printed: chooses the profile")
    add("--retries", type=natural, default=0, metavar="N", help="starts after a failure")
    add("--hang-after", type=positive, default=300, metavar="S", help="seconds without a step that are a hang")
    add("--start-within", type=positive, default=1800, metavar="S", help="seconds for a start, or a checkpoint")
    add("--grace", type=positive, default=120, metavar="S", help="seconds for a checkpoint after SIGTERM")
    add("--dry-run", action="store_true", help="print the exact commands and variables, start nothing")
    program = "-- pretrain|finetune|predict ..."
    add("program", nargs=argparse.REMAINDER, metavar=program, help="what each rank runs")


def _launch(options: argparse.Namespace) -> int:
    from ofa_ds.cluster import attempts, launch, runners

    program = options.program[options.program[:1] == ["--"] :]
    request = launch.Request(
        program=tuple(program),
        hostfile=options.hostfile,
        runner=options.runner,
        include=options.include,
        exclude=options.exclude,
        env_file=options.env,
        preflight=options.preflight,
        retries=options.retries,
    )
    try:
        plan = launch.prepare(request)
        if options.dry_run:
            print(launch.dry_run(plan))
            return 0
        for warning in plan.warnings:
            print(f"ofa-ds: {warning}", file=sys.stderr)
        policy = attempts.Policy(
            retries=options.retries,
            hang_after_s=options.hang_after,
            start_within_s=options.start_within,
            grace_s=options.grace,
            spares=plan.spares,
        )
        return attempts.run(plan.job, policy, runners)
    except ValueError as error:
        raise UsageError(error) from error


def add_runs(commands: Commands) -> None:
    """Add `runs` and its actions."""
    actions = group(commands, "runs", "Runs: what every host and rank of one is doing; how two differ.")
    about = "One screen: progress, speed, loss, checkpoint, attempts, hosts and ranks, warnings. Only reads files."
    watch = command(actions, "watch", _watch, about, example="ofa-ds runs watch runs/6b")
    watch.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, from any host that sees it")
    watch.add_argument("--json", action="store_true", help="one JSON object a line")
    watch.add_argument("--once", action="store_true", help="show it once; else until the run is over, or Ctrl-C")
    watch.add_argument("--every", type=positive, default=2, metavar="SECONDS", help="from one look to the next")

    about = "In what two runs differ, and where their curves part: recipe, DeepSpeed, data, code, machine. Only reads."
    compared = command(actions, "compare", _compare, about, example="ofa-ds runs compare runs/a runs/b --png ab.png")
    compared.add_argument("a", type=Path, metavar="A", help="directory of a run, of any version, whole or not")
    compared.add_argument("b", type=Path, metavar="B", help="directory of the other")
    compared.add_argument("--json", action="store_true", help="one JSON object")
    compared.add_argument("--png", type=drawing, metavar="FILE", help="draw the curves of both")


def _compare(options: argparse.Namespace) -> int:
    from ofa_ds.runs.compare import compare, lines

    try:
        one, other, facts = compare(options.a, options.b)
        if options.png:
            from ofa_ds.runs.picture import draw

            drawn = draw(one.metrics, other.metrics, (str(options.a), str(options.b)), options.png)
    except ValueError as error:
        raise UsageError(error) from error
    print(json.dumps(facts, allow_nan=False) if options.json else "\n".join(lines(facts)))
    if options.png and not options.json:
        print(f"picture: {options.png}, {drawn}")
    return 0


def _watch(options: argparse.Namespace) -> int:
    try:
        from ofa_ds.cluster.watch_screen import watch

        return watch(options.run_dir, as_json=options.json, once=options.once, every_s=options.every)
    except KeyboardInterrupt:  # while this was imported
        return 0
    except ValueError as error:
        raise UsageError(error) from error

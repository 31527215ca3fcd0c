"""From the options of `ofa-ds launch` to a job: everything that can be known to be wrong is said before a rank starts.

What is refused is one line: ValueError for the user's mistake, RuntimeError for a machine that does not answer.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ofa_ds.cluster import environment, rdma, reaching, runners, shrinking
from ofa_ds.cluster.check_recipe import check_command, check_run
from ofa_ds.cluster.hostfile import Host, choose, read_hostfile, split_spares
from ofa_ds.cluster.job import Job
from ofa_ds.config import Recipe, load_recipe

CHECKOUT = Path(__file__).absolute().parents[2]
TRAINING = ("pretrain", "finetune")
LAUNCHABLE = (*TRAINING, "predict")
"""Commands of `ofa-ds` that run on all ranks at once."""

_SAFE = re.compile(r"[\w@+=:,./-]+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for; "" for what was not."""

    program: tuple[str, ...]
    """`pretrain` or `finetune`, RECIPE, KEY=VALUE ...; or `predict`, CHECKPOINT and its options."""
    hostfile: str = ""
    runner: str = "deepspeed"
    include: str = ""
    exclude: str = ""
    env_file: str = ""
    """A script of settings for bash to source."""
    preflight: str = ""
    """What `ofa-ds preflight --json` printed."""
    retries: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    job: Job
    spares: tuple[Host, ...]
    settings: str
    """Where the network's settings come from, one line."""
    warnings: tuple[str, ...]


def prepare(request: Request) -> Plan:
    """The job, from the options, this process's environment and directory. Asks the first host for its address."""
    recipe = _recipe(request.program)
    hosts, spares = _hosts(request)
    num_ranks = sum(host.slots for host in hosts)
    if recipe is None:
        run_dir = _predicts_into(request.program)
    else:
        run_dir = recipe.run_dir
        check_command(request.program[0], recipe)
        check_run(recipe, num_ranks)
    if Path(run_dir).exists() and not Path(run_dir).is_dir():
        raise ValueError(f"run_dir {run_dir}: is a file; name a directory that all hosts share")
    merged, of_ranks = environment.gather(os.environb, _env_file(request.env_file))
    draft = Job(
        hosts=tuple(hosts),
        runner=request.runner,
        program=tuple(map(os.fsencode, request.program)),
        directory=os.getcwdb(),
        environment=of_ranks,
        master_address=os.fsdecode(merged.get(b"MASTER_ADDR", b"")),
        master_port=_port(os.fsdecode(merged.get(b"MASTER_PORT", b""))),
        run_dir=Path(run_dir).absolute(),
    )
    runners.check(draft)
    address, facts = reaching.ask(draft)
    of_ranks, settings = _with_profile(request, draft, facts)
    losses = shrinking.warnings(hosts, spares, request.retries, _fits(recipe))
    job = replace(draft, environment=_with_checkout(of_ranks), master_address=_address(address, hosts[0]))
    return Plan(job=job, spares=tuple(spares), settings=settings, warnings=tuple(losses))


def _recipe(program: tuple[str, ...]) -> Recipe | None:
    """The recipe that all ranks will load; None for a prediction, which has none."""
    wanted = f"-- {'|'.join(TRAINING)} RECIPE [KEY=VALUE ...]"
    if not program or program[0] not in LAUNCHABLE:
        wanted += ", or -- predict CHECKPOINT ..."
    if not program:
        raise ValueError(f"launch: nothing to run; want {wanted}")
    if program[0] not in LAUNCHABLE:
        raise ValueError(f"launch: {program[0]!r} does not run on all ranks; want {wanted}")
    if program[0] == "predict":
        return None
    if len(program) == 1 or program[1].startswith("-"):
        raise ValueError(f"launch: {program[0]} without a recipe; want {wanted}")
    for word in program[2:]:
        if "=" not in word or word.startswith("-"):
            raise ValueError(f"launch: {word!r} after the recipe: want KEY=VALUE; options of launch stand before --")
    return load_recipe(program[1], program[2:])


def _predicts_into(program: tuple[str, ...]) -> str:
    """Where what is known of the launch goes: beside the result. All else of the options the ranks check."""
    if len(program) == 1 or program[1].startswith("-"):
        raise ValueError("launch: predict without a checkpoint; want -- predict CHECKPOINT --task T --out FILE ...")
    found = [word.removeprefix("--out=") for word in program[2:] if word.startswith("--out=")]
    found += [after for word, after in pairwise([*program[2:], ""]) if word == "--out"]
    if not found or not found[-1]:
        raise ValueError("launch: predict without --out FILE, beside which is noted how the launch goes")
    if Path(found[-1]).exists():
        raise ValueError(f"{found[-1]}: exists; give another --out or remove it")
    return f"{found[-1]}.launch"


def _hosts(request: Request) -> tuple[list[Host], list[Host]]:
    """(those that take part, spares), filtered."""
    if request.hostfile:
        source, found = request.hostfile, read_hostfile(request.hostfile)
    elif request.runner == "slurm" and "SLURM_JOB_ID" in os.environ:
        source, found = "this allocation", reaching.hosts_of_allocation(os.environ)
    else:
        raise ValueError(
            "--hostfile: want a file with one 'HOST slots=N' a line; without one nothing is started, here neither "
            "(--runner slurm inside an allocation takes its nodes)"
        )
    return split_spares(choose(found, request.include, request.exclude), source)


def _env_file(path: str) -> str:
    if path and not os.access(path, os.R_OK):
        shipped = ", ".join(sorted(file.name for file in rdma.PROFILES.glob("*.env"))) or "none"
        raise ValueError(f"--env {path}: no such file; {rdma.PROFILES} has {shipped}")
    return path


def _with_profile(request: Request, job: Job, facts: rdma.Facts | None) -> tuple[environment.Environment, str]:
    """(what the ranks get, where the settings come from)."""
    if request.env_file:
        return job.environment, f"{request.env_file} (--env)"
    if request.preflight:
        seen = rdma.facts_of_preflight(request.preflight, [host.name for host in job.hosts])
        name, why = rdma.choose_for_all(seen)
    elif facts is not None:
        name, why = rdma.choose(facts)
    else:
        return job.environment, "none: the first host was not asked; name one with --env"
    profile = rdma.PROFILES / f"{name}.env"
    if not profile.is_file():
        return job.environment, f"none: {profile} is not installed; {why}"
    is_set = facts.is_set if facts is not None else frozenset()
    return environment.filled(job.environment, str(profile), is_set), f"{profile} ({why})"


def _with_checkout(of_ranks: environment.Environment) -> environment.Environment:
    """Ranks import the code of this checkout, wherever the interpreter of a host would look."""
    if not (CHECKOUT / "kernels" / "ofa_kernels").is_dir():
        return of_ranks  # installed
    ours = [os.fsencode(CHECKOUT), os.fsencode(CHECKOUT / "kernels")]
    theirs = [each for each in of_ranks.get(b"PYTHONPATH", b"").split(b":") if each and each not in ours]
    return {**of_ranks, b"PYTHONPATH": b":".join([*ours, *theirs])}


def _port(text: str) -> int:
    """0, a free port of the first host at each start, where none is asked for."""
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ValueError(f"MASTER_PORT {text!r}: want a number from 1 to 65535")
    return int(text)


def _address(address: str, first: Host) -> str:
    if not _SAFE.fullmatch(address):
        raise ValueError(f"MASTER_ADDR {address!r}: want a name or address of {first.name} that all hosts know")
    return address


def _fits(recipe: Recipe | None) -> Callable[[int], bool]:
    """Whether so many ranks can do it; any number predicts."""

    def fits(num_ranks: int) -> bool:
        if recipe is None:
            return True
        try:
            recipe.batch.accumulation_steps(num_ranks)
        except ValueError:
            return False
        return True

    return fits


def dry_run(plan: Plan) -> str:
    """The exact commands and variables, as a shell would take them; nothing is started."""
    from ofa_ds.cluster.channels import SSH, remote_command
    from ofa_ds.cluster.supervisor import agent_argv, rank_argv

    job = plan.job
    out = [
        f"# {len(job.hosts)} hosts, {job.num_ranks} ranks, spares: {len(plan.spares)}, --runner {job.runner}",
        f"# network settings: {plan.settings}",
        f"# rank 0: {job.hosts[0].name}, {job.master_address} port {job.master_port or '(a free one, at each start)'}",
        f"# run_dir: {job.run_dir}",
        "# each rank gets, beside its own host's variables:",
        *environment.lines(job.environment),
        f"# and starts in {shlex.quote(os.fsdecode(job.directory))}",
    ]
    rank = rank_argv(job)
    if runners.is_central(job):
        out += ["# here:", shlex.join(runners.central_argv(job, agent_argv()))]
    for number, host in enumerate(job.hosts):
        own = {name: value for name, value in job.environment_on(host).items() if name not in job.environment}
        if runners.is_central(job):
            argv = rank
        else:
            argv = runners.node_argv(job, number, rank)
            out += [f"# here, for {host.name}:", shlex.join([*SSH, "--", host.name, remote_command("TOKEN.HOST")])]
        out += [f"# what an agent on {host.name} starts:", *environment.lines(own), shlex.join(argv)]
    return "\n".join(out)

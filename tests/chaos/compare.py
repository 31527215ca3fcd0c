"""python -m tests.chaos.compare   seconds to tell, to stop and to train again, beside the launchers underneath

The same real ZeRO-3 training on three hosts (network namespaces; root) under `ofa-ds launch`, DeepSpeed's launcher
(pdsh) and torchrun (c10d rendezvous, 2 to 3 nodes, 3 restarts, one ssh a host), each with the same fault on the second
host. A cell is watched for LIMIT_S seconds, longer where it may train again. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from field import Field, Rank, Watch, field, interpreter, is_alive  # noqa: E402, I001 - makes the next ones importable

import faults  # noqa: E402
import hosts  # noqa: E402
from one_host import Host, Running  # noqa: E402

from ofa_ds import beat  # noqa: E402

LIMIT_S = 40
AGAIN_LIMIT_S = 120
"""Where all ranks have stopped and the command goes on."""
START_LIMIT_S = 120
AT_STEP = 5
BEATS = "/dev/shm/beats"
_WRONG = re.compile(rb"error|kill|fail|lost|signal|exit|refused|reset|hang|closed", re.IGNORECASE)
FAULTS = (
    "kill -9 of a rank",
    "kill -9 of a host's agent",
    "link of a host down",
    "SIGSTOP of a rank",
    "kill -9 of the parent",
)


@dataclass(frozen=True)
class System:
    name: str
    command: Callable[[Path, Field], list[str]]
    """Desk with `hosts` and recipe.toml, field -> what starts the training from the login host."""
    agent: str
    """In the command line of what starts the ranks of a host."""


@dataclass(frozen=True)
class Cell:
    told_s: float | None
    """Until the command says that something is wrong, or ends."""
    stopped_s: float | None
    """Until every rank that there was is gone."""
    again_s: float | None
    """Until a new rank has finished a step."""
    code: int | None
    """Of the command, where it ended."""

    def __str__(self) -> str:
        end = "" if self.code is None else f"; exit {self.code}"
        again_limit_s = LIMIT_S if self.stopped_s is None else AGAIN_LIMIT_S
        return f"{_shown(self.told_s)} / {_shown(self.stopped_s)} / {_shown(self.again_s, again_limit_s)}{end}"


def _shown(seconds: float | None, limit_s: int = LIMIT_S) -> str:
    return f"never ({limit_s})" if seconds is None else f"{seconds:.1f}"


def ours(desk: Path, stage: Field) -> list[str]:
    limits = ["--retries", "2", "--hang-after", "10"]
    return [
        interpreter(),
        "-m",
        "ofa_ds.cli",
        "launch",
        "--hostfile",
        "hosts",
        *limits,
        "--",
        "pretrain",
        "recipe.toml",
    ]


def deepspeed(desk: Path, stage: Field) -> list[str]:
    place = ["--hostfile", "hosts", "--launcher", "pdsh", "--force_multi", "--master_addr", "10.77.0.1"]
    command = [interpreter(), "-m", "deepspeed.launcher.runner", *place, "--master_port", str(hosts.free_port())]
    return [*command, "--module", "ofa_ds.pretrain", str(desk / "recipe.toml")]


def torchrun(desk: Path, stage: Field) -> list[str]:
    """What people write: a loop over ssh, and `wait`."""
    nodes = ["--nnodes", "2:3", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    nodes += ["--rdzv-endpoint", f"10.77.0.1:{hosts.free_port()}", "--rdzv-id", "compare"]
    run = [interpreter(), "-m", "torch.distributed.run", *nodes, "-m", "ofa_ds.pretrain", str(desk / "recipe.toml")]
    settings = [f"{name}={value}" for name, value in _variables(stage).items()]
    words = shlex.join(["env", "-C", str(desk), *settings, *run])
    loop = 'for host in 10.77.0.1 10.77.0.2 10.77.0.3; do ssh "$host" "$0" & pids="$pids $!"; done; '
    return ["bash", "-c", loop + "code=0; for pid in $pids; do wait $pid || code=$?; done; exit $code", words]


SYSTEMS = (
    System("ofa-ds launch", ours, "ofa_ds.cluster.agent"),
    System("DeepSpeed (pdsh)", deepspeed, "deepspeed.launcher.launch"),
    System("torchrun (ssh)", torchrun, "torch.distributed.run"),
)


def _variables(stage: Field) -> dict[str, str]:
    """What the ranks of the other two need, and where they leave the beats by which they are watched."""
    env = stage.environment()
    kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME")
    return {**{name: env[name] for name in kept}, beat.DIRECTORY: BEATS}


def measure(stage: Field, system: System, fault: str) -> Cell:
    """One cell: starts, waits for the fifth step, strikes, watches."""
    desk = stage.desk("compare")
    stage.cluster.hostfile(desk / "hosts")
    (desk / "recipe.toml").write_text(_recipe(stage, desk / "run"))
    environment = stage.environment()
    if system.command is not ours:
        (desk / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in _variables(stage).items()))
        for host in stage.cluster.hosts:
            stage.cluster.run(["mkdir", "-p", BEATS], host=host, timeout=10)
    command = system.command(desk, stage)
    running = stage.cluster.start(command, host=stage.cluster.login, log=desk / "log", cwd=desk, env=environment)
    try:
        before = _wait_for_step(stage, running)
        said = running.log.stat().st_size
        struck_at = time.monotonic()
        _strike(fault, stage.cluster.hosts[1], before, system, running)
        return _watch(stage, running, before, said, struck_at, fault == FAULTS[-1])
    finally:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
        faults.heal(stage.cluster)


def _recipe(stage: Field, run_dir: Path) -> str:
    sections: dict[str, list[str]] = {}
    changed = {"train.num_steps": "100000", "train.save_every": "3", "train.keep": "2", "train.log_every": "100000"}
    given = [*stage.settings, "model.preset=nano", *(f"{name}={value}" for name, value in changed.items())]
    values = dict(setting.partition("=")[::2] for setting in given)
    base = {"data.image_size": "64", "data.infill_image_size": "64", "data.code_image_size": "32"}
    base |= {"data.max_image_size": "64", "data.sample_patches": "0", "data.augment": "none"}
    for key, value in {**base, **values}.items():
        section, _, name = key.partition(".")
        is_text = not value[0].isdigit() and value[0] != "{" and value not in ("true", "false")
        sections.setdefault(section, []).append(f'{name} = "{value}"' if is_text else f"{name} = {value}")
    lines = [f'run_dir = "{run_dir}"', 'deepspeed = "zero3_small"']
    for section, entries in sections.items():
        lines += [f"[{section}]", *entries]
    return "\n".join(lines) + "\n"


def _wait_for_step(stage: Field, running: Running) -> dict[Host, Rank]:
    deadline, watch = time.monotonic() + START_LIMIT_S, Watch()
    while time.monotonic() < deadline and running.process.poll() is None:
        found = {host.name: (host, ranks) for host in stage.cluster.hosts if (ranks := watch.ranks(host))}
        if len(found) == 3 and all(ranks[0].step >= AT_STEP for _, ranks in found.values()):
            return {name: ranks[0] for name, (_, ranks) in found.items()}
        time.sleep(0.05)
    raise RuntimeError(f"no step {AT_STEP} in {START_LIMIT_S} s: {running.output[-3000:]}")


def _strike(fault: str, host: Host, before: dict[str, Rank], system: System, running: Running) -> None:
    if fault == "link of a host down":
        faults.link_down(host)
    elif fault == "kill -9 of the parent":
        os.kill(running.pid, signal.SIGKILL)
    elif fault == "kill -9 of a host's agent":
        os.kill(min(host.find(system.agent), key=lambda process: process.started).pid, signal.SIGKILL)
    else:
        os.kill(before[host.name].pid, signal.SIGSTOP if fault.startswith("SIGSTOP") else signal.SIGKILL)


def _watch(
    stage: Field, running: Running, before: dict[str, Rank], said: int, struck_at: float, parent_killed: bool
) -> Cell:
    told = stopped = again = None
    old, watch = {rank.pid for rank in before.values()}, Watch()
    while told is None or stopped is None or again is None:
        now = time.monotonic() - struck_at
        if now > (LIMIT_S if stopped is None else AGAIN_LIMIT_S):
            break
        ended = running.process.poll() is not None
        if told is None and ((ended and not parent_killed) or _WRONG.search(running.log.read_bytes()[said:])):
            told = now
        if stopped is None and not any(map(is_alive, old)):
            stopped = now
        if again is None and stopped is not None:
            new = [rank for host in stage.cluster.hosts for rank in watch.ranks(host) if rank.pid not in old]
            again = now if any(rank.phase == "step" for rank in new) else None
            if ended and not new and (told is not None or now > LIMIT_S):
                break
        time.sleep(0.05)
    return Cell(told, stopped, again, running.process.poll())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.compare", description=__doc__)
    parser.add_argument("--systems", default="", help="only those whose name holds one of these words, with commas")
    wanted = parser.parse_args().systems.split(",")
    systems = [system for system in SYSTEMS if any(word in system.name for word in wanted)]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print(f"| fault | {' | '.join(system.name for system in systems)} |\n|---|{'---|' * len(systems)}", flush=True)
    with field(3, Path(tempfile.mkdtemp(prefix="ofa-compare-"))) as stage:
        for fault in FAULTS:
            cells = [measure(stage, system, fault) for system in systems]
            print(f"| {fault} | {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

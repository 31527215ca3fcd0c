"""Seconds from a fault until no rank is left on any of three hosts: `ofa-ds launch`, torchrun, DeepSpeed's launcher.

    sudo python tests/multihost/time_supervision.py [LIMIT_S]       ten minutes on two cores; prints a table

The same ranks for all: they add a number up over gloo, ten times a second. torchrun is started over one ssh a host;
DeepSpeed's launcher by itself, over pdsh. What lives on after LIMIT_S (40) is `never`. Run it as `python ... rank` and
it is such a rank.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faults
import hosts

STAND_IN = hosts.ROOT / "tests" / "reliability" / "stand_in.py"
SYSTEMS = ("ofa-ds launch", "torchrun", "DeepSpeed, pdsh")


def rank(directory: Path) -> None:
    from ofa_ds.beat import Pulse

    pulse = Pulse(int(os.environ["RANK"]))
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    step = 0
    while True:
        dist.all_reduce(torch.ones(1))
        step += 1
        pulse.beat("step", step)
        if step == 20:
            (directory / f"up-{os.environ['RANK']}").touch()
        time.sleep(0.1)


def start(system: str, cluster: hosts.Cluster, directory: Path) -> object:
    program = [str(Path(__file__).absolute()), "rank", str(directory)]
    environment = {**hosts.launch_env(cluster), "OFA_STAND_IN": "1"}
    port = environment.pop("MASTER_PORT")
    (directory / "hosts").write_text("".join(f"{host.name} slots=1\n" for host in cluster.hosts))
    if system == "ofa-ds launch":
        settings = {"hosts": [[host.name, 1] for host in cluster.hosts], "run_dir": str(directory), "steps": "0"}
        settings |= {"policy": {"hang_after_s": 5.0}, "program": [sys.executable, "-u", *program]}
        command = [sys.executable, str(STAND_IN), "launch", json.dumps(settings)]
    elif system == "torchrun":
        lines = []
        for number, host in enumerate(cluster.hosts):
            engine = [sys.executable, "-m", "torch.distributed.run", "--nnodes=3", f"--node_rank={number}"]
            engine += ["--nproc_per_node=1", f"--master_addr={cluster.hosts[0].address}", f"--master_port={port}"]
            words = ["env", f"PYTHONPATH={environment['PYTHONPATH']}", "GLOO_SOCKET_IFNAME=eth0", *engine, *program]
            lines.append(shlex.join(["ssh", host.name, shlex.join(words)]) + " &")
        waiting = "code=0; for each in $(jobs -p); do wait $each || code=$?; done; exit $code"
        command = ["bash", "-c", "\n".join([*lines, waiting])]
    else:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(directory / "hosts")]
        command += ["--launcher", "pdsh", "--no_ssh_check", "--master_addr", cluster.hosts[0].address]
        command += ["--master_port", port, *program]
        (directory / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
    return cluster.start(command, host=cluster.login, log=directory / "said", cwd=directory, env=environment)


def ranks(host: hosts.Host, directory: Path) -> list:
    """The interpreters that are ranks: neither shims nor engines, which have the same words and more."""
    found = host.find(str(Path(__file__).name), "rank", str(directory))
    return [each for each in found if not {"ofa_ds.cluster.rank", "torch.distributed.run"} & set(each.arguments)
            and "deepspeed.launcher.launch" not in each.arguments and "-c" not in each.arguments[:2]]  # fmt: skip


def engine(host: hosts.Host, directory: Path) -> int:
    """The process that stands between the launching process and the ranks of a host."""
    for words in (("ofa_ds.cluster.agent",), ("torch.distributed.run",), ("deepspeed.launcher.launch",)):
        if found := [each for each in host.find(*words) if "-c" not in each.arguments[:2]]:
            return found[0].pid
    raise AssertionError("no engine")


FAULTS: dict[str, Callable[[hosts.Host, Path, object], object]] = {
    "`kill -9` of a rank": lambda host, directory, running: os.kill(ranks(host, directory)[0].pid, signal.SIGKILL),
    "`kill -9` of agent or engine": lambda host, directory, running: os.kill(engine(host, directory), signal.SIGKILL),
    "SIGSTOP of a rank": lambda host, directory, running: os.kill(ranks(host, directory)[0].pid, signal.SIGSTOP),
    "link of a host down": lambda host, directory, running: faults.link_down(host),
    "power cut of a host": lambda host, directory, running: faults.power_cut(host),
    "`kill -9` of the launching process": lambda host, directory, running: os.kill(running.pid, signal.SIGKILL),
}


def measure(system: str, fault: str, cluster: hosts.Cluster, limit_s: float) -> str:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        running = start(system, cluster, directory)
        until = time.monotonic() + 120
        while len(list(directory.glob("up-*"))) < 3:
            if time.monotonic() > until or running.process.poll() is not None:
                return f"does not start: {running.output[-300:]}"
            time.sleep(0.1)
        host, begun = cluster.hosts[1], time.monotonic()
        FAULTS[fault](host, directory, running)
        alive = [each for each in cluster.hosts if not fault.startswith("power") or each is not host]
        while any(ranks(each, directory) for each in alive):
            if time.monotonic() - begun > limit_s:
                return "never"
            time.sleep(0.05)
        seconds = f"{time.monotonic() - begun:.1f}"
        while running.process.poll() is None and time.monotonic() - begun < limit_s:
            time.sleep(0.05)
        code = running.process.poll()
        return seconds + (", goes on" if code is None else f", exit {code}" if not fault.endswith("process") else "")


def main(limit_s: float) -> None:
    print(f"| fault | {' | '.join(SYSTEMS)} |\n|---|{'---|' * len(SYSTEMS)}", flush=True)
    with tempfile.TemporaryDirectory() as name, hosts.cluster(3, Path(name)) as cluster:
        for fault in FAULTS:
            cells = []
            for system in SYSTEMS:
                try:
                    cells.append(measure(system, fault, cluster, limit_s))
                finally:
                    faults.heal(cluster)
            print(f"| {fault} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # DeepSpeed puts it first
    if arguments[:1] == ["rank"]:
        rank(Path(arguments[1]))
    main(float(arguments[0]) if arguments else 40.0)

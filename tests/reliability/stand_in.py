"""A cluster of one machine for tests of the supervisor: everything is real but ssh, the engine and the training.

    python stand_in.py launch SETTINGS      `attempts.run` on hosts of these names, with ranks that only beat
    python stand_in.py engine FIRST SLOTS SIZE RANK_ARGV ...    starts SLOTS ranks, as torchrun would on a host
    python stand_in.py rank DIRECTORY NUM_STEPS

A rank does what the file DIRECTORY/fault-RANK says once it has come to the step that it names: `STEP WORD`. It counts
its steps on from what DIRECTORY/step_* say, as a resumed run does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ofa_ds import beat

STEP_S = 0.05
MARK = "OFA_STAND_IN"


class Stopped(Exception):
    pass


def launch(settings: dict) -> int:
    from ofa_ds.cluster import attempts, runners, supervisor
    from ofa_ds.cluster.hostfile import Host
    from ofa_ds.cluster.job import Job

    program = [sys.executable, "-u", __file__, "rank", settings["run_dir"], settings["steps"]]
    program = settings.get("program", program)
    supervisor.rank_argv = lambda job: [sys.executable, "-u", "-m", "ofa_ds.cluster.rank", "--", *program]

    class Runners:
        def node_argv(self, job: Job, host_index: int, rank_argv: list[str]) -> list[str]:
            first = sum(host.slots for host in job.hosts[:host_index])
            numbers = [str(first), str(job.hosts[host_index].slots), str(job.num_ranks)]
            return [sys.executable, "-u", __file__, "engine", *numbers, *rank_argv]

        def is_central(self, job: Job) -> bool:
            return runners.is_central(job)

        def central_argv(self, job: Job, agent_argv: list[str]) -> list[str]:
            if settings.get("many"):
                return [sys.executable, str(Path(__file__).with_name("many_agents.py")), str(job.num_ranks)]
            return [sys.executable, "-u", __file__, "central", str(job.num_ranks), *agent_argv]

    real = "program" in settings  # engine and ranks
    names = (MARK.encode(), b"GLOO_SOCKET_IFNAME")
    environment = {name: os.environb[name] for name in names if name in os.environb}
    environment[b"OFA_BYTES"] = b"a\xff\n'$(x)"
    job = Job(
        hosts=tuple(Host(name, slots) for name, slots in settings["hosts"]),
        runner=settings.get("runner", "torchrun"),
        program=(b"stand-in",),
        directory=os.getcwdb(),
        environment=environment,
        master_address="" if real else "127.0.0.1",
        master_port=0,
        run_dir=Path(settings["run_dir"]),
    )
    spares = tuple(Host(name, slots) for name, slots in settings.get("spares", ()))
    policy = attempts.Policy(**settings["policy"], spares=spares)
    return attempts.run(job, policy, runners if real else Runners())


def engine(first: int, slots: int, size: int, rank_argv: list[str]) -> int:
    """Ends the others when one fails, and says 1 whatever happened: as torchrun does."""
    ranks = []
    for rank in range(first, first + slots):
        given = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank - first)}
        ranks.append(subprocess.Popen(rank_argv, env={**os.environ, **given}))
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.terminate()
            return 1
        time.sleep(0.05)
    return 1 if any(rank.returncode for rank in ranks) else 0


def central(size: int, agent_argv: list[str]) -> int:
    """Starts an agent a rank, as mpirun does."""
    agents = []
    for rank in range(size):
        given = {"PMI_RANK": str(rank), "PMI_SIZE": str(size)}
        given |= {"MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": str(size)}
        agents.append(subprocess.Popen(agent_argv, env={**os.environ, **given}))
    return max(agent.wait() for agent in agents)


def rank(directory: Path, num_steps: int) -> int:
    number = int(os.environ["RANK"])
    pulse = beat.Pulse(number)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda got, _: stop.append(got))
    assert os.environb[b"OFA_BYTES"] == b"a\xff\n'$(x)"
    up = f"up-{os.environ['MASTER_PORT']}-"  # another one each time
    step = max((int(path.name[5:]) for path in directory.glob("step_*")), default=0)
    pulse.beat("start", step)
    (directory / f"{up}{number}").touch()
    while len(list(directory.glob(f"{up}*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)
    print(f"rank {number} goes on from step {step}")
    try:
        while step < num_steps and not stop:
            time.sleep(STEP_S)
            _fault(directory, number, step)
            step += 1
            pulse.beat("step", step)
        if number == 0:
            (directory / f"step_{step:08d}").mkdir(exist_ok=True)
    except Exception as error:
        beat.write_error(number, error)
        print(f"ofa-ds: {error}", file=sys.stderr)
        return 1
    return 130 if step < num_steps else 0


def _fault(directory: Path, number: int, step: int) -> None:
    file = directory / f"fault-{number}"
    with contextlib.suppress(FileNotFoundError, ValueError):
        at, word, *rest = file.read_text().split(maxsplit=2)
        if int(at) != step:
            return
        if "always" not in " ".join(rest):
            file.unlink()
        if word == "raise":
            raise RuntimeError("the lamp is broken")
        if word == "echo":
            raise RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:1234")
        if word == "daemon" and os.fork() == 0:  # a process that gets away from its rank
            os.setsid()
            time.sleep(600)
        if word == "chatter":
            print("chatter " * 10 + "\n" * 1, end="", flush=True)
            print("\n".join(["chatter"] * 19_990), flush=True)
        if word == "sleep":
            time.sleep(600)
        if word == "exit":
            print("the last words")
            sys.stdout.flush()
            os._exit(int(rest[0]))
        if word.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, word))
            time.sleep(600)


def main(arguments: list[str]) -> int:
    what, *rest = arguments
    if what == "launch":
        return launch(json.loads(rest[0]))
    if what == "engine":
        return engine(*map(int, rest[:3]), rest[3:])
    if what == "central":
        return central(int(rest[0]), rest[1:])
    return rank(Path(rest[0]), int(rest[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

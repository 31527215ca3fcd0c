"""Where runs of the chaos suite take place: hosts, a disk that can be full, clocks that can jump, data to train on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[0] / "multihost"), str(HERE.parents[0]), str(HERE.parents[1])]

import hosts  # noqa: E402
import one_host  # noqa: E402
import scenes_shards  # noqa: E402
from plans import NUM_STEPS  # noqa: E402

from ofa_ds import beat  # noqa: E402

INSIDE = HERE / "inside"
DISK_MiB = 160
SETTINGS = (
    "model.change={encoder_layers=1,decoder_layers=1,dim=32,ffn_dim=32,num_heads=2}",
    "model.dropout=0.1",
    "data.workers=0",
    "batch.global_rows=12",
    "batch.micro_rows=2",  # divides at 1, 2 and 3 ranks
    "optim.warmup_steps=1",
    f"train.num_steps={NUM_STEPS}",
    "train.log_every=1",
    "train.sample_every=0",
    "train.save_every=2",
    "train.keep=20",
)
"""The smallest model that the trainer takes, on few rows: most of a run is its start."""


@dataclass(frozen=True)
class Field:
    cluster: hosts.Cluster
    work: Path
    disk: Path
    """A small file system that all hosts share; run directories are there."""
    clocks: Path
    """A file HOSTNAME says by how many seconds the clock of that host is wrong."""
    data: Path

    @property
    def settings(self) -> list[str]:
        return [f"data.shards={self.data / 'shards'}", f"data.vocab={self.data / 'vocab'}", *SETTINGS]

    def desk(self, name: str) -> Path:
        """A new directory to start commands in, where a launch finds what the ranks' clocks need."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "seen").mkdir(parents=True)
        (folder / ".deepspeed_env").write_text(f"LD_PRELOAD={self.work / 'clock.so'}\n")
        return folder

    def environment(self, orders: Path | None = None) -> dict[str, str]:
        """Of a launch, and so of its ranks. orders: see tests/chaos/inside/sitecustomize.py."""
        env = hosts.launch_env(self.cluster)
        env.pop("MASTER_PORT", None)
        env["PYTHONPATH"] = f"{INSIDE}:{env['PYTHONPATH']}"
        env |= {"OFA_CHAOS_CLOCK": str(self.clocks), "LD_PRELOAD": str(self.work / "clock.so"), "HOME": str(self.work)}
        return env if orders is None else {**env, "OFA_CHAOS": str(orders)}


@contextmanager
def field(num_hosts: int, work: Path) -> Iterator[Field]:
    """All of it, gone again whatever happens."""
    lack = missing_requirement()
    if lack is not None:
        raise RuntimeError(lack)
    _remove_leftovers()
    disk, clocks = work / "disk", work / "clocks"
    for folder in (disk, clocks):
        folder.mkdir(parents=True)
    flags = ["-shared", "-fPIC", "-o", str(work / "clock.so")]
    subprocess.run(["cc", *flags, str(HERE / "clock.c"), "-ldl"], check=True)
    with ExitStack() as stack:
        # Before the hosts start: they keep the mounts that they began with.
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MiB}m", _disk_name(os.getpid()), str(disk)], check=True
        )
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=False)
        cluster = stack.enter_context(hosts.cluster(num_hosts, work / "hosts"))
        _preload_clock(cluster, work)
        yield Field(cluster, work, disk, clocks, scenes_shards.build(work / "data", rows=48))


def _disk_name(pid: int | str) -> str:
    return f"ofa-chaos-{pid}"


def _remove_leftovers() -> None:
    """Disks of test processes that were killed; their hosts go when a new cluster is made."""
    for line in Path("/proc/mounts").read_text().splitlines():
        name, place, *_ = line.split()
        pid = name.removeprefix(_disk_name(""))
        if pid != name and not Path("/proc", pid).exists():
            subprocess.run(["umount", "--lazy", place], check=False)


def missing_requirement() -> str | None:
    """Why this machine cannot have such a field, in one line; None where it can."""
    programs = {"cc": "gcc", "nft": "nftables", "mpirun.openmpi": "openmpi-bin"}
    lack = [name for name in programs if not one_host.program_path(name)]
    return f"{lack[0]} is missing (Debian package {programs[lack[0]]})" if lack else hosts.missing_requirement()


def _preload_clock(cluster: hosts.Cluster, work: Path) -> None:
    """What sshd starts gets the clock that jumps too."""
    variables = f"LD_PRELOAD={work / 'clock.so'} OFA_CHAOS_CLOCK={work / 'clocks'}"
    for host in cluster.everything:
        host.power_off()
        with open(host.work / f"sshd_{host.address}", "a") as file:
            file.write(f"SetEnv {variables}\n")
        host.power_on()
    for host in cluster.everything:
        host.wait_until_up()


@dataclass(frozen=True)
class Rank:
    """A rank as it is now, found by its beats."""

    rank: int
    pid: int
    """As this machine numbers it."""
    step: int
    phase: str
    token: str
    """Of the attempt."""
    place: Path
    """Where it beats."""


class Watch:
    """Finds the ranks of hosts again and again: steps are short, and a look at all processes takes long."""

    def __init__(self) -> None:
        self._found: dict[str, list[Rank]] = {}

    def ranks(self, host: one_host.Host) -> list[Rank]:
        """Those that live on the host; none where it is off."""
        before = self._found.get(host.name, [])
        now = [replace(one, step=new.step, phase=new.phase) for one in before if (new := _beat_of(one))]
        self._found[host.name] = now if now and len(now) == len(before) else _ranks_of(host)
        return self._found[host.name]


def _beat_of(one: Rank) -> beat.Beat | None:
    """None where the rank is gone."""
    return beat.read(one.place).get(one.rank) if is_alive(one.pid) else None


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _ranks_of(host: one_host.Host) -> list[Rank]:
    try:
        processes = [process for process in host.processes() if process.alive]
        root = Path(f"/proc/{host.first_pid}/root")
    except (RuntimeError, IndexError):
        return []
    by_number = {process.host_pid: process for process in processes}
    places: dict[Path, str] = {}
    for process in processes:
        variables = environment_of(process.pid)
        if beat.DIRECTORY in variables:
            place = root / variables[beat.DIRECTORY].lstrip("/")
            places[place] = variables.get("OFA_ATTEMPT", "").partition(".")[0]
    found = []
    for place, token in places.items():
        for one in beat.read(place).values():
            if process := by_number.get(one.pid):
                found.append(Rank(one.rank, process.pid, one.step, one.phase, token, place))
    return found


def environment_of(pid: int) -> dict[str, str]:
    """What the process was started with; empty where it is gone."""
    with suppress(OSError):
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(entry.partition("=")[::2] for entry in content.split("\0") if "=" in entry)
    return {}


def write_orders(folder: Path, **orders: object) -> Path:
    """The file for OFA_CHAOS."""
    content = {"raise": [], "nan": [], "stand_in": None, "seen": str(folder / "seen"), **orders}
    path = folder / "orders.json"
    path.write_text(json.dumps(content))
    return path


def interpreter() -> str:
    return os.path.abspath(sys.executable)

"""Hosts on one machine: namespaces with their own address, name, processes, shared memory and a real sshd, on a bridge.

To everything above the kernel they are machines of their own: ssh, pdsh, DeepSpeed's launcher, MPI, Slurm and gloo see
several addresses, `ps` and a kill by pattern see one host's processes, and the end of a host's first process is a power
cut. What is done to them (links cut, packets lost, disks filled) is in faults.py.

The bridge has no address and nothing leads out of it: any number of clusters, of any number of test processes, use the
same addresses at once. Hosts end with the thread that made them, `kill -9` included; names and links that are left then
are removed by the next cluster that anybody makes.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from one_host import Host, Running, program_path

SUBNET = "10.77.0"
ROOT = Path(__file__).parents[2]
LOGIN = 200
"""Last number of the login host's address; it is no part of hostfiles."""

_clusters = itertools.count()


def missing_requirement() -> str | None:
    """Why this machine cannot have such hosts, in one line; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    packages = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
    for program, package in packages.items():
        if not program_path(program):
            return f"{program} is missing (Debian package {package})"
    probe = f"ofaprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this container may not make network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@dataclass(frozen=True)
class Cluster:
    hosts: list[Host]
    """In rank order."""
    login: Host
    """Where users start jobs and a scheduler lives; no rank runs there."""
    bridge: str
    tools: Path
    """Directory with an `ssh` that knows the keys; belongs first in PATH."""

    @property
    def names(self) -> list[str]:
        """Network namespaces, in rank order."""
        return [host.namespace for host in self.hosts]

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self.hosts]

    @property
    def everything(self) -> list[Host]:
        return [*self.hosts, self.login]

    def first(self, num_hosts: int) -> Cluster:
        """The same cluster, of which only so many hosts are looked at."""
        return Cluster(self.hosts[:num_hosts], self.login, self.bridge, self.tools)

    def hostfile(self, path: Path, *, slots: int = 1) -> Path:
        """Writes one for all hosts, by name."""
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        return path

    def run(
        self, command: list[str], *, host: int | Host = 0, timeout: float, cwd: Path | None = None, **options
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on one host, all output in `stdout`; killed with its process group after `timeout` seconds."""
        process = subprocess.Popen(
            self._host(host).entered(command, cwd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{command} ran longer than {timeout} s; its output so far:\n{output}") from None
        return subprocess.CompletedProcess(command, process.returncode, output, "")

    def start(
        self, command: list[str], *, host: int | Host = 0, log: Path, cwd: Path | None = None, **options
    ) -> Running:
        """Run a command on one host in the background, all output in the file `log`."""
        with open(log, "wb") as out:
            process = subprocess.Popen(
                self._host(host).entered(command, cwd),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_as_at_a_terminal,
                **options,
            )
        return Running(process, log)

    def _host(self, host: int | Host) -> Host:
        return host if isinstance(host, Host) else self.hosts[host]

    def wait_until_nothing_is_left(self, within_s: float = 10) -> None:
        for host in self.everything:
            host.wait_until_nothing_is_left(within_s)


def _as_at_a_terminal() -> None:
    """What a shell without a terminal starts in the background ignores Ctrl-C, and so would all of these tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def cluster(num_hosts: int, work: Path) -> Iterator[Cluster]:
    """`num_hosts` hosts h1, h2, ... at 10.77.0.1, 10.77.0.2, ... and a login host, gone again whatever happens."""
    if not 0 < num_hosts < LOGIN:
        raise ValueError(f"{num_hosts} hosts: want 1 to {LOGIN - 1}")
    remove_leftovers()
    # A link's name has 15 characters at most.
    tag = f"{os.getpid()}{'abcdefghijklmnopqrstuvwxyz'[next(_clusters) % 26]}"
    numbers = [*range(1, num_hosts + 1), LOGIN]
    names = [f"h{number}" for number in numbers[:-1]] + ["login"]
    hosts = [
        Host(name, f"{SUBNET}.{number}", f"ofa{tag}{number}", work) for number, name in zip(numbers, names, strict=True)
    ]
    bridge = f"ofb{tag}"
    with ExitStack() as stack:
        stack.callback(_remove, [host.namespace for host in hosts], [bridge])
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for number, host in zip(numbers, hosts, strict=True):
            _connect(host, bridge, f"ofv{tag}{number}", f"ofw{tag}{number}")
        tools = _write_ssh_files(work, hosts)
        for host in hosts:
            stack.callback(host.power_off)
            host.power_on()
        for host in hosts:
            host.wait_until_up()
        yield Cluster(hosts[:-1], hosts[-1], bridge, tools)


def _connect(host: Host, bridge: str, outer: str, inner: str) -> None:
    _ip("netns", "add", host.namespace)
    _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", host.namespace)
    _ip("link", "set", outer, "master", bridge, "up")
    for command in (
        ("link", "set", inner, "name", "eth0"),
        ("addr", "add", f"{host.address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("link", "set", "lo", "up"),
    ):
        _ip("-n", host.namespace, *command)


def remove_leftovers() -> None:
    """Namespaces and bridges of processes that are no more."""
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    links = subprocess.run(["ip", "-o", "link", "show"], capture_output=True, text=True).stdout

    def gone(found: list[tuple[str, str]]) -> list[str]:
        return [name for name, pid in found if not Path("/proc", pid).exists()]

    _remove(
        gone(re.findall(r"^(ofa([0-9]+)[a-z][0-9]+)\b", namespaces, re.M)),
        gone(re.findall(r"\b(of[bv]([0-9]+)[a-z][0-9]*)[:@]", links)),
    )


def _remove(namespaces: list[str], links: list[str]) -> None:
    """What is not there, or goes meanwhile, is no error: the caller's own end is what counts."""
    for namespace in namespaces:
        pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
        for pid in map(int, pids):  # only what was started there is found there
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # The link goes first: with its namespace it would stay until the last process in there is reaped.
        subprocess.run(["ip", "-n", namespace, "link", "delete", "eth0"], capture_output=True)
        subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
    for link in links:
        subprocess.run(["ip", "link", "delete", link], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _write_ssh_files(work: Path, hosts: list[Host]) -> Path:
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation wants it
    tools = work / "tools"
    tools.mkdir(parents=True)
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / key)], check=True)
    for host in hosts:
        (work / f"sshd_{host.address}").write_text(
            f"ListenAddress {host.address}:22\nHostKey {work}/host_key\nAuthorizedKeysFile {work}/user_key.pub\n"
            f"PidFile {work}/sshd_{host.address}.pid\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nMaxStartups 200\n"
        )
    places = "".join(f"{host.address} {host.name}\n" for host in hosts)
    (work / "etc_hosts").write_text(f"127.0.0.1 localhost\n{places}")
    (work / "ssh_config").write_text(
        f"Host {SUBNET}.* {' '.join(host.name for host in hosts)}\n"
        f"  IdentityFile {work}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile /dev/null\n"
        "  StrictHostKeyChecking no\n  LogLevel ERROR\n  BatchMode yes\n"
    )
    wrapper = tools / "ssh"  # DeepSpeed's launcher asks the first host for its address through plain `ssh`
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {work}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    return tools


def free_port() -> int:
    """A TCP port that nothing on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_env() -> dict[str, str]:
    """What a user has: no test's own variables but the code, one thread a rank, the CPU."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def launch_env(cluster: Cluster) -> dict[str, str]:
    """What launchers/pretrain.sh needs on a host of `cluster`."""
    env = run_env()
    tools = {"PATH": f"{cluster.tools}:{env['PATH']}", "PYTHON": sys.executable}
    return {**env, **tools, "GLOO_SOCKET_IFNAME": "eth0", "MASTER_PORT": str(free_port())}

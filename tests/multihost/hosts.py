"""Hosts on one machine: network namespaces with their own address and a real sshd, on one bridge.

To everything above the kernel they are machines of their own: ssh, pdsh, DeepSpeed's launcher and gloo see
two addresses.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.77.0"
ROOT = Path(__file__).parents[2]

_clusters = itertools.count()


def missing_requirement() -> str | None:
    """Why this machine cannot have such hosts, in one line; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    packages = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
    for program, package in packages.items():
        if not shutil.which(program) and not Path("/usr/sbin", program).is_file():
            return f"{program} is missing (Debian package {package})"
    probe = f"ofaprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this container may not make network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@dataclass(frozen=True)
class Cluster:
    names: list[str]
    """Network namespaces, in rank order."""
    bridge: str
    addresses: list[str]
    tools: Path
    """Directory with an `ssh` that knows the keys; belongs first in PATH."""

    def run(self, command: list[str], *, host: int = 0, timeout: float, **options) -> subprocess.CompletedProcess[str]:
        """Run a command on one host, all output in `stdout`; killed with its process group after `timeout` seconds."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
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


@contextmanager
def cluster(num_hosts: int, work: Path) -> Iterator[Cluster]:
    """`num_hosts` hosts at 10.77.0.1, 10.77.0.2, ...; everything is gone again afterwards, whatever happened."""
    tag = f"{os.getpid() % 100000}{'abcdefghij'[next(_clusters) % 10]}"  # a link's name has 15 characters at most
    bridge = f"ofabr{tag}"
    names = [f"ofa{tag}{i + 1}" for i in range(num_hosts)]
    addresses = [f"{SUBNET}.{i + 1}" for i in range(num_hosts)]
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "delete", bridge)
        _ip("link", "set", bridge, "up")
        for i, (name, address) in enumerate(zip(names, addresses, strict=True)):
            _ip("netns", "add", name)
            stack.callback(_delete_namespace, name)
            outer, inner = f"ofav{tag}{i}", f"ofaw{tag}{i}"
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            stack.callback(_ip, "link", "delete", outer)  # by itself it outlives its namespace for a while
            _ip("link", "set", outer, "master", bridge, "up")
            _ip("link", "set", inner, "netns", name)
            for command in (
                ("link", "set", inner, "name", "eth0"),
                ("addr", "add", f"{address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                _ip("-n", name, *command)
        tools = _write_ssh_files(work, addresses)
        for name, address in zip(names, addresses, strict=True):
            stack.callback(_stop, _start_sshd(name, address, work))
        yield Cluster(names, bridge, addresses, tools)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _delete_namespace(name: str) -> None:
    """Deletes it after ending what still runs inside: only what was started there is found there."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for pid in map(int, pids):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    _ip("netns", "delete", name)


def _write_ssh_files(work: Path, addresses: list[str]) -> Path:
    tools = work / "tools"
    tools.mkdir(parents=True)
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / key)], check=True)
    for address in addresses:
        (work / f"sshd_{address}").write_text(
            f"ListenAddress {address}:22\nHostKey {work}/host_key\nAuthorizedKeysFile {work}/user_key.pub\n"
            f"PidFile {work}/sshd_{address}.pid\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\n"
        )
    (work / "ssh_config").write_text(
        f"Host {SUBNET}.*\n  IdentityFile {work}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile /dev/null\n"
        "  StrictHostKeyChecking no\n  LogLevel ERROR\n  BatchMode yes\n"
    )
    wrapper = tools / "ssh"  # DeepSpeed's launcher asks the first host for its address through plain `ssh`
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {work}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    return tools


def _start_sshd(name: str, address: str, work: Path) -> subprocess.Popen[bytes]:
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation wants it
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    with open(work / f"sshd_{address}.log", "wb") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, sshd, "-D", "-e", "-f", str(work / f"sshd_{address}")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    probe = ["ip", "netns", "exec", name, "ssh-keyscan", "-T", "1", address]
    deadline = time.monotonic() + 10
    while subprocess.run(probe, capture_output=True).returncode or process.poll() is not None:
        if process.poll() is not None or time.monotonic() > deadline:
            _stop(process)
            raise RuntimeError(f"sshd on {address} did not come up: {(work / f'sshd_{address}.log').read_text()}")
        time.sleep(0.1)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(timeout=10)


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

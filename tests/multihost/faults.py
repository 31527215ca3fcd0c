"""What happens to hosts: links cut, power lost, packets dropped, slow links, small disks. See hosts.py.

Each is undone where its `with` ends; `heal` brings a cluster back whatever was done to it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import hosts

_TABLE = "ofa_faults"


def _on_network(host: hosts.Host, *command: str, given: str | None = None, check: bool = True) -> None:
    done = subprocess.run(
        ["ip", "netns", "exec", host.namespace, *command], input=given, capture_output=True, text=True
    )
    if check and done.returncode:
        raise RuntimeError(f"{host.name}: {' '.join(command)}: {done.stderr.strip()}")


def link_down(host: hosts.Host) -> None:
    """Nothing comes in or goes out, and nobody is told."""
    _on_network(host, "ip", "link", "set", "eth0", "down")


def link_up(host: hosts.Host) -> None:
    _on_network(host, "ip", "link", "set", "eth0", "up")


def power_cut(host: hosts.Host) -> None:
    """The host is gone. The link first: else the kernel, which all hosts share, would say goodbye for its processes."""
    link_down(host)
    host.power_off()


def power_back(host: hosts.Host) -> None:
    """The host starts anew, with its address and an empty /dev/shm."""
    link_up(host)
    host.power_on()
    host.wait_until_up()


@contextmanager
def cut(host: hosts.Host) -> Iterator[None]:
    link_down(host)
    try:
        yield
    finally:
        link_up(host)


@contextmanager
def packet_loss(host: hosts.Host, percent: int) -> Iterator[None]:
    """So many of a hundred packets that reach the host are dropped."""
    _nft(host, f"type filter hook input priority 0; iif eth0 numgen random mod 100 < {percent} counter drop")
    try:
        yield
    finally:
        _on_network(host, "nft", "delete", "table", "inet", _TABLE, check=False)


@contextmanager
def closed_port(host: hosts.Host, port: int) -> Iterator[None]:
    """What comes to one TCP port of the host is dropped, as by a firewall."""
    _nft(host, f"type filter hook input priority 0; iif eth0 tcp dport {port} counter drop")
    try:
        yield
    finally:
        _on_network(host, "nft", "delete", "table", "inet", _TABLE, check=False)


@contextmanager
def unreachable_from(host: hosts.Host, others: list[hosts.Host]) -> Iterator[None]:
    """Nothing that `others` send reaches the host, as through a switch that fails; the rest of the world does."""
    addresses = ", ".join(other.address for other in others)
    _nft(host, f"type filter hook input priority 0; iif eth0 ip saddr {{ {addresses} }} counter drop")
    try:
        yield
    finally:
        _on_network(host, "nft", "delete", "table", "inet", _TABLE, check=False)


def _nft(host: hosts.Host, chain: str) -> None:
    """Replaces what was there, in one transaction."""
    text = f"add table inet {_TABLE}\ndelete table inet {_TABLE}\ntable inet {_TABLE} {{\nchain c {{\n{chain}\n}}\n}}\n"
    _on_network(host, "nft", "-f", "-", given=text)


@contextmanager
def slow_link(host: hosts.Host, rate: str = "60mbit") -> Iterator[None]:
    """What the host sends goes out at `rate` at most."""
    _on_network(host, *f"tc qdisc replace dev eth0 root tbf rate {rate} burst 64k latency 400ms".split())
    try:
        yield
    finally:
        _on_network(host, *"tc qdisc delete dev eth0 root".split(), check=False)


@contextmanager
def small_disk(host: hosts.Host, path: Path, size_KiB: int) -> Iterator[None]:
    """At `path` this host sees an empty disk of that size instead of what all see. End what uses it first."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_KiB}k", "tmpfs", str(path)]
    subprocess.run(host.entered(mount, "/"), check=True)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # off: the disk went with it
            subprocess.run(host.entered(["umount", "--lazy", str(path)], "/"), check=True)


def heal(cluster: hosts.Cluster) -> None:
    """Every host is on, its link is up and whole, and nothing is left that a test started there."""
    for host in cluster.everything:
        link_up(host)
        _on_network(host, "nft", "delete", "table", "inet", _TABLE, check=False)
        _on_network(host, *"tc qdisc delete dev eth0 root".split(), check=False)
        try:
            host.clean()
        except RuntimeError:  # off
            host.power_on()
            host.wait_until_up()

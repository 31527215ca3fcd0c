"""Hosts for tests of preflight: what a probe found on healthy ones, from the fixtures of tools' output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.preflight.seen import PASS, Fleet, Seen, Verdict

FIXTURES = Path(__file__).parents[1] / "fixtures" / "preflight"
GiB = 1 << 30


def fixture(name: str) -> str:
    return (FIXTURES / name).read_text()


def cpu_facts(number: int) -> dict[str, Any]:
    space = {"path": "/data", "free": 900 * GiB, "all": 1000 * GiB, "inodes_free": 10**8, "inodes_all": 10**9}
    return {
        "identity": ["one boot", number],
        "python": {"version": "3.11.7", "executable": "/env/bin/python", "wanted": "/env/bin/python"},
        "packages": {"torch": "2.6.0", "deepspeed": "0.17.0"},
        "cuda": None,
        "nccl": None,
        "driver": None,
        "code": "0123456789abcdef",
        "space": {"run": dict(space), "tmp": {**space, "path": "/tmp"}},
        "shm": {"path": "/dev/shm", "free": 500 * GiB, "all": 500 * GiB, "inodes_free": 1, "inodes_all": 1},
        "memory": {"all": 1000 * GiB, "free": 950 * GiB},
        "limits": {"memlock": -1, "nofile": 1 << 20},
        "cpus": {"usable": 96, "all": 96, "load": 0.5},
        "network": {"address": f"10.0.0.{number}", "interface": "eth0", "mtu": 1500, "from": "10.0.0.1"},
        "gpus": None,
        "kernel_log": [],
        "infiniband": None,
        "pci_nodes": {},
        "modules": [],
        "texts": {"ibstat": None, "ibv_devinfo": None, "lspci": None},
    }


def gpu_facts(number: int) -> dict[str, Any]:
    """8 x A100 with 8 HDR ports."""
    port = {
        "port": 1, "driver": "mlx5_core", "state": "4: ACTIVE", "physical": "5: LinkUp", "rate": "200 Gb/sec (4X HDR)",
        "link_layer": "InfiniBand", "link_downed": 0, "gids": [[0, "fe80::1", "IB/RoCE v1"]], "netdev_mtu": 2044,
    }  # fmt: skip
    return {
        **cpu_facts(number),
        "cuda": "12.4",
        "nccl": "2.21.5",
        "driver": "470.161.03",
        "gpus": {"xml": fixture("nvidia-smi-a100-healthy.xml"), "nvlink": fixture("nvlink-healthy.txt")},
        "infiniband": [{**port, "device": f"mlx5_{i}", "node": i // 4} for i in range(8)],
        "pci_nodes": {f"0000:{7 + i:02x}:00.0": i // 4 for i in range(8)},
        "modules": ["nvidia_peermem"],
        "texts": {
            "ibstat": fixture("ibstat-healthy.txt"),
            "ibv_devinfo": fixture("ibv_devinfo-healthy.txt"),
            "lspci": fixture("lspci-acs-off.txt"),
        },
    }


def seen(number: int, facts: dict[str, Any], slots: int = 8) -> Seen:
    fine = Verdict(PASS, "measured")
    return Seen(
        Host(f"h{number}", slots), login_s=0.5, facts=copy.deepcopy(facts), clock=(0.001, 0.0005),
        shared={"h1": "", "h2": ""}, write_speed=1e9, port=0.001, exchange=fine, host_all_reduce=fine, all_reduce=fine,
    )  # fmt: skip


def fleet(facts: Callable[[int], dict[str, Any]], num_hosts: int = 5) -> Fleet:
    return Fleet([seen(number, facts(number)) for number in range(1, num_hosts + 1)], "10.0.0.1 port 29500")

"""The table of checks: what each is about, how it judges, what to do where it does not pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ofa_ds.cluster.preflight import checks_fabric as fabric
from ofa_ds.cluster.preflight import checks_host as host
from ofa_ds.cluster.preflight.seen import FAIL, Fleet, Seen, Verdict


@dataclass(frozen=True)
class Check:
    name: str
    what: str
    judge: Callable[[Seen, Fleet], Verdict]
    """Over facts alone: the same facts, the same verdict."""
    way_out: str


CHECKS = (
    Check("ssh", "login by key", host.ssh, "ssh -o BatchMode=yes HOST true; start sshd, add the key"),
    Check(
        "shell", "a silent login shell", host.shell, "let ~/.bashrc print only where [ -t 1 ] holds: others break on it"
    ),
    Check("identity", "one machine, one line", host.identity, "keep one of its names in the hostfile"),
    Check("python", "the same interpreter", host.python, "install the same environment at the same path on every host"),
    Check("torch", "the same torch", host.torch, "bash launchers/setup_env.sh there, or share the environment"),
    Check(
        "deepspeed", "the same DeepSpeed", host.deepspeed, "bash launchers/setup_env.sh there, or share the environment"
    ),
    Check("cuda", "the same CUDA in torch", host.cuda, "install the same wheel of torch on every host"),
    Check("nccl", "the same NCCL", host.nccl, "install the same wheel of NCCL on every host: different ones hang"),
    Check("driver", "the same NVIDIA driver", host.driver, "bring every host to one driver, then reboot it"),
    Check("code", "the same code", host.code, "share the checkout, or: git checkout the same commit there"),
    Check("clock", "clocks agree", host.clock, "start chronyd or systemd-timesyncd there"),
    Check(
        "shared",
        "the run's directory is shared",
        host.shared,
        "mount the shared file system there, or give --directory",
    ),
    Check("write_speed", "speed of writing there", host.write_speed, "look at the mount, its quota and its network"),
    Check("disk", "free disk", host.disk, "free space, or put run_dir and TMPDIR elsewhere"),
    Check("inodes", "free inodes", host.inodes, "delete many small files there"),
    Check("memory", "free memory", host.memory, "end what else runs there; look for a lost memory module"),
    Check("shm", "shared memory", host.shm, "mount -o remount,size=50% /dev/shm; docker: --shm-size or --ipc=host"),
    Check("memlock", "memory that may be locked", host.memlock, "ulimit -l unlimited: limits.conf, and sshd restarted"),
    Check("nofile", "files that may be open", host.nofile, "ulimit -n 65536: limits.conf, and sshd restarted"),
    Check("cpus", "cores for the ranks", host.cpus, "end what else runs there; look at cgroup and taskset"),
    Check(
        "network_mtu",
        "the same MTU on the network",
        host.network_mtu,
        "ip link set DEVICE mtu N, the same on every host",
    ),
    Check("port", "rank 0 is reached", host.port, "open the port in the firewall, or set MASTER_PORT to a free one"),
    Check(
        "gpu_count",
        "GPUs for the slots",
        fabric.gpu_count,
        "set slots to the GPUs there; nvidia-smi -L; reboot or repair",
    ),
    Check("ecc", "memory of the GPUs", fabric.ecc, "nvidia-smi --gpu-reset, or drain the host and replace the GPU"),
    Check(
        "xid", "faults in the kernel's log", fabric.xid, "look up the XID; drain the host, reset the GPU or replace it"
    ),
    Check("throttle", "clocks of the GPUs", fabric.throttle, "look at cooling and power: nvidia-smi -q -d PERFORMANCE"),
    Check("nvlink", "links between the GPUs", fabric.nvlink, "restart nvidia-fabricmanager; reset or reseat the GPU"),
    Check("mig", "whole GPUs", fabric.mig, "nvidia-smi -mig 0, then reset the GPU"),
    Check("hca", "RDMA ports are up", fabric.hca, "look at cable, switch port and subnet manager: ibstat"),
    Check("hca_rate", "rate of the RDMA ports", fabric.hca_rate, "reseat or replace the cable: a lane is lost"),
    Check(
        "gid", "addresses of the RDMA ports", fabric.gid, "give the port an IP address; show_gids; NCCL_IB_GID_INDEX"
    ),
    Check("mtu", "MTU of the RDMA ports", fabric.mtu, "set 4096 at the subnet manager, or the netdev's MTU to 9000"),
    Check("peermem", "NICs read GPU memory", fabric.peermem, "modprobe nvidia_peermem, and at each boot"),
    Check(
        "acs", "peers talk directly", fabric.acs, "switch ACS off in the firmware, or: setpci -s BRIDGE ECAP_ACS+6.w=0"
    ),
    Check(
        "numa", "GPU and NIC on one socket", fabric.numa, "look at nvidia-smi topo -m; NCCL_IB_HCA names the near NICs"
    ),
    Check("exchange", "speed between hosts", fabric.exchange, "look at that host's link: ethtool, ibstat, perftest"),
    Check(
        "host_all_reduce",
        "all-reduce in the host",
        fabric.host_all_reduce,
        "look at nvlink and throttle; reset the GPUs",
    ),
    Check("all_reduce", "all-reduce over all hosts", fabric.all_reduce, "look at exchange, hca, acs; NCCL_DEBUG=INFO"),
)


def judge(seen: Seen, fleet: Fleet) -> list[tuple[Check, Verdict]]:
    """All verdicts over one host; of one that does not answer, that alone."""
    if seen.problem:
        return [(CHECKS[0], CHECKS[0].judge(seen, fleet))]
    verdicts = []
    for check in CHECKS:
        try:
            verdicts.append((check, check.judge(seen, fleet)))
        except (KeyError, TypeError, AttributeError) as error:  # an answer of a form that nobody foresaw
            verdicts.append((check, Verdict(FAIL, f"its answer is not understood: {type(error).__name__} {error}")))
    return verdicts

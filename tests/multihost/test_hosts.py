"""The hosts that the other tests of this folder use are hosts: what is done to one is seen as on real ones."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import hosts
import pytest

pytestmark = pytest.mark.long


def shell(cluster: hosts.Cluster, command: str, host: int = 0, timeout: float = 30) -> str:
    done = cluster.run(["sh", "-c", command], host=host, timeout=timeout, env=hosts.launch_env(cluster))
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def test_each_host_has_its_own_name_processes_and_shared_memory(healed: hosts.Cluster) -> None:
    for i, host in enumerate(healed.hosts):
        assert shell(healed, "hostname; hostname -I", i).split() == [f"h{i + 1}", host.address]
        shell(healed, f"echo {i} >/dev/shm/mine", i)
    assert [host.shared_memory() for host in healed.hosts] == [["mine"]] * 3
    assert [shell(healed, "cat /dev/shm/mine; rm /dev/shm/mine", i) for i in range(3)] == ["0", "1", "2"]
    sleeper = healed.start(["sleep", "4321"], host=1, log=healed.tools / "sleeper.log")
    while not healed.hosts[1].find("4321"):
        time.sleep(0.01)
    assert "4321" not in shell(healed, "ps -e -o args | grep '[s]leep' || true", 2)
    assert [len(host.left()) for host in healed.hosts] == [0, 1, 0]
    with pytest.raises(AssertionError, match="left on h2 .*4321"):
        healed.hosts[1].wait_until_nothing_is_left(within_s=0.1)
    sleeper.send(signal.SIGTERM)
    assert sleeper.wait(10) == -signal.SIGTERM
    healed.wait_until_nothing_is_left()


def test_hosts_reach_one_another_by_name_and_address(three_hosts: hosts.Cluster) -> None:
    for place in ("h2", three_hosts.addresses[1]):
        assert shell(three_hosts, f"ssh {place} hostname") == "h2"
    command = ["ssh", "h3", "hostname"]
    done = three_hosts.run(command, host=three_hosts.login, timeout=30, env=hosts.launch_env(three_hosts))
    assert (done.returncode, done.stdout) == (0, "h3\n")


def test_a_power_cut_is_silent_and_the_host_comes_back(healed: hosts.Cluster, tmp_path: Path) -> None:
    env = hosts.launch_env(healed)
    remote = healed.start(["ssh", "h2", "sleep", "600"], log=tmp_path / "log", env=env)
    while not healed.hosts[1].find("sleep", "600"):
        time.sleep(0.05)
    faults.power_cut(healed.hosts[1])
    time.sleep(1)
    assert remote.process.poll() is None  # a real host says no goodbye
    with pytest.raises(RuntimeError, match="h2 is off"):
        healed.hosts[1].left()
    faults.power_back(healed.hosts[1])
    assert shell(healed, "ssh h2 hostname") == "h2"


@pytest.mark.skipif(hosts.program_path("nft") is None, reason="nft is missing (Debian package nftables)")
def test_links_lose_packets_slow_down_and_are_cut(healed: hosts.Cluster) -> None:
    receive = ("import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('10.77.0.2', 9)); s.settimeout(30)\n"
               "n = 0\ntry:\n  while s.recv(9): n += 1; s.settimeout(1)\nexcept TimeoutError: print(n)")  # fmt: skip
    send = ("import socket; s = socket.socket(type=socket.SOCK_DGRAM)\n"
            "import time\nfor _ in range(500): time.sleep(0.001); s.sendto(b'x', ('10.77.0.2', 9))")  # fmt: skip

    def arrived() -> int:
        with ThreadPoolExecutor() as pool:
            listening = pool.submit(healed.run, [sys.executable, "-c", receive], host=1, timeout=60)
            while not udp_is_open(healed.hosts[1]):
                time.sleep(0.02)
            healed.run([sys.executable, "-c", send], timeout=60)
            return int(listening.result().stdout)

    assert arrived() > 480
    with faults.packet_loss(healed.hosts[1], 20):
        assert 350 < arrived() < 450
    with faults.slow_link(healed.hosts[1], "16mbit"):
        started = time.monotonic()
        shell(healed, "ssh h2 head -c 3000000 /dev/zero | wc -c", timeout=60)
        assert time.monotonic() - started > 1
    with faults.cut(healed.hosts[1]):
        assert healed.run(["ssh-keyscan", "-T", "1", "10.77.0.2"], timeout=30).stdout == ""
    with faults.closed_port(healed.hosts[1], 22):
        assert healed.run(["ssh-keyscan", "-T", "1", "10.77.0.2"], timeout=30).stdout == ""
    assert shell(healed, "ssh h2 hostname") == "h2"


def udp_is_open(host: hosts.Host) -> bool:
    return ":0009 " in Path(f"/proc/{host.first_pid}/net/udp").read_text()


def test_a_small_disk_is_full_on_one_host_only(healed: hosts.Cluster, tmp_path: Path) -> None:
    (tmp_path / "seen").write_text("by all")
    write = f"head -c 2000000 /dev/zero >{tmp_path}/file"
    with faults.small_disk(healed.hosts[1], tmp_path, 1024):
        done = healed.run(["sh", "-c", write], host=1, timeout=30)
        assert os.strerror(errno.ENOSPC) in done.stdout
        shell(healed, write)
    assert shell(healed, f"cat {tmp_path}/seen", 1) == "by all"


OWNER = """
import os, signal, sys
from pathlib import Path
import hosts
with hosts.cluster(1, Path(sys.argv[1])) as cluster:
    print(cluster.names[0], cluster.hosts[0].first_pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_hosts_whose_owner_was_killed(tmp_path: Path, three_hosts: hosts.Cluster) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    made = subprocess.run([sys.executable, "-c", OWNER, tmp_path], env=env, stdout=subprocess.PIPE, text=True).stdout
    namespace, pid = made.split()
    deadline = time.monotonic() + 10
    while Path("/proc", pid).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hosts.remove_leftovers()
    tag = namespace.removeprefix("ofa").rstrip("0123456789")
    assert tag not in subprocess.check_output(["ip", "netns", "list"], text=True)
    assert tag not in subprocess.check_output(["ip", "-brief", "link"], text=True)
    assert shell(three_hosts, "ssh h2 hostname") == "h2"  # others' hosts are left alone


def test_two_clusters_with_the_same_addresses_do_not_meet(tmp_path: Path, three_hosts: hosts.Cluster) -> None:
    with hosts.cluster(2, tmp_path) as other:
        shell(other, "echo other >/dev/shm/which", 1)
        assert shell(other, "ssh h2 cat /dev/shm/which") == "other"
        assert shell(three_hosts, "ssh h2 ls /dev/shm") == ""


def test_nothing_is_left_of_the_hosts(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hosts.cluster(1, tmp_path) as cluster:
        cluster.start(["setsid", "sleep", "600"], log=tmp_path / "log")
        pid = cluster.hosts[0].first_pid
        1 / 0  # noqa: B018
    assert cluster.names[0] not in subprocess.check_output(["ip", "netns", "list"], text=True)
    assert cluster.bridge not in subprocess.check_output(["ip", "-brief", "link"], text=True)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

"""`ofa-ds preflight` over three hosts: all is well, or one has a fault and is named, with what to do."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import faults
import hosts
import pytest

pytestmark = pytest.mark.long

PREFLIGHT = [sys.executable, "-m", "ofa_ds.cli", "preflight", "--hostfile", "hosts", "--json"]


@pytest.fixture
def desk(tmp_path: Path, healed: hosts.Cluster) -> Path:
    healed.hostfile(tmp_path / "hosts")
    return tmp_path


def run(cluster: hosts.Cluster, desk: Path, *options: str, code: int) -> dict[str, Any]:
    result = cluster.run(
        [*PREFLIGHT, *options], host=cluster.login, timeout=110, cwd=desk, env=hosts.launch_env(cluster)
    )
    assert result.returncode == code, result.stdout[-3000:]
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))


def verdicts(report: dict[str, Any], number: int) -> dict[str, dict[str, str]]:
    return {each["check"]: each for each in report["hosts"][number - 1]["checks"]}


def failing(report: dict[str, Any], number: int) -> set[str]:
    return {name for name, each in verdicts(report, number).items() if each["state"] == "fail"}


def test_healthy_hosts_pass_and_what_they_lack_is_absent(healed: hosts.Cluster, desk: Path) -> None:
    report = run(healed, desk, "--skip-bandwidth", code=0)
    assert report["ok"] and report["bad_hosts"] == [] and len(report["hosts"]) == 3
    for number in (1, 2, 3):
        found = verdicts(report, number)
        assert len(found) >= 25 and failing(report, number) == set()
        absent = {name for name, each in found.items() if each["state"] == "absent"}
        assert {"gpu_count", "ecc", "nvlink", "hca", "gid", "acs", "peermem"} <= absent
        for name in ("ssh", "shell", "identity", "python", "torch", "code", "clock", "shared", "network_mtu", "port"):
            assert found[name]["state"] == "pass", found[name]
        assert report["hosts"][number - 1]["rdma"]["interface"] == "eth0"
    assert sorted(file.name for file in desk.iterdir()) == ["hosts"]


def test_each_fault_is_told_of_its_host_and_the_healthy_hostfile_leaves_them_out(
    healed: hosts.Cluster, desk: Path
) -> None:
    (desk / "hosts").write_text("# three\nh1 slots=1\nh2 slots=1\nh3 slots=1  # spare\n")
    runs = desk / "runs"
    runs.mkdir()
    with faults.small_disk(healed.hosts[1], runs, 1024):
        stopped = time.monotonic()
        healed.hosts[2].power_off()
        options = ["--directory", "runs", "--write-healthy", "healthy", "--timeout", "20"]
        report = run(healed, desk, "--skip-bandwidth", *options, code=1)
    assert time.monotonic() - stopped < 40
    assert report["bad_hosts"] == ["h2", "h3"]
    assert failing(report, 1) == set()
    assert failing(report, 2) == {"shared", "write_speed", "disk"}
    assert "No space left" in verdicts(report, 2)["write_speed"]["text"]
    assert failing(report, 3) == {"ssh"} and len(report["hosts"][2]["checks"]) == 1
    assert (desk / "healthy").read_text() == "# three\nh1 slots=1\n"
    assert list(runs.iterdir()) == []


def test_two_names_of_one_machine_and_a_closed_port_are_told(healed: hosts.Cluster, desk: Path) -> None:
    (desk / "hosts").write_text("h1 slots=1\nh2 slots=1\n10.77.0.2 slots=1\n")
    port = hosts.free_port()
    env = {**hosts.launch_env(healed), "MASTER_PORT": str(port)}
    with faults.closed_port(healed.hosts[0], port):
        command = [*PREFLIGHT, "--skip-bandwidth"]
        result = healed.run(command, host=healed.login, timeout=60, cwd=desk, env=env)
    report = json.loads(result.stdout)
    assert failing(report, 1) == {"port"} and failing(report, 2) == set() and failing(report, 3) == {"identity"}
    assert "same machine as h2" in verdicts(report, 3)["identity"]["text"]
    assert "timed out" in verdicts(report, 3)["port"]["text"]


def test_a_host_with_a_slow_link_is_found_by_halving(healed: hosts.Cluster, desk: Path) -> None:
    with faults.slow_link(healed.hosts[1]):
        report = run(healed, desk, "--write-healthy", "healthy", code=1)
    assert report["bad_hosts"] == ["h2"] and failing(report, 2) == {"exchange"}
    search = report["exchange"]
    assert search["bad"] == ["h2"] and search["rounds"] <= search["most_rounds"] == 3
    for number in (1, 3):
        assert verdicts(report, number)["exchange"]["state"] == "pass"
        assert verdicts(report, number)["all_reduce"]["state"] == "pass"
    assert verdicts(report, 2)["host_all_reduce"]["state"] == "absent"
    assert (desk / "healthy").read_text() == "h1 slots=1\nh3 slots=1\n"


def test_a_host_in_whose_rings_nobody_finishes_is_found_too(healed: hosts.Cluster, desk: Path) -> None:
    with faults.unreachable_from(healed.hosts[2], healed.hosts[:2]):
        report = run(healed, desk, code=1)
    assert report["bad_hosts"] == ["h3"] and failing(report, 3) == {"exchange", "port"}
    assert "not finished" in verdicts(report, 3)["exchange"]["text"]
    assert report["exchange"]["rounds"] <= report["exchange"]["most_rounds"]
    assert verdicts(report, 1)["all_reduce"]["state"] == verdicts(report, 2)["all_reduce"]["state"] == "pass"
    healed.wait_until_nothing_is_left(10)


def test_ctrl_c_ends_every_ssh_and_every_probe(healed: hosts.Cluster, desk: Path) -> None:
    faults.link_down(healed.hosts[1])  # its login takes long
    running = healed.start(PREFLIGHT, host=healed.login, log=desk / "log", cwd=desk, env=hosts.launch_env(healed))
    deadline = time.monotonic() + 30
    while not (healed.hosts[0].find("ofa_ds.cluster.preflight") and healed.hosts[2].find("ofa_ds.cluster.preflight")):
        assert time.monotonic() < deadline, running.output
        time.sleep(0.05)
    running.send(signal.SIGINT)
    assert running.wait(15) == 130, running.output
    assert running.output.strip().splitlines()[-1].startswith("ofa-ds: stopped by Ctrl-C"), running.output
    faults.link_up(healed.hosts[1])
    healed.wait_until_nothing_is_left(10)
    assert not list(desk.glob(".ofa-preflight*"))


def test_of_a_preflight_that_is_killed_in_the_middle_of_an_exchange_nothing_is_left(
    healed: hosts.Cluster, desk: Path
) -> None:
    with faults.unreachable_from(healed.hosts[2], healed.hosts[:2]):  # the first ring hangs
        running = healed.start(PREFLIGHT, host=healed.login, log=desk / "log", cwd=desk, env=hosts.launch_env(healed))
        deadline, sightings = time.monotonic() + 60, 0
        while sightings < 3:  # the probe and, for a while, the rank that it forked
            assert time.monotonic() < deadline and running.process.poll() is None, running.output
            sightings = sightings + 1 if len(healed.hosts[0].find("ofa_ds.cluster.preflight")) > 1 else 0
            time.sleep(0.2)
        running.send(signal.SIGKILL)
        running.wait(10)
        healed.wait_until_nothing_is_left(10)
    assert not list(desk.glob(".ofa-preflight*"))

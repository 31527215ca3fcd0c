"""Checks of preflight: a healthy fleet passes, a fault of one host is told of that host, what all lack is absent."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from preflight_hosts import GiB, cpu_facts, fixture, fleet, gpu_facts

from ofa_ds.cli.main import main
from ofa_ds.cluster.preflight.checks import CHECKS, judge
from ofa_ds.cluster.preflight.healthy import write_healthy
from ofa_ds.cluster.preflight.report import as_json, made, rdma, tell
from ofa_ds.cluster.preflight.seen import ABSENT, FAIL, PASS, WARN, Fleet, Seen, Verdict
from ofa_ds.cluster.rdma import choose_for_all, facts_of_preflight

GPU_CHECKS = {check.name for check in CHECKS if check.name in "gpu_count ecc xid throttle nvlink mig".split()}
FABRIC_CHECKS = set("hca hca_rate gid mtu peermem acs numa".split())


def states(seen: Seen, all_hosts: Fleet) -> dict[str, str]:
    return {check.name: verdict.state for check, verdict in judge(seen, all_hosts)}


def test_there_are_at_least_25_checks_and_each_says_what_to_do() -> None:
    assert len(CHECKS) >= 25 and len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.what and check.way_out and "\n" not in check.way_out for check in CHECKS)


def test_a_healthy_gpu_cluster_passes_every_check() -> None:
    hosts = fleet(gpu_facts)
    for seen in hosts.seen:
        assert set(states(seen, hosts).values()) == {PASS}, judge(seen, hosts)


def test_what_a_cpu_cluster_lacks_is_absent_and_fails_nobody() -> None:
    hosts = fleet(cpu_facts)
    for seen in hosts.seen:
        found = states(seen, hosts)
        assert {name for name, state in found.items() if state == ABSENT} == {
            *GPU_CHECKS, *FABRIC_CHECKS, "cuda", "nccl", "driver",
        }  # fmt: skip
        assert set(found.values()) == {PASS, ABSENT}


def sick(name: str, nvlink: str = "nvlink-healthy.txt") -> dict[str, Any]:
    return {"gpus": {"xml": fixture(name), "nvlink": fixture(nvlink)}}


def ports(**changes: Any) -> dict[str, Any]:
    """The first port differs."""
    listed = gpu_facts(1)["infiniband"]
    return {"infiniband": [{**listed[0], **changes}, *listed[1:]]}


def space(**changes: Any) -> dict[str, Any]:
    healthy = cpu_facts(1)["space"]
    return {"space": {**healthy, "run": {**healthy["run"], **changes}}}


CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    # check, state, words, facts of the second of five hosts
    ("identity", FAIL, "the same machine as h1, which stands before it", {"identity": ["one boot", 1]}),
    ("python", FAIL, "3.10.1; most hosts have 3.11.7", {"python": {"version": "3.10.1", "executable": 1, "wanted": 1}}),
    ("python", FAIL, "no /a", {"python": {"version": "3.11.7", "executable": "/b", "wanted": "/a"}}),
    ("torch", FAIL, "torch 2.5.1; most", {"packages": {"torch": "2.5.1", "deepspeed": "0.17.0"}}),
    ("deepspeed", FAIL, "no deepspeed", {"packages": {"torch": "2.6.0", "deepspeed": None}}),
    ("cuda", FAIL, "CUDA in torch 11.8", {"cuda": "11.8"}),
    ("nccl", FAIL, "NCCL 2.18", {"nccl": "2.18"}),
    ("driver", FAIL, "driver 535", {"driver": "535"}),
    ("code", FAIL, "code ffff", {"code": "ffff"}),
    ("code", FAIL, "checkout is not there", {"code": None}),
    ("disk", FAIL, "512.0 MiB free in /data", space(free=GiB // 2)),
    ("disk", WARN, "10.0 GiB free in /data", space(free=10 * GiB)),
    ("disk", FAIL, "no directory /data", space(missing=True)),
    ("inodes", FAIL, "10 inodes free", space(inodes_free=10)),
    ("inodes", PASS, "/tmp", space(inodes_free=0, inodes_all=0)),
    ("memory", FAIL, "1.0 GiB of", {"memory": {"all": 1000 * GiB, "free": GiB}}),
    ("memory", WARN, "module missing", {"memory": {"all": 500 * GiB, "free": 490 * GiB}}),
    ("shm", FAIL, "63.0 MiB of", {"shm": {"path": "/dev/shm", "free": 63 << 20, "all": 64 << 20}}),
    ("shm", FAIL, "no /dev/shm", {"shm": {"path": "/dev/shm", "missing": True}}),
    ("memlock", FAIL, "8.0 MiB may be locked", {"limits": {"memlock": 8 << 20, "nofile": 1 << 20}}),
    ("nofile", FAIL, "256 files", {"limits": {"memlock": -1, "nofile": 256}}),
    ("nofile", WARN, "1,024 files", {"limits": {"memlock": -1, "nofile": 1024}}),
    ("cpus", WARN, "load 200.0", {"cpus": {"usable": 96, "all": 96, "load": 200.0}}),
    (
        "network_mtu",
        FAIL,
        "MTU 9000; most hosts have 1500",
        {"network": {"mtu": 9000, "address": "", "interface": "e"}},
    ),
    ("gpu_count", FAIL, "2 GPUs for 8 slots", sick("nvidia-smi-h100-sick.xml")),
    ("gpu_count", FAIL, "GPU is lost", sick("nvidia-smi-gpu-lost.txt")),
    ("gpu_count", FAIL, "TimeoutExpired", {"gpus": {"error": "TimeoutExpired: nvidia-smi"}}),
    ("gpu_count", FAIL, "0 GPUs for 8", {"gpus": None}),
    ("ecc", FAIL, "GPU 0 has 2 uncorrected", sick("nvidia-smi-a100-sick.xml")),
    ("ecc", FAIL, "GPU 1 has a row to remap at its next reset; GPU 2 could not", sick("nvidia-smi-a100-sick.xml")),
    ("xid", FAIL, "79 (GPU fell off the bus) at 0000:3b:00", {"kernel_log": fixture("dmesg-xid.txt").splitlines()}),
    ("xid", WARN, "XID 31", {"kernel_log": fixture("dmesg-xid.txt").splitlines()[:1]}),
    ("xid", WARN, "may not read", {"kernel_log": None}),
    ("throttle", FAIL, "GPU 3 is slowed down: hw_slowdown", sick("nvidia-smi-a100-sick.xml")),
    ("nvlink", FAIL, "GPU 3 has 10 of 12 NVLinks up", sick("nvidia-smi-a100-healthy.xml", "nvlink-sick.txt")),
    ("mig", FAIL, "GPU 4 is cut up by MIG", sick("nvidia-smi-a100-sick.xml")),
    ("hca", FAIL, "mlx5_0:1 is DOWN, POLLING", ports(state="1: DOWN", physical="2: Polling")),
    ("hca", FAIL, "mlx5_0:1 is INIT, LINKUP", ports(state="2: INIT", physical="5: LinkUp")),
    ("hca", FAIL, "other hosts have some", {"infiniband": None, "texts": {}}),
    ("hca", WARN, "mlx5_0 12 times", ports(link_downed=12)),
    ("hca", FAIL, "7 ports; most hosts have 8", {"infiniband": gpu_facts(1)["infiniband"][1:]}),
    ("hca_rate", FAIL, "want 200 Gb/s: mlx5_0 100 Gb/s", ports(rate="100 Gb/sec (2X HDR)")),
    ("gid", FAIL, "mlx5_0 has none", ports(gids=[])),
    ("gid", FAIL, "none of RoCE v2", ports(link_layer="Ethernet")),
    ("mtu", WARN, "mlx5_0 1024 of 4096", {"texts": {"ibv_devinfo": fixture("ibv_devinfo-roce-low-mtu.txt")}}),
    ("peermem", FAIL, "not loaded", {"modules": ["gdrdrv"]}),
    ("acs", FAIL, "such as 0000:0a:04.0", {"texts": {"lspci": fixture("lspci-acs-on.txt")}}),
    ("acs", WARN, "root alone", {"texts": {"lspci": fixture("lspci-not-root.txt")}}),
    ("numa", WARN, "NUMA node 2 have no NIC", {"pci_nodes": {"0000:07:00.0": 2}}),
]


@pytest.mark.parametrize("check, state, words, facts", CASES, ids=[f"{each[0]}-{each[2][:24]}" for each in CASES])
def test_a_fault_is_told_of_its_host_alone(check: str, state: str, words: str, facts: dict[str, Any]) -> None:
    hosts = fleet(gpu_facts)
    hosts.seen[1].facts.update(facts)
    verdicts = {each.name: verdict for each, verdict in judge(hosts.seen[1], hosts)}
    assert verdicts[check].state == state and words in verdicts[check].text, verdicts[check]
    for other in hosts.seen[2:]:
        assert set(states(other, hosts).values()) == {PASS}


@pytest.mark.parametrize(
    "check, state, words, changes",
    [
        ("ssh", WARN, "after 30.0 s", {"login_s": 30.0}),
        ("shell", WARN, "'Welcome to h2!'", {"noise": b"Welcome to h2!\nmore"}),
        ("clock", FAIL, "+9.999 s from the median", {"clock": (10.0, 0.5)}),
        ("clock", WARN, "+1.999 s", {"clock": (2.0, 0.5)}),
        ("clock", PASS, "+1.999 s", {"clock": (2.0, 3.0)}),
        ("write_speed", FAIL, "No space left", {"write_speed": "cannot write 16 MiB: OSError: No space left"}),
        ("write_speed", WARN, "95 MiB/s", {"write_speed": 1e8}),
        ("port", FAIL, "refused", {"port": "does not reach it: refused"}),
        ("exchange", FAIL, "slow", {"exchange": Verdict(FAIL, "slow")}),
    ],
)
def test_what_was_tried_is_judged_too(check: str, state: str, words: str, changes: dict[str, Any]) -> None:
    hosts = fleet(cpu_facts)
    for name, value in changes.items():
        setattr(hosts.seen[1], name, value)
    verdicts = {each.name: verdict for each, verdict in judge(hosts.seen[1], hosts)}
    assert verdicts[check].state == state and words in verdicts[check].text, verdicts[check]


def test_a_machine_that_is_named_twice_keeps_its_first_line() -> None:
    hosts = fleet(cpu_facts)
    hosts.seen[3].facts["identity"] = hosts.seen[1].facts["identity"]
    assert [states(seen, hosts)["identity"] for seen in hosts.seen] == [PASS, WARN, PASS, FAIL, PASS]


def test_a_second_host_whose_mount_is_another_one_is_told() -> None:
    hosts = fleet(cpu_facts)
    for seen in hosts.seen:
        seen.shared = {"h1": "", "h2": "does not see it"}
    hosts.seen[1].shared = {"h1": "does not see it", "h2": ""}
    assert [states(seen, hosts)["shared"] for seen in hosts.seen] == [PASS, FAIL, PASS, PASS, PASS]


def test_a_first_host_that_nobody_sees_or_reaches_is_at_fault_itself() -> None:
    hosts = fleet(cpu_facts)
    for seen in hosts.seen[1:]:
        seen.shared = {"h1": "does not see it", "h2": ""}
        seen.port = "timed out"
    hosts.seen[0].shared = {"h1": "", "h2": "does not see it"}
    found = [states(seen, hosts) for seen in hosts.seen]
    assert [each["shared"] for each in found] == [FAIL, PASS, PASS, PASS, PASS]
    assert [each["port"] for each in found] == [FAIL, WARN, WARN, WARN, WARN]
    hosts.seen[0].port = "port 29500 is not free there"
    for seen in hosts.seen[1:]:
        seen.port = None
    assert [states(seen, hosts)["port"] for seen in hosts.seen] == [FAIL, WARN, WARN, WARN, WARN]


def test_a_directory_that_is_not_shared_at_all_fails_all_but_its_writer() -> None:
    hosts = fleet(cpu_facts)
    for seen in hosts.seen:
        seen.shared = {name: "" if name == seen.host.name else "does not see it" for name in ("h1", "h2")}
    assert [states(seen, hosts)["shared"] for seen in hosts.seen] == [PASS, FAIL, FAIL, FAIL, FAIL]


def test_a_host_that_does_not_answer_is_one_line_and_no_example_for_others() -> None:
    hosts = fleet(cpu_facts, 3)
    hosts.seen[0].problem = "Connection refused"
    hosts.seen[0].facts = {}
    assert states(hosts.seen[0], hosts) == {"ssh": FAIL}
    assert FAIL not in states(hosts.seen[1], hosts).values()


def test_an_answer_that_nobody_foresaw_is_a_fault_and_no_traceback() -> None:
    hosts = fleet(gpu_facts)
    hosts.seen[1].facts.update(dict.fromkeys(hosts.seen[1].facts, {"error": "PermissionError: no"}))
    assert FAIL in states(hosts.seen[1], hosts).values()
    hosts.seen[1].facts.update(dict.fromkeys(hosts.seen[1].facts, 7))
    assert FAIL in states(hosts.seen[1], hosts).values()


def test_the_report_for_programs_has_every_verdict_and_the_fabric() -> None:
    hosts = fleet(gpu_facts, 3)
    hosts.seen[2].problem = "gone"
    report = json.loads(json.dumps(as_json(made("hosts", 1.5, hosts, {}))))
    assert report["ok"] is False and report["bad_hosts"] == ["h3"]
    assert [len(host["checks"]) for host in report["hosts"]] == [len(CHECKS), len(CHECKS), 1]
    assert "do" in report["hosts"][2]["checks"][0] and "do" not in report["hosts"][0]["checks"][0]
    first = rdma(hosts.seen[0])
    assert len(first["ports"]) == 8 and first["efa"] is False and first["interface"] == "eth0"
    assert first["ports"][0]["link_layer"] == "InfiniBand" and first["ports"][0]["rate"] == 200


@pytest.mark.parametrize("facts, profile", [(gpu_facts, "infiniband"), (cpu_facts, "tcp")])
def test_a_launch_chooses_its_network_profile_from_the_report(facts: Any, profile: str, tmp_path: Path) -> None:
    hosts = fleet(facts, 2)
    (tmp_path / "preflight.json").write_text(json.dumps(as_json(made("hosts", 1.5, hosts, {}))))
    assert choose_for_all(facts_of_preflight(tmp_path / "preflight.json", ["h1", "h2"]))[0] == profile


@pytest.mark.parametrize(
    "hostfile, port, words", [("h1 slots=x", "1", "hosts:1: "), ("h1 slots=1", "0", "MASTER_PORT '0'")]
)
def test_wrong_input_is_one_line_and_exit_code_2(
    hostfile: str, port: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "hosts").write_text(hostfile)
    monkeypatch.setenv("MASTER_PORT", port)
    assert main(["preflight", "--hostfile", str(tmp_path / "hosts")]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_a_check_elsewhere_and_alike_hosts_together_on_a_terminal() -> None:
    hosts = fleet(cpu_facts, 8)
    for seen in hosts.seen[2:]:
        seen.noise = b"hello"
    plain, terminal = io.StringIO(), Terminal()
    tell(made("hosts", 1.0, hosts, {}), plain)
    tell(made("hosts", 1.0, hosts, {}), terminal)
    lines = plain.getvalue().splitlines()
    assert len(lines) == 8 * len(CHECKS) + 1 and "\033" not in plain.getvalue()
    assert lines[-1] == "preflight: all 8 hosts pass; 1.0 s"
    absent = [line for line in terminal.getvalue().splitlines() if "absent: " in line]
    assert len(absent) == 1 and "h1, h2, h3, h4 and 4 more: absent: cuda, nccl, driver, gpu_count" in absent[0]
    shown = [line for line in terminal.getvalue().splitlines() if "warn shell" in line]
    assert len(shown) == 1 and "h3, h4, h5, h6 and 2 more: warn shell" in shown[0] and "; do: " in shown[0]


def test_the_healthy_hostfile_keeps_comments_spares_and_order(tmp_path: Path) -> None:
    hostfile, destination = tmp_path / "hosts", tmp_path / "healthy"
    hostfile.write_text("# rack 1\nh1 slots=8  # master\nme@h2 slots=8\n\nh3 slots=8 # spare\nh22 slots=4")
    assert write_healthy(hostfile, destination, ["me@h2"]) == 3
    assert destination.read_text() == "# rack 1\nh1 slots=8  # master\n\nh3 slots=8 # spare\nh22 slots=4"
    assert write_healthy(hostfile, hostfile, ["h3", "h1"]) == 2
    assert hostfile.read_text() == "# rack 1\nme@h2 slots=8\n\nh22 slots=4"


def test_no_healthy_hostfile_without_a_host_to_start_on(tmp_path: Path) -> None:
    hostfile, destination = tmp_path / "hosts", tmp_path / "healthy"
    hostfile.write_text("h1 slots=8\nh3 slots=8 # spare\n")
    destination.write_text("old")
    with pytest.raises(RuntimeError, match="no healthy host is left"):
        write_healthy(hostfile, destination, ["h1"])
    assert destination.read_text() == "old"

"""The profile follows from what hosts have; what a host prints is read as it stands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ofa_ds.cluster import environment
from ofa_ds.cluster.rdma import PROBE, PROFILES, Facts, Port, choose, choose_for_all, facts_of_probe


def port(device: str, link_layer: str, rate: int = 200, *, active: bool = True, driver: str = "mlx5_core") -> Port:
    return Port(device, driver, link_layer, rate, active)


EIGHT = tuple(port(f"mlx5_{i}", "InfiniBand") for i in range(8))


@pytest.mark.parametrize(
    ("ports", "name", "why"),
    [
        (EIGHT, "infiniband", "h has 8 active InfiniBand RDMA ports, 1600 Gb/s together"),
        ((*EIGHT, port("mlx5_8", "Ethernet", 50)), "infiniband", "h has 8 active"),
        ((*EIGHT[:1], port("mlx5_bond_0", "Ethernet", 400)), "infiniband", "h has 1 active"),
        (tuple(port(f"mlx5_{i}", "Ethernet", 100) for i in range(4)), "roce", "h has 4 active Ethernet"),
        ((port("rdmap0s6", "Unspecified", 100, driver="efa"),) * 4, "efa", "h has 4 Elastic Fabric Adapters"),
        ((port("mlx5_0", "InfiniBand", active=False),), "tcp", "h has 1 RDMA ports, none of them active and fast"),
        ((port("mlx5_0", "Ethernet", 25),), "tcp", "h has 1 RDMA ports, none of them active and fast"),
        ((), "tcp", "h has no RDMA port"),
    ],
)
def test_the_fastest_fabric_decides(ports: tuple[Port, ...], name: str, why: str) -> None:
    chosen, reason = choose(Facts("h", ports, any(each.driver == "efa" for each in ports)))
    assert chosen == name and reason.startswith(why)
    assert (PROFILES / f"{chosen}.env").is_file()


def test_hosts_that_are_not_alike_are_told_with_both_reasons() -> None:
    with pytest.raises(ValueError, match="a has 8 active InfiniBand.*, b has no RDMA port; leave one kind out"):
        choose_for_all([Facts("a", EIGHT), Facts("b", ())])


def test_what_a_host_prints_becomes_facts() -> None:
    output = (
        "10.0.0.1 fe80::1\n"
        "port mlx5_0 mlx5_core InfiniBand 200 Gb/sec (4X HDR) 4: ACTIVE \n"
        "port mlx5_1 mlx5_core Ethernet 25 Gb/sec (1X EDR) 1: DOWN \n"
        "port rdmap0s6 efa Unspecified 100 Gb/sec (4X EDR) 4: ACTIVE \n"
        "set NCCL_DEBUG\nset NCCL_IB_HCA\n"
    )
    assert facts_of_probe("h", output) == Facts(
        host="h",
        ports=(
            port("mlx5_0", "InfiniBand"),
            port("mlx5_1", "Ethernet", 25, active=False),
            port("rdmap0s6", "Unspecified", 100, driver="efa"),
        ),
        efa=True,
        is_set=frozenset({"NCCL_DEBUG", "NCCL_IB_HCA"}),
    )


def test_the_probe_runs_in_a_plain_shell_and_tells_what_is_set_there(tmp_path: Path) -> None:
    (tmp_path / ".nccl.conf").write_text("NCCL_IB_TC=106\n# NCCL_IB_SL=3\n")
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NCCL_DEBUG": "INFO", "MY_NCCL_X": "1"}
    done = subprocess.run(["sh", "-s"], input=PROBE, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"NCCL_DEBUG", "NCCL_IB_TC"} <= facts_of_probe("h", done.stdout).is_set
    assert not {"NCCL_IB_SL", "MY_NCCL_X"} & facts_of_probe("h", done.stdout).is_set


def test_the_log_has_what_ranks_were_given_and_what_the_host_sets_but_not_the_attempts_token() -> None:
    all_there_is = {b"MY": b"1", b"NCCL_A": b"host's", b"OFA_ATTEMPT": b"secret", b"EDITOR": b"vi", b"PATH": b"/bin"}
    assert environment.of_a_rank(all_there_is, {b"MY"}) == {b"MY": b"1", b"NCCL_A": b"host's", b"PATH": b"/bin"}


def test_the_log_of_the_environment_shows_no_password_and_one_line_a_variable() -> None:
    shown = environment.lines({b"NCCL_A": b"a b\n\xff", b"MLFLOW_TRACKING_PASSWORD": b"x", b"OFA_API_KEY": b"y"})
    assert shown == ["MLFLOW_TRACKING_PASSWORD=(not shown)", "NCCL_A='a b\\n\\udcff'", "OFA_API_KEY=(not shown)"]

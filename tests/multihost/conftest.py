"""Hosts for all tests of this folder, made once; where OFA_CI is set, a test that is skipped has failed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import faults
import hosts
import pytest
import slurm


@pytest.fixture(scope="session")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Cluster]:
    lack = hosts.missing_requirement()
    if lack is not None:
        pytest.skip(f"no hosts on this machine: {lack}")
    with hosts.cluster(3, tmp_path_factory.mktemp("hosts")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def two_hosts(three_hosts: hosts.Cluster) -> hosts.Cluster:
    return three_hosts.first(2)


@pytest.fixture
def healed(three_hosts: hosts.Cluster) -> Iterator[hosts.Cluster]:
    """Three hosts to which anything may be done: afterwards they are whole and empty again."""
    try:
        yield three_hosts
    finally:
        faults.heal(three_hosts)


@pytest.fixture
def slurm_cluster(three_hosts: hosts.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    """Slurm on three hosts, its controller on the login host; new for each test, since others cut the hosts' power."""
    lack = slurm.missing_requirement()
    if lack is not None:
        pytest.skip(f"no Slurm on this machine: {lack}")
    with slurm.started(three_hosts, tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and os.environ.get("OFA_CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped, and OFA_CI is set: {report.longrepr}"
    return report

"""Two hosts for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import hosts
import pytest


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Cluster]:
    lack = hosts.missing_requirement()
    if lack is not None:
        pytest.skip(f"no hosts on this machine: {lack}")
    with hosts.cluster(2, tmp_path_factory.mktemp("hosts")) as cluster:
        yield cluster

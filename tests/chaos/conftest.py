"""One field for all runs of the suite."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import field  # noqa: E402
import pytest  # noqa: E402
from references import References  # noqa: E402


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[field.Field]:
    lack = field.missing_requirement()
    if lack is not None:
        leave = pytest.fail if os.environ.get("OFA_CI") else pytest.skip
        leave(f"no hosts on this machine: {lack}")
    with field.field(3, tmp_path_factory.mktemp("chaos")) as stage:
        yield stage


@pytest.fixture(scope="session")
def references(stage: field.Field) -> References:
    return References(stage)

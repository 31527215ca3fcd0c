from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_cases import JOBS, launch


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[dict[str, Any]]]:
    """results(world size, job): launched once, when first asked for; 2 ranks always before the others."""
    folder: Path = tmp_path_factory.mktemp("engine")
    found: dict[int, dict[str, Any]] = {}

    def get(world_size: int, job: str) -> list[dict[str, Any]]:
        for needed in dict.fromkeys((2, world_size)):
            if needed not in found:
                found[needed] = launch(folder, needed, *JOBS[needed])
        return found[world_size][job]

    return get

"""Every collective of a planned step is one of a real step of real ranks: kind, elements, type, phase, group, count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_cases import launch
from traffic_cases import CASES, RUNS

from ofa_ds.plan.layout import layout_of
from ofa_ds.plan.traffic import collectives

pytestmark = pytest.mark.long

WORKER = Path(__file__).with_name("traffic_worker.py")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """real(ranks): calls of the last step of each case."""
    found: dict[int, dict[str, Any]] = {}

    def get(ranks: int) -> dict[str, Any]:
        if ranks not in found:
            found[ranks] = launch(tmp_path_factory.mktemp("traffic"), ranks, *RUNS[ranks], worker=WORKER)
        return found[ranks]

    return get


@pytest.mark.parametrize("ranks, name", [(ranks, name) for ranks, names in RUNS.items() for name in names])
def test_the_collectives_of_a_step_are_planned_to_the_byte(real, ranks, name):
    case = CASES[name]
    second = case.zero.get("zero_hpz_partition_size", 1)
    hosts, per_host = (ranks // second, second) if second > 1 else (1, ranks)
    layout = layout_of(case.deepspeed, hosts=hosts, ranks_per_host=per_host, on_gpu=False)
    planned = collectives(
        case.config, layout, accumulation=case.accumulation, checkpointing=case.checkpointing, image_groups=2
    )
    wanted = Counter({tuple(call[:-1]): call[-1] for call in real(ranks)[name]})
    found: Counter[tuple[Any, ...]] = Counter()
    for each in planned:
        found[each.kind, each.elements, each.dtype, each.when, second if each.group == "host" else ranks] += each.count
    assert found == wanted
    assert len(found) >= 3
    if second > 1:
        assert any(each.group == "host" for each in planned)

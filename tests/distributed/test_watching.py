"""Three real ranks: steps that are left out leave no trace; silent corruption is found, and the odd rank is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import CORRUPTED, LEFT_OUT, launch

pytestmark = pytest.mark.long

WORKER = Path(__file__).with_name("watch_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("watching"), 3, worker=WORKER)


def case(found: dict[str, Any], job: str, name: str) -> dict[str, Any]:
    return next(each for each in found[job] if each["name"] == name)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_spike_is_skipped_by_all_ranks_and_leaves_no_trace_as_a_step_that_is_passed_over_does(found, name):
    it = case(found, "left out", name)
    assert it["changed"] == []
    for spike, nan in it["said"]:
        assert spike == [True, False, True], "skipped, without a change of fp16's loss scale, as a spike"
        assert nan[0] and not nan[2]
    assert it["passed over"] == [] and it["nan"] == []


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_look_for_corruption_finds_nothing_where_there_is_none_and_changes_nothing(found, name):
    it = case(found, "corruption", name)
    assert it["clean"] == ["", "", ""] and it["changed"] == [] and it["names"] > 0


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_rank_that_computes_other_bits_the_second_time_is_named(found, name):
    text = case(found, "corruption", name)["replay"]
    assert "rank 2 on " in text and "a second time" in text and "rank 0" not in text and "rank 1" not in text


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_rank_that_holds_one_other_bit_is_named_with_the_tensor(found, name):
    text = case(found, "corruption", name)["copy"]
    assert "rank 1 on " in text and "holds other bits than all others in " in text
    assert "rank 0" not in text and "rank 2" not in text and "\n" not in text


@pytest.mark.parametrize("name", [name for name in CORRUPTED if name.endswith("3")])
def test_a_share_that_is_not_its_master_is_named_where_no_other_rank_has_a_copy(found, name):
    text = case(found, "corruption", name)["master"]
    assert "rank 0 on " in text and "unlike its fp32 master" in text and "rank 1" not in text


def test_a_look_every_200_steps_costs_less_than_one_per_cent(found):
    it = found["cost"]
    assert it["check_s"] / 200 < 0.01 * it["step_s"], it

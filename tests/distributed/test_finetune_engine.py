"""Fine-tuning on ranks: its steps are those of one process, and a run starts from weights in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import launch
from finetune_cases import CRITERIA, FORMATS, STAGES, WEIGHTS, WORKER

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("finetune")
    jobs = {1: ("criteria",), 2: ("criteria", "starts")}
    return {ranks: launch(folder, ranks, *names, worker=WORKER) for ranks, names in jobs.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_is_that_of_one_process_whatever_is_dropped_and_however_it_is_cut(results, ranks):
    found = results[ranks]["criteria"]
    cases = [(name, stage) for name in CRITERIA for stage in STAGES[ranks]]
    assert [(each["name"], each["stage"]) for each in found] == cases
    for each in found:
        assert each["losses"] == pytest.approx(each["want"], rel=1e-5), each
        assert each["weights"] < 2e-5, each


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_frozen_token_embedding_keeps_every_bit_at_every_stage(results, ranks):
    assert all(each["embedding"] == 0.0 for each in results[ranks]["criteria"])


def test_a_run_starts_from_the_weights_of_every_format_bit_for_bit_at_step_0(results):
    found = results[2]["starts"]["formats"]
    names = ("ours", "a run", "best", *FORMATS)
    assert found == {f"{name} at stage {stage}": True for name in names for stage in WEIGHTS}


@pytest.mark.parametrize("source", ["ours", "fairseq"])
@pytest.mark.parametrize(
    "what, says",
    [
        ("preset", ("is (32,), the model's is (64,)", " more of another shape; ", "model.preset=nano model.change")),
        ("vocabulary", ("data.vocab has 230 entries, the weights 220", "init_changes='[\"grow_vocab\"]'")),
        ("positions", ("16 x 16 patches, the model's of 8 x 8", "init_changes='[\"resize_image_positions\"]'")),
    ],
)
def test_weights_of_another_model_are_refused_on_every_rank_with_what_would_fit(results, source, what, says):
    told = results[2]["starts"]["errors"][f"{source}: {what}"]
    assert len(told) == 2 and all(text in line for line in told for text in says), told
    assert all("\n" not in line for line in told)


def test_weights_of_another_vocabulary_are_refused_though_the_sizes_are_equal(results):
    told = results[2]["starts"]["errors"]["other vocabulary"]
    assert len(told) == 2 and all("its ids mean other words" in line for line in told)


@pytest.mark.parametrize("source", ["ours", "fairseq"])
def test_vocabulary_and_image_positions_change_only_when_asked(results, source):
    assert results[2]["starts"]["changes"][source] == {"rows kept": True, "image rows": 65}

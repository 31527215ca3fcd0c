"""SCST on ranks: one step is the same step however it is cut, and it rewards what the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import launch

from ofa_ds.data.vocab import train_vocab


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("scst")
    train_vocab(["a cat sat on the mat and the dog"], 260, folder / "vocab", num_codes=4, num_bins=4)
    worker = Path(__file__).with_name("scst_worker.py")
    return {size: launch(folder, size, worker=worker) for size in (1, 2)}


def test_losses_rewards_and_weights_are_those_of_one_process_on_all_pictures(results) -> None:
    """Whatever the ZeRO stage, the ranks and the accumulation: to rounding of fp32."""
    whole = results[1][0]
    assert all(reward > 0.1 for reward in whole["rewards"]) and all(abs(loss) > 1e-3 for loss in whole["losses"])
    for each in (each for size in results for each in results[size]):
        where = f"stage {each['stage']}, {each['accumulation']} steps"
        assert each["rewards"] == pytest.approx(whole["rewards"], rel=1e-5), where
        assert each["losses"] == pytest.approx(whole["losses"], rel=1e-3, abs=1e-4), where
        assert each["weights"] == pytest.approx(whole["weights"], rel=1e-5), where

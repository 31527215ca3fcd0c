"""The moving average of the weights: its formula, its buffers, and what is told where a checkpoint has none."""

from __future__ import annotations

import pytest
import torch
from checkpoints import ofa_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from ofa_ds.checkpoint import load_model_weights
from ofa_ds.engine.moving_average import MovingAverage
from ofa_ds.model.config import ResNetConfig, preset


@given(decay=st.floats(0, 0.9999), course=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12))
def test_it_is_the_weighted_sum_of_all_weights_so_far(decay: float, course: list[float]) -> None:
    weight, buffer = torch.tensor([course[0], 1.0]), torch.tensor(course[0])
    average = MovingAverage([weight], {"mean": buffer}, decay)
    expected = course[0]
    for value in course[1:]:
        weight[0] = value
        buffer.fill_(value)
        average.update()
        expected = decay * expected + (1 - decay) * value
    found = average.by_master[weight]
    assert found[0].item() == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert average.buffers["mean"].item() == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert found[1] == 1, "a weight that does not move is its own average, bit for bit"


def test_counters_are_copied_and_a_restart_begins_at_the_weights() -> None:
    weight, count = torch.zeros(3), torch.tensor(0)
    average = MovingAverage([weight], {"count": count}, 0.5)
    weight += 8
    count += 7
    average.update()
    assert average.buffers["count"] == 7 and average.by_master[weight].tolist() == [4, 4, 4]
    average.restart()
    assert average.by_master[weight].tolist() == [8, 8, 8] and weight.tolist() == [8, 8, 8]


def test_weights_of_sixteen_bits_have_an_average_of_thirty_two() -> None:
    weight = torch.ones(1, dtype=torch.bfloat16)
    average = MovingAverage([weight], {}, 0.9999)
    weight += 1
    average.update()
    assert average.by_master[weight].item() == pytest.approx(1.0001)


def test_a_checkpoints_average_is_loaded_in_the_place_of_its_weights(tmp_path) -> None:
    resnet = ResNetConfig(depths=(1, 1, 1))
    config = preset(
        "tiny", vocab_size=220, dim=32, ffn_dim=64, num_heads=2, encoder_layers=1, decoder_layers=1, backbone=resnet
    )
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema")
    tensors = ofa_checkpoint(tmp_path / "averaged", config, kinds=kinds)
    weights, averages = (load_model_weights(tmp_path / "averaged", average=each) for each in (False, True))
    name = "encoder.embed_tokens.weight"
    assert torch.equal(weights[name], tensors[name]) and torch.equal(averages[name], tensors[name] + 3)
    count = next(name for name in weights if name.endswith("num_batches_tracked"))
    assert averages[count] == weights[count] + 1 and averages.keys() == weights.keys()
    ofa_checkpoint(tmp_path / "plain", config)
    with pytest.raises(ValueError, match=r"has no moving average; it was trained without optim\.ema_decay"):
        load_model_weights(tmp_path / "plain", average=True)

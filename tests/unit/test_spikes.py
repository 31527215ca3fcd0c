"""Losses far above those before them: found, rarely imagined, the same after a checkpoint."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from ofa_ds.train.spikes import LEAST, LENGTH, LossWindow

SEED = 12


def course(steps: int, noise: float, generator: np.random.Generator) -> np.ndarray:
    """A loss that falls as losses do, with relative noise."""
    return (2.0 + 8.0 / np.sqrt(1 + np.arange(steps) / 30)) * (1 + noise * generator.standard_normal(steps))


@pytest.mark.long
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.2])
def test_a_falling_noisy_loss_has_no_spike_in_a_hundred_thousand_steps(noise):
    print(f"seed {SEED}")
    losses, window, found = course(100_000, noise, np.random.default_rng(SEED)), LossWindow(6.0), 0
    for loss in losses[:: 1 if noise else 50]:
        found += window.spike(loss) is not None
        window.add(loss)
    assert found <= 1


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_a_loss_ten_spreads_above_is_a_spike_and_says_how_far(noise):
    generator = np.random.default_rng(SEED)
    window = LossWindow(6.0, course(500, noise, generator)[-LENGTH:])
    mean, spread = np.mean(window.losses), np.std(window.losses, ddof=1)
    text = window.spike(mean + 10 * spread)
    assert text and "10.0 sigma above" in text and f"the last {LENGTH}" in text and "\n" not in text
    assert window.spike(mean + 5.9 * spread) is None and window.spike(mean - 50 * spread) is None


def test_nothing_is_judged_before_enough_steps_nor_where_the_loss_is_not_finite():
    window = LossWindow(6.0, [1.0] * (LEAST - 1))
    assert window.spike(1e9) is None
    window.add(1.0)
    for loss in (1e9, 1.005, 1.0, -5.0, math.nan, math.inf, -math.inf):  # judged on the device as on the host
        assert bool(window.is_spike(torch.tensor(loss, dtype=torch.float64))) is (window.spike(loss) is not None)
    assert window.spike(1e9) and window.spike(math.nan) is None and window.spike(math.inf) is None
    assert window.spike(1.005) is None, "losses that hardly differ make no spike of a small rise"


def test_a_window_from_a_checkpoint_judges_to_the_bit_as_the_one_that_was_saved():
    generator = np.random.default_rng(SEED)
    window = LossWindow(6.0, course(300, 0.1, generator))
    again = LossWindow(6.0, json.loads(json.dumps(window.losses)))
    assert again.losses == window.losses and len(again.losses) == LENGTH
    for loss in generator.uniform(1, 20, 200):
        assert again.spike(loss) == window.spike(loss)
        window.add(loss)
        again.add(loss)

"""A slow rank is named within 20 steps, and noise makes none."""

from __future__ import annotations

import numpy as np
import pytest

from ofa_ds.train.stragglers import Stragglers

SEED = 7
NOISES = {"quiet": (0.02, 0.0), "noisy": (0.1, 0.0), "very noisy": (0.3, 0.0), "pauses": (0.02, 0.05)}
"""Relative noise of a step's pace, and how often a step takes three times as long."""


def paces(ranks: int, noise: str, generator: np.random.Generator) -> np.ndarray:
    """Of one step; the work of the whole step varies as well."""
    spread, pauses = NOISES[noise]
    own = np.exp(spread * generator.standard_normal(ranks)) * np.where(generator.random(ranks) < pauses, 3, 1)
    return own * generator.uniform(0.5, 2)


@pytest.mark.parametrize("ranks", [3, 64])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_names_less_than_one_rank_in_ten_thousand_steps(ranks, noise):
    print(f"seed {SEED}")
    generator, watch = np.random.default_rng(SEED), Stragglers(["h"] * ranks)
    steps = 10_000 if ranks < 64 else 4_000
    named = [line for step in range(steps) for line in watch.add(step, paces(ranks, noise, generator).tolist())]
    assert len([line for line in named if "slower" in line]) < 2, named


@pytest.mark.parametrize(("ranks", "least"), [(3, 0.95), (8, 0.99), (64, 0.99)])
def test_a_rank_that_is_ten_per_cent_slower_is_named_within_twenty_steps_with_its_host(ranks, least):
    print(f"seed {SEED}")
    generator, found = np.random.default_rng(SEED), 0
    for _ in range(100):
        watch, lines = Stragglers([f"h{rank}" for rank in range(ranks)]), []
        for step in range(40):
            pace = paces(ranks, "quiet", generator)
            pace[1] *= 1.1 if step >= 20 else 1
            lines += watch.add(step, pace.tolist())
        found += any("rank 1 on h1 is " in line and "slower than the median" in line for line in lines)
        assert not any("rank 0" in line or "rank 2 " in line for line in lines), lines
    assert found >= least * 100


def test_it_is_told_once_and_so_is_its_recovery():
    watch, lines = Stragglers(["a", "b", "c"]), []
    for step in range(120):
        lines += watch.add(step, [1.0 + 0.001 * (step % 3), 1.0 + 0.001 * (step % 2), 1.5 if 20 <= step < 60 else 1.0])
    assert [("slower" in line, "again" in line) for line in lines] == [(True, False), (False, True)]
    assert "rank 2 on c is 50% slower" in lines[0] or "rank 2 on c is 49% slower" in lines[0]
    assert watch.slowest is not None and watch.slowest[1] < 0.01


def test_one_rank_alone_and_unknown_paces_say_nothing():
    alone, pair = Stragglers(["a"]), Stragglers(["a", "b"])
    for step in range(50):
        assert alone.add(step, [1.0]) == [] and pair.add(step, [0.0, 5.0]) == []
    assert alone.slowest is None and pair.slowest is None

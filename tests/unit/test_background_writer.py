"""The pace of the process that writes checkpoints beside training on a CPU."""

from __future__ import annotations

import time

import pytest

from ofa_ds.storage.background_writer import Pace


def rested_s(pace: Pace, num_bytes: int, cpu_s: float) -> float:
    began = time.monotonic()
    pace.after(num_bytes, cpu_s)
    return time.monotonic() - began


def test_it_works_for_its_share_of_the_time_only() -> None:
    pace = Pace(0.25, waited_for=lambda: False, watch=lambda: None)
    assert rested_s(pace, 1000, 0.02) >= 0.06 - 1e-3


def test_a_piece_that_took_long_by_chance_does_not_prolong_the_rest() -> None:
    """A machine that sleeps wakes up slowly: rests that counted this would grow without end."""
    pace = Pace(0.5, waited_for=lambda: False, watch=lambda: None)
    pace.after(1000, 0.001)
    assert rested_s(pace, 2000, 30.0) < 10


def test_it_does_not_rest_at_full_share_or_while_somebody_waits() -> None:
    assert rested_s(Pace(1.0, waited_for=lambda: False, watch=lambda: None), 1000, 30.0) < 10
    assert rested_s(Pace(0.001, waited_for=lambda: True, watch=lambda: None), 1000, 30.0) < 10


def test_a_rest_ends_when_somebody_begins_to_wait_or_the_trainer_is_gone() -> None:
    looks = []
    pace = Pace(0.001, waited_for=lambda: len(looks) >= 2, watch=lambda: looks.append(1))
    assert rested_s(pace, 1000, 30.0) < 10 and len(looks) == 2

    def gone() -> None:
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        Pace(0.001, waited_for=lambda: False, watch=gone).after(1000, 30.0)

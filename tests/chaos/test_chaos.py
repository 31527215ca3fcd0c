"""Whatever happens to a supervised run, it ends by itself with the weights of a quiet one, and nothing is left of it.

Each seed is one run with two faults (plans.py). The seeds here are a sample for every day; `python -m tests.chaos`, or
`bash tests/run.sh --slow -m slow tests/chaos`, plays 35 runs with real training: 70 faults, each kind five times.
"""

from __future__ import annotations

import collections
import subprocess
from pathlib import Path

import counting_rank
import field
import pytest
from plans import COSTS_A_HOST, INSIDE, KINDS, LAST_STEP, NUM_STEPS, Plan, plan
from play import play
from references import References, Schedule, schedule_of, stand_in_weights

pytestmark = pytest.mark.long

TRAINED = (1,)
"""Seeds with real ZeRO-3 training."""
STOOD_IN = range(98, 105)
"""Seeds with a program that only behaves like a rank: one pack, so each kind once."""
WHOLE = range(35)


def hold(stage: field.Field, references: References, drawn: Plan, *, stands_in: bool) -> None:
    outcome = play(stage, drawn, references, stands_in=stands_in)
    print(outcome)
    assert not outcome.problems, str(outcome)
    assert not outcome.missed, str(outcome)


@pytest.mark.parametrize("seed", STOOD_IN)
def test_a_disturbed_run_ends_as_the_quiet_one(stage: field.Field, references: References, seed: int) -> None:
    hold(stage, references, plan(seed), stands_in=True)


@pytest.mark.parametrize("seed", TRAINED)
def test_disturbed_training_ends_with_the_bytes_of_the_quiet_one(
    stage: field.Field, references: References, seed: int
) -> None:
    hold(stage, references, plan(seed), stands_in=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", WHOLE)
def test_the_whole_suite_with_real_training(stage: field.Field, references: References, seed: int) -> None:
    hold(stage, references, plan(seed), stands_in=False)


def test_the_whole_suite_meets_sixty_faults_and_each_kind_as_often() -> None:
    met = collections.Counter(fault.kind for seed in WHOLE for fault in plan(seed).faults)
    assert met == dict.fromkeys(KINDS, 5) and met.total() == 70
    daily = collections.Counter(fault.kind for seed in STOOD_IN for fault in plan(seed).faults)
    assert daily == dict.fromkeys(KINDS, 1)


def test_a_seed_always_draws_the_same_faults_and_never_takes_the_last_host() -> None:
    for seed in range(300):
        drawn = plan(seed)
        assert drawn == plan(seed)
        lost = [fault for fault in drawn.faults if fault.kind in COSTS_A_HOST]
        assert len(lost) < drawn.num_hosts
        assert all(0 < fault.step <= LAST_STEP and fault.host < drawn.num_hosts for fault in drawn.faults)
        assert all(
            fault.host == 0 for fault in drawn.faults[1:] if fault.kind in INSIDE and lost[:1] == [drawn.faults[0]]
        )


def test_steps_count_up_to_where_a_later_attempt_began(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    starts = [(0, 3), (4, 3), (8, 2), (6, 2), (6, 1)]
    lines = [
        f'{{"event": "start", "from_step": {step}, "world_size": {size}}}\n{{"event": "end"}}\n'
        for step, size in starts
    ]
    (tmp_path / "launch" / "attempts.jsonl").write_text("".join(lines))
    found = schedule_of(tmp_path, nan=())
    assert found == Schedule(segments=((0, 3), (6, 1)), left_out=(), nan=())
    assert found.world_sizes() == {step: 3 if step <= 6 else 1 for step in range(1, NUM_STEPS + 1)}


def test_weights_that_stand_in_depend_on_steps_ranks_and_what_is_left_out() -> None:
    sizes = dict.fromkeys(range(1, NUM_STEPS + 1), 3)
    all_three = counting_rank.weights_after(sizes, ())
    others = [counting_rank.weights_after({**sizes, 7: 2}, ()), counting_rank.weights_after(sizes, (4,)), "start"]
    assert all_three not in others
    assert all_three == stand_in_weights(Schedule(segments=((0, 3),), left_out=(), nan=()))


def test_clocks_jump_on_one_host_and_waits_are_left_alone(stage: field.Field) -> None:
    program = "import time; a = time.monotonic(); time.sleep(0.2); print(time.time(), time.monotonic() - a)"
    (stage.clocks / "h2").write_text("86400")
    try:
        told = [
            stage.cluster.run(["python3", "-c", program], host=host, timeout=20, env=stage.environment()).stdout.split()
            for host in (0, 1)
        ]
    finally:
        (stage.clocks / "h2").unlink()
    (here, waited_here), (there, waited_there) = told
    assert 86_390 < float(there) - float(here) < 86_460
    assert 0.19 < float(waited_here) < 5 and 0.19 < float(waited_there) < 5


def test_nothing_is_left_of_a_field(tmp_path: Path) -> None:
    lack = field.missing_requirement()
    if lack is not None:
        pytest.skip(f"no hosts on this machine: {lack}")
    with pytest.raises(ZeroDivisionError), field.field(2, tmp_path) as made:
        names = made.cluster.names
        1 / 0  # noqa: B018
    listed = subprocess.check_output(["ip", "netns", "list"], text=True)
    assert not [name for name in names if name in listed.split()]
    assert str(tmp_path) not in Path("/proc/mounts").read_text()

"""After a failure: whether there is another attempt, on which hosts, over which steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ofa_ds.cluster.attempts import largest, newest_step, no_retry, repeated_host, replaced
from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.skipping import read_history, recipe_problem, repeated_step, with_skips
from ofa_ds.cluster.supervisor import Outcome
from ofa_ds.cluster.verdict import Verdict
from ofa_ds.cluster.view import Exit

A, B, C = Host("a", 8), Host("b", 8), Host("c", 8)
SMALL, SPARE = Host("small", 4, spare=True), Host("spare", 8, spare=True)


def failed(
    step: int = 7, *, code: int = 1, host: str = "a", phase: str = "step", own: bool = True, progress: bool = True
) -> Outcome:
    error = {"type": "ValueError", "message": "row 3", "traceback": ""} if own else None
    number = 0 if own or code < 128 else code - 128
    found = Exit(host, 0, code, number, phase, step, error, "", 0.0)
    verdict = Verdict(outcome="failed", exit_code=code, host=host, rank=0, step=step, exit=found)
    return Outcome(verdict=verdict, made_progress=progress)


def test_retries_are_counted() -> None:
    assert no_retry([failed()], 1) is None
    assert "no retries were asked for" in no_retry([failed()], 0)
    assert no_retry([failed(), failed()], 0) == "no retries are left"


def test_a_usage_error_and_two_failures_before_the_first_step_are_final() -> None:
    assert no_retry([failed(code=2)], 5)
    nothing = failed(0, phase="start", progress=False)
    assert no_retry([nothing], 5) is None
    assert no_retry([nothing, nothing], 5)
    assert no_retry([nothing, failed(), nothing], 5) is None


def test_lost_hosts_may_be_lost_again_before_the_first_step() -> None:
    lost = Outcome(verdict=Verdict(outcome="lost", exit_code=1, host="a"))
    assert no_retry([lost, lost], 5) is None


def test_spares_take_the_places_of_bad_hosts_those_with_as_many_slots_first() -> None:
    hosts, left = replaced((A, B, C), {"b"}, [SMALL, SPARE])
    assert ([host.name for host in hosts], left) == (["a", "spare", "c"], [SMALL])
    assert replaced((A, B, C), {"a", "c"}, []) == ((B,), [])
    assert replaced((A,), {"a"}, [SMALL])[0] == (Host("small", 4),)


def test_as_many_hosts_as_the_recipe_fits_are_used_and_the_rest_is_told() -> None:
    def problem_at(ranks: int) -> str:
        return "" if ranks in (8, 24) else f"24 does not divide over {ranks}"

    assert largest((A, B, C), problem_at) == ((A, B, C), "")
    hosts, told = largest((A, B), problem_at)
    assert hosts == (A,) and "24 does not divide over 16; going on with 1 hosts, 8 ranks" in told
    assert largest((SMALL,), problem_at)[0] == ()


def test_a_real_recipe_says_over_how_many_ranks_its_batch_divides() -> None:
    program = (b"pretrain", b"pretrain-nano", b"data.shards=s", b"data.vocab=v", b"batch.micro_rows=12")
    program += (b"batch.global_rows=24",)
    assert recipe_problem(program, b"/", 2) == ""
    assert "3 ranks" in recipe_problem(program, b"/", 3)
    assert recipe_problem((b"stand-in",), b"/", 3) == ""


def test_the_host_that_fails_twice_by_itself_is_named() -> None:
    mine, other = failed(own=False, code=137), failed(own=False, code=137, host="b")
    assert repeated_host([mine, mine]) == "a"
    assert repeated_host([other, mine]) == repeated_host([mine]) == repeated_host([failed(), failed()]) == ""


def test_the_step_in_which_two_attempts_failed_by_own_exceptions_is_skipped() -> None:
    assert repeated_step([failed(), failed()]) == 8
    assert repeated_step([failed(phase="start"), failed()]) == 8
    assert repeated_step([failed()]) is None
    assert repeated_step([failed(7), failed(8)]) is None
    assert repeated_step([failed(own=False, code=137), failed()]) is None
    assert repeated_step([failed(0, phase="start"), failed(0, phase="start")]) is None


def test_skips_are_added_to_those_of_the_user() -> None:
    program = (b"pretrain", b"pretrain-nano", b"data.shards=s", b"data.vocab=v")
    assert with_skips(program, set(), b"/") == program
    assert with_skips(program, {9, 6}, b"/") == (*program, b"train.skip_steps=[6, 9]")
    assert with_skips((*program, b"train.skip_steps=[3]"), {6}, b"/")[-1] == b"train.skip_steps=[3, 6]"


def test_history_survives_lines_that_a_kill_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "attempts.jsonl"
    assert read_history(file).last_attempt == 0
    lines = [{"attempt": 1, "event": "start", "skip_steps": []}, {"attempt": 2, "event": "start", "skip_steps": [6]}]
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"attempt": 3, "ev')
    assert (read_history(file).last_attempt, read_history(file).skip_steps) == (2, (6,))


@pytest.mark.parametrize("names, newest", [((), 0), (("step_00000010", "step_00000009", ".partial_step_00000011"), 10)])
def test_the_newest_checkpoint_is_known_by_name(tmp_path: Path, names: tuple[str, ...], newest: int) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    assert newest_step(tmp_path) == newest

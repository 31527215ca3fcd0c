"""When an attempt is over, and whose fault it is: decided from what agents told."""

from __future__ import annotations

import dataclasses
import signal

import pytest

from ofa_ds.cluster import verdict
from ofa_ds.cluster.verdict import Limits, culprit, is_echo, judge, ranked
from ofa_ds.cluster.view import AgentView, Exit, RankView

LIMITS = Limits(hang_after_s=300, start_within_s=1800, silence_s=8)
NOW = 1000.0
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.77.0.2]:4519"


def ended(rank: int, code: int, *, at: float = NOW, error: str = "", kind: str = "RuntimeError", **more) -> Exit:
    content = {"type": kind, "message": error, "traceback": f"{kind}: {error}"} if error else None
    number = code - 128 if code > 128 and code != 130 else 0
    values = {"host": f"h{rank}", "phase": "step", "step": 5, "tail": ""} | more
    return Exit(rank=rank, code=code, signal=number, error=content, arrived_at_s=at, **values)


def row(rank: int, **more) -> RankView:
    return RankView(**{"rank": rank, "pid": 1, "phase": "step", "step": 5, "state": "S", "moved_at_s": NOW} | more)


def agents(*exits: Exit, count: int = 3, heard: float = NOW) -> list[AgentView]:
    """A rank a host; those whose exit is given have ended with it."""
    found = []
    for number in range(count):
        agent = AgentView(f"h{number}", heard, is_ready=True, ranks={number: row(number)})
        agent.exits = {each.rank: each for each in exits if each.rank == number}
        found.append(agent)
    return found


def judged(found: list[AgentView], now: float = NOW) -> verdict.Verdict | None:
    return judge(found, now, LIMITS, 0.0)


@pytest.mark.parametrize(
    "error",
    [
        GLOO,
        "Connection reset by peer",
        "Read error [10.0.0.1]:20: Connection reset by peer",
        "[3] is setting up NCCL communicator and retrieving ncclUniqueId: Socket Timeout",
        "Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_words_of_a_rank_whose_peer_is_gone_are_an_echo(error: str) -> None:
    assert is_echo(ended(0, 1, error=error))
    assert is_echo(ended(0, 1, tail=f"Traceback\nRuntimeError: {error}"))


@pytest.mark.parametrize(
    "found",
    [
        ended(0, 1, error="row 7 of text-00001 is damaged"),
        ended(0, 137, tail=GLOO),
        ended(0, 139),
        ended(0, 1, tail="MemoryError"),
    ],
)
def test_signals_and_own_words_are_no_echo(found: Exit) -> None:
    assert not is_echo(found)


def test_an_abort_of_the_watchdog_of_nccl_is_an_echo() -> None:
    assert is_echo(ended(0, 134, tail="Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"))
    assert not is_echo(ended(0, 134, tail="free(): invalid pointer"))


def test_causes_come_before_what_an_engine_ended_and_that_before_echoes() -> None:
    echo, ended_by_engine, cause = ended(0, 1, at=1, error=GLOO), ended(1, 143, at=2), ended(2, 137, at=3)
    assert ranked([echo, ended_by_engine, cause]) == [cause, ended_by_engine, echo]
    assert ranked([ended(0, 0), ended(1, 130)]) == []


def test_an_echo_waits_for_its_cause_and_is_told_where_none_comes() -> None:
    echo = ended(0, 1, at=NOW, error=GLOO)
    assert judged(agents(echo), NOW + 1) is None
    found = judged(agents(echo, ended(2, 137, at=NOW + 1)), NOW + 1)
    assert (found.rank, found.exit_code) == (2, 137)
    assert judged(agents(echo, heard=NOW + 3.5), NOW + 3.6).rank == 0


def test_an_echo_waits_longer_where_a_host_is_silent_which_may_be_the_cause() -> None:
    echo = ended(0, 1, at=NOW, error=GLOO)
    found = agents(echo, heard=NOW + 5)
    found[2].heard_at_s = NOW - 1
    assert judged(found, NOW + 5) is None
    lost = judged(found, NOW + 7.5)
    assert (lost.outcome, lost.host, lost.bad_hosts) == ("lost", "h2", ("h2",))


def test_an_agent_that_gave_up_is_never_taken_for_a_run_that_is_done() -> None:
    found = agents()
    for agent in found:
        agent.is_gone, agent.gave_up = True, "heard nothing for 8.1 s"
    assert judged(found).outcome == "lost"


def test_all_done_all_stopped_and_the_record_of_a_rank_above_the_code_of_its_engine() -> None:
    done = agents(*(ended(rank, 0) for rank in range(3)))
    for agent in done:
        agent.engine_code = 0
    assert (judged(done).outcome, judged(done).exit_code) == ("done", 0)
    stopped = agents(*(ended(rank, 130) for rank in range(3)))
    for agent in stopped:
        agent.engine_code = 1  # torchrun's word for it
    assert (judged(stopped).outcome, judged(stopped).exit_code) == ("stopped", 130)
    del stopped[1].exits[1]
    assert (judged(stopped).outcome, judged(stopped).exit_code) == ("failed", 1)


def test_peers_of_a_rank_that_has_saved_are_let_finish() -> None:
    assert judged(agents(ended(0, 130), ended(1, 0))) is None


def hang(**more) -> verdict.Verdict | None:
    found = agents()
    found[1].ranks[1] = row(1, **more)
    return judged(found)


def test_a_rank_without_progress_is_a_hang_only_where_nobody_saves_or_draws() -> None:
    late = {"moved_at_s": NOW - 301}
    assert (hang(**late).outcome, hang(**late).rank) == ("hang", 1)
    assert hang(moved_at_s=NOW - 299) is None
    assert hang(phase="save", **late) is None
    assert hang(phase="save", moved_at_s=NOW - 2200).outcome == "hang"
    waiting = agents()
    waiting[0].ranks[0], waiting[1].ranks[1] = row(0, phase="sample", **late), row(1, **late)
    assert judged(waiting) is None


def test_a_stopped_rank_is_a_hang_in_any_phase_and_the_start_has_a_limit_of_its_own() -> None:
    assert "state T" in hang(phase="save", state="T", stopped_since_s=NOW - 301).error
    assert hang(phase="start", moved_at_s=NOW - 900) is None
    found = agents()
    found[1].ranks[1] = row(1, phase="launch")
    assert judge(found, 1801.0, dataclasses.replace(LIMITS, silence_s=1e9), 0.0).outcome == "hang"


def test_a_stopped_engine_is_a_hang() -> None:
    found = agents()
    found[2].engine_stopped_since_s = NOW - 301
    assert (judged(found).outcome, judged(found).host) == ("hang", "h2")


def test_a_rank_that_is_gone_without_a_word_of_its_shim_is_a_failure() -> None:
    assert hang(state="X", gone_since_s=NOW - 11).outcome == "failed"


WAITS = 'Current thread 0x7f (most recent call first):\n  File "/x/torch/distributed/c10d.py", line 3 in wait\n'
BUSY = 'Current thread 0x7f (most recent call first):\n  File "/x/ofa_ds/data/shards.py", line 9 in __getitem__\n'


@pytest.mark.parametrize(
    "rows, stacks, named",
    [
        ([row(0), row(1, state="T"), row(2, step=4)], {}, 1),
        ([row(0), row(1), row(2, step=4)], {0: WAITS, 1: WAITS, 2: WAITS}, 2),
        ([row(0), row(1), row(2)], {0: WAITS, 1: BUSY, 2: WAITS}, 1),
        ([row(0), row(1), row(2)], {0: WAITS, 1: WAITS}, 2),
        ([row(0), row(1, step=4), row(2, step=4)], {0: WAITS, 1: WAITS, 2: BUSY}, 2),
        ([row(0, state="X"), row(1), row(2)], {1: WAITS, 2: BUSY}, 2),
        ([row(0), row(1)], {0: WAITS, 1: WAITS}, 0),
    ],
    ids=["stopped", "behind", "elsewhere", "mute", "behind and elsewhere", "the gone one is not asked", "alike"],
)
def test_the_culprit_is_who_keeps_the_others_waiting(rows: list[RankView], stacks: dict[int, str], named: int) -> None:
    assert culprit(rows, stacks)[0].rank == named


def test_without_living_ranks_nobody_is_named() -> None:
    assert culprit([row(0, state="X")], {}) is None


def test_a_death_by_signal_is_told_with_its_name() -> None:
    assert verdict.in_words(ended(0, 128 + signal.SIGKILL)).startswith("killed by SIGKILL (signal 9)")
    assert verdict.in_words(ended(0, 3, tail="a\nthe last\n")) == "exit code 3: the last"
    assert verdict.in_words(ended(0, 1, error="two\nlines")) == "RuntimeError: two lines"

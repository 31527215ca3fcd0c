"""The speed benchmark compares like with like: every contender gives the result and the gradients that ours gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "kernels"
sys.path.insert(0, str(KERNELS))

import contenders  # noqa: E402
import speed  # noqa: E402
import speed_watch  # noqa: E402

LIKE = torch.zeros((), dtype=torch.float64)
SELF, CROSS = [(7, 7), (1, 1), (4, 4)], [(3, 7), (5, 2), (1, 4)]


def agree(found: list[contenders.Contender], shared: int) -> None:
    """shared: how many leaves at the end have the same layout for all."""
    ours, *others = found = [each for each in found if each.same]
    assert others
    results = []
    for contender in found:
        out = contender.run()
        packed = contender.packed(out)
        weight = torch.linspace(-1, 1, packed.numel(), dtype=LIKE.dtype).view(packed.shape)
        grads = torch.autograd.grad((packed * weight).sum(), contender.leaves[len(contender.leaves) - shared :])
        results.append((packed, *grads))
    for contender, values in zip(others, results[1:], strict=True):
        for value, want in zip(values, results[0], strict=True):
            torch.testing.assert_close(value.to(want.dtype), want, rtol=1e-9, atol=1e-9, msg=contender.name)


@pytest.mark.parametrize("examples, causal, shared", [(SELF, False, 4), (SELF, True, 4), (CROSS, False, 3)])
def test_attentions_agree(monkeypatch, examples, causal, shared):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # the alternatives' own casts, in fp64 here
    agree(contenders.attentions(2, 8, examples, causal=causal, like=LIKE), shared)


@pytest.mark.parametrize("kind, shared", [("norm", 3), ("gelu + norm", 3), ("residual + norm", 4)])
def test_norms_agree(kind, shared):
    agree(contenders.norms(kind, 5, 24, LIKE), shared)


def test_losses_agree(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    agree(contenders.losses(9, 16, 40, LIKE), 2)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KERNELS / "bench.py"), "--device", "cpu", "--small", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_the_benchmark_runs_on_a_cpu_and_says_what_it_measured():
    done = bench("--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["contender"] for row in rows} >= {"ofa-ds", "eager", "sdpa, dense bias", "torch", "ofa-ds, no tables"}
    assert len({row["operator"] for row in rows}) == 7
    assert all(0 < row["forward_us"][0] <= row["forward_us"][1] <= row["forward_us"][2] for row in rows)
    assert all(0 < row["host_us"][0] and not row["problem"] for row in rows)


def test_filters_leave_only_what_was_asked_for():
    done = bench("--only", "norm", "loss", "--contender", "ofa-ds", "--size", "base")
    lines = done.stdout.rstrip().splitlines()
    assert lines[:2] == speed.HEAD.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| norm", "| residual + norm", "| gelu + norm", "| vocabulary loss"
    ]  # fmt: skip
    assert all(" | ofa-ds | " in line for line in lines[2:])
    nothing = bench("--size", "huge")
    assert nothing.returncode == 1 and nothing.stdout.rstrip() == speed.HEAD


def small_case(*contenders_: contenders.Contender) -> speed.Case:
    return speed.Case("operator", "base", 1, 1.0, 1.0, lambda like: list(contenders_))


def contender(name: str, run) -> contenders.Contender:
    x = torch.ones(3, requires_grad=True)
    return contenders.Contender(name, lambda: run(x), (x,))


def fails(x):
    raise RuntimeError("no such\n instruction")


def test_what_a_contender_raises_is_its_row_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(speed, "BUDGET_S", 0.0)
    found = [contender("one", fails), contender("two", lambda x: x * 2)]

    def no_inputs(like):
        raise torch.cuda.OutOfMemoryError("too large")

    broken = speed.Case("broken", "base", 1, 1.0, 1.0, no_inputs)
    monkeypatch.setattr(speed, "cases", lambda small: iter([broken, small_case(*found)]))
    told = [(number, row.contender, row.problem, any(row.both_us)) for number, row in speed.run("cpu", True, EVERY)]
    assert told == [
        (0, "inputs", "out of memory", False),
        (1, "one", "", False), (1, "one", "RuntimeError: no such instruction", False),
        (2, "two", "", False), (2, "two", "", True),
    ]  # fmt: skip
    assert [number for number, _ in speed.run("cpu", True, EVERY, skip=2)] == [2, 2]


def test_where_ours_is_slower_is_told_with_the_rule_that_hands_the_shape_to_torch():
    def measured(operator: str, by: str, device: float, host: float = 0.0, problem: str = "") -> speed.Measured:
        return speed.Measured(operator, "6b", 9, by, both_us=(0, device, 0), host_us=(0, host), problem=problem)

    results = [
        measured("attention cross, mix", "ofa-ds", 100, host=300),
        measured("attention cross, mix", "ofa-ds, no tables", 50), measured("attention cross, mix", "sdpa", 200),
        measured("norm", "ofa-ds", 10), measured("norm", "torch", 11), measured("norm", "liger", 0, problem="fails"),
        measured("gelu + norm", "ofa-ds", 12), measured("gelu + norm", "torch", 8),
        measured("vocabulary loss", "ofa-ds", 0, problem="fails"), measured("vocabulary loss", "eager", 7),
    ]  # fmt: skip
    told = speed.slower(results)
    names = [line.split(":")[0] for line in told]
    assert names == ["* attention cross, mix, 6b", "* gelu + norm, 6b", "* vocabulary loss, 6b"]
    assert "1.50 times sdpa's time" in told[0] and "`plan_attention`" in told[0]
    assert "1.50 times torch's time" in told[1] and "`MIN_ELEMENTS`" in told[1]
    assert "FAILS" in told[2] and "`PAYS_TOKENS`" in told[2]


EVERY = speed.Filter()
WORKER = """
import json, os, sys, time
skip = int(sys.argv[-1])
names = {names}
def say(number, name, **more):
    print(json.dumps([number, {{"contender": name, "both_us": [0, 0, 0], "problem": ""}} | more]), flush=True)
for number, name in list(enumerate(names))[skip:]:
    say(number, name)
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    if name == "breaks":
        say(number, name, problem="RuntimeError: CUDA error: an illegal memory access was encountered")
        print("a line of some library", flush=True)
        time.sleep(60)
    say(number, name, both_us=[1, 2, 3], process=os.getpid())
"""


def watched(*names: str, **options: float) -> list[dict]:
    command = [sys.executable, "-c", WORKER.format(names=repr(names))]
    return list(speed_watch.watched(command, **{"seconds": 50.0, "patience_s": 5.0} | options))


def test_a_contender_that_dies_hangs_or_breaks_the_device_costs_nobody_else_its_turn():
    rows = watched("well", "dies", "after", "hangs", "breaks", "last")
    assert [row["contender"] for row in rows] == ["well", "dies", "after", "hangs", "breaks", "last"]
    problems = {row["contender"]: row["problem"] for row in rows if row["problem"]}
    assert problems["dies"] == "ended its process with -6"
    assert problems["hangs"] == "took more than 5 s"
    assert "illegal memory access" in problems["breaks"] and len(problems) == 3
    processes = [row["process"] for row in rows if not row["problem"]]
    assert len(set(processes)) == 3, "a process in which something broke is not used again"


def test_when_the_time_is_over_what_was_under_way_is_told():
    rows = watched("well", "hangs", "never", seconds=4.0, patience_s=30.0)
    assert [(row["contender"], row["problem"]) for row in rows] == [("well", ""), ("hangs", "out of time")]


def test_a_process_that_cannot_begin_is_told_once():
    rows = list(speed_watch.watched([sys.executable, "-c", "raise SystemExit(3)"], seconds=20.0))
    assert [row["problem"] for row in rows] == ["ended its process with 3"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_what_needs_none():
    done = subprocess.run([sys.executable, str(KERNELS / "bench.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--compile and --roofline need none" in done.stderr

"""One optimizer step on any ranks, stage and accumulation split is the step of one process; real ranks over gloo."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from engine_cases import OFFLOAD, PARITY, RESHARD, RESUME, SKIP, WORKER, environment, launch, result_file

pytestmark = pytest.mark.long

TOLERANCE = 1e-5
HANG_S = 120
"""Silence of all ranks for this long is a hang."""

PARITY_CASES = [(ranks, stage, split) for ranks, cases in PARITY.items() for stage, split in cases]


@pytest.mark.parametrize("ranks, stage, accumulation", PARITY_CASES)
def test_twenty_steps_equal_one_process(results, ranks, stage, accumulation):
    cases = {(case["stage"], case["accumulation"]): case for case in results(ranks, "parity")}
    case = cases[stage, accumulation]
    assert len(case["losses"]) == 20
    assert case["loss_error"] < TOLERANCE, case
    assert case["norm_error"] < TOLERANCE, case
    assert case["weight_error"] < TOLERANCE, case


@pytest.mark.parametrize("name", ["bf16 stage 1", "bf16 stage 2", "bf16 stage 3", "fp16 stage 3"])
def test_low_precision_follows_the_course_of_fp32(results, name):
    case = next(case for case in results(2, "precision") if case["name"] == name)
    exact = results(2, "parity")[0]["losses"]
    assert case["losses"] == pytest.approx(exact[:10], rel=1e-3)
    assert case["updates"] == len(case["losses"]) == 10


@pytest.mark.parametrize("name", RESUME)
def test_four_steps_saved_and_four_more_are_eight_to_the_bit(results, name):
    case = next(case for case in results(2, "resume") if case["name"] == name)
    assert case["tensors"] > 40
    assert case["different"] == 0, case["first"]
    assert case["step"] == 4 and case["extra"] == {"note": name}
    assert case["problems"] == []


@pytest.mark.parametrize("name", RESUME)
def test_a_checkpoint_written_in_the_background_is_the_state_of_its_step(results, name):
    """Byte for byte what a save that training waits for wrote, though four more steps were taken meanwhile."""
    case = next(case for case in results(2, "resume") if case["name"] == name)
    assert case["background"]


def test_fp16_skips_overflowing_steps_and_saves_the_loss_scale(results):
    saved = next(case for case in results(2, "resume") if case["name"] == "fp16_3")["saved"]
    assert 0 < saved["skipped_steps"] < saved["global_steps"] == 4
    assert saved["adam_step"] == 4 - saved["skipped_steps"]
    assert saved["loss_scaler"]["cur_scale"] == 2.0 ** (20 - saved["skipped_steps"])


@pytest.mark.parametrize("name", SKIP)
def test_a_step_that_one_rank_spoils_is_skipped_by_all_and_leaves_no_trace(results, name):
    """Weights, moments, average, buffers and what follows are to the bit as if that step had never been."""
    left_no_trace(next(case for case in results(2, "skip") if case["name"] == name))


@pytest.mark.slow
def test_a_spoilt_step_leaves_no_trace_where_the_optimizer_is_on_the_cpu(tmp_path: Path):
    cases = launch(tmp_path, 2, "offload", timeout_s=3000)["offload"]
    assert [case["name"] for case in cases] == list(OFFLOAD)
    for case in cases:
        left_no_trace(case)


def left_no_trace(case: dict[str, Any]) -> None:
    assert case["skipped"] == [[bad, bad] for bad in (True, False, False, True, True, False)]
    assert case["changed"] == []
    assert case["updates"] == 3 and case["finite"]
    assert not any(math.isfinite(norm) for norm in case["norms"]) and len(case["norms"]) == 3
    assert case["apart"] == []


@pytest.mark.parametrize("ranks, source, stage", [(ranks, *case) for ranks, cases in RESHARD.items() for case in cases])
def test_what_two_ranks_saved_loads_at_another_world_size_and_stage(results, ranks, source, stage):
    cases = {(case["source"], case["stage"]): case for case in results(ranks, "reshard")}
    case = cases[source, stage]
    assert case["different"] == []
    assert case["norm"] > 0


@pytest.mark.parametrize("stage", range(4))
def test_a_moving_average_begins_at_the_weights_of_a_checkpoint_without_one_and_may_be_left_out(results, stage):
    case = results(1, "average")[stage]
    assert case["averages"] > 10 and case["different"] == [] and case["left"] == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ranks_with_random_task_mixtures_stay_in_step(tmp_path: Path):
    """300 micro-steps under DeepSpeed's launcher; a watchdog ends a hang and says where it was."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--master_port",
               str(free_port()), str(WORKER), str(tmp_path), "fuzz"]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        last, since = [], time.monotonic()
        while process.poll() is None:
            time.sleep(0.5)
            beats = [path.read_text() for path in sorted(tmp_path.glob("heartbeat_*"))]
            if beats != last:
                last, since = beats, time.monotonic()
            if time.monotonic() - since > HANG_S:
                process.terminate()
                pytest.fail(f"no rank moved for {HANG_S} s; micro-steps done: {last}")
    assert process.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    result = json.loads(result_file(tmp_path, 2).read_text())["fuzz"]
    assert result["micro_steps"] == 300 and result["updates"] == 100 and 0 < result["norm"] < 1e4

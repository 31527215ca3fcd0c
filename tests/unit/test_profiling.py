"""train.profile_steps: which steps are traced, what is written, and that nothing about it ends a run."""

from __future__ import annotations

import gzip
import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from recipes import problem

from ofa_ds.beat import Pulse
from ofa_ds.config import TrainConfig, load_recipe
from ofa_ds.engine.ranks import Ranks
from ofa_ds.train import profile_table, profiling
from ofa_ds.train.profiling import Profiling

KERNELS = Path(__file__).parents[2] / "kernels" / "ofa_kernels"


def run(
    folder: Path,
    window: str,
    *,
    first_step: int = 0,
    num_steps: int = 30,
    stop_at: int = 10**9,
    rank: int = 0,
    **more: Any,
) -> None:
    """A loop as the trainer has it, around steps of two products."""
    train = TrainConfig(profile_steps=window, num_steps=num_steps, **more)
    ranks = Ranks(rank=rank, world_size=4, local_rank=0, device=torch.device("cpu"))
    traced = Profiling(train, ranks, str(folder), Pulse(rank), first_step=first_step)
    weight = torch.zeros(8, 8, requires_grad=True)
    step = first_step
    while step < min(num_steps, stop_at):
        step += 1
        traced.begin(step)
        (torch.ones(4, 8) @ weight).sum().backward()
        assert traced.end(step) >= 0
    traced.close()


def steps_in(folder: Path, name: str = "*.json.gz") -> list[int]:
    """Whose marks the only trace has."""
    (file,) = (folder / "profile").glob(name)
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    return sorted(int(event["name"].split()[1]) for event in events if re.fullmatch(r"step \d+", event["name"]))


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_steps_of_the_window_are_traced_with_a_table_beside_them(tmp_path, capfd):
    run(tmp_path, "20:25")
    assert steps_in(tmp_path) == [20, 21, 22, 23, 24, 25]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "steps_20-25.rank_00000.json.gz", "steps_20-25.rank_00000.txt",
    ]  # fmt: skip
    text = (tmp_path / "profile/steps_20-25.rank_00000.txt").read_text()
    assert text.startswith("steps 20 to 25, rank 0 of 4 on ") and "6 steps, " in text
    (row,) = [line for line in text.splitlines() if line.endswith("  aten::mm")]
    assert float(row.split()[2]) == 2.0, "a product forwards, one backwards"
    assert "profile: rank 0: steps 20 to 25; " in capfd.readouterr().err


@pytest.mark.parametrize(
    "window, first_step, traced",
    [("1:1", 0, [1]), ("1:3", 0, [2, 3]), ("2:3", 0, [2, 3]), ("20:25", 21, [23, 24, 25]), ("20:25", 24, [25]),
     ("29:40", 0, [29, 30]), ("30:30", 0, [30])],
)  # fmt: skip
def test_a_window_that_the_run_has_only_a_part_of_is_traced_as_far_as_it_has_it(window, first_step, traced, tmp_path):
    run(tmp_path, window, first_step=first_step)
    assert steps_in(tmp_path) == traced


@pytest.mark.parametrize(
    "window, first_step, why", [("31:33", 0, "the run ends at step 30"), ("3:7", 7, "the run goes on from step 7")]
)
def test_a_window_that_the_run_does_not_have_is_told_at_once(window, first_step, why, tmp_path, capfd):
    run(tmp_path, window, first_step=first_step)
    assert f"nothing is traced of train.profile_steps {window}: {why}\n" in capfd.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_a_run_that_is_stopped_within_the_window_keeps_what_was_traced(tmp_path, capfd):
    run(tmp_path, "5:20", stop_at=8)
    assert steps_in(tmp_path) == [5, 6, 7, 8]
    assert "steps 5 to 8, not to 20: the run ended; " in capfd.readouterr().err


def test_a_run_that_is_stopped_before_the_window_leaves_nothing(tmp_path):
    run(tmp_path, "5:20", stop_at=4)
    assert not (tmp_path / "profile").exists()


def test_a_trace_has_a_limit(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(profiling, "MAX_EVENTS", 60)
    run(tmp_path, "5:20")
    traced = steps_in(tmp_path)
    assert traced[0] == 5 and 1 <= len(traced) <= 8
    assert f"steps 5 to {traced[-1]}, not to 20: a trace has at most 60 events; " in capfd.readouterr().err


def test_only_the_ranks_asked_for_write_and_a_rank_that_is_none_is_told(tmp_path, capfd):
    for rank in range(4):
        run(tmp_path, "5:6", rank=rank, profile_ranks=(1, 3, 9))
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        f"steps_5-6.rank_0000{rank}.{kind}" for rank in (1, 3) for kind in ("json.gz", "txt")
    }
    assert capfd.readouterr().err.count("train.profile_ranks has 9: this run has 4 ranks") == 1


def test_files_of_an_earlier_attempt_stay(tmp_path):
    run(tmp_path, "5:6")
    before = {path: path.read_bytes() for path in (tmp_path / "profile").iterdir()}
    run(tmp_path, "5:6")
    assert steps_in(tmp_path, "*-2.json.gz") == [5, 6]
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("num_bytes", [100, 20_000])
def test_a_full_disk_is_told_and_leaves_no_half_trace(num_bytes, tmp_path, capsys):
    """100 bytes: not even the table; 20,000: torch's own writer, which says nothing, is cut off."""
    with no_file_above(num_bytes):
        run(tmp_path, "5:20")
    assert "nothing more is traced, training goes on: OSError: " in capsys.readouterr().err
    left = [path.name for path in (tmp_path / "profile").iterdir()]
    assert left == ([] if num_bytes == 100 else ["steps_5-20.rank_00000.txt"])


def test_a_disk_without_room_for_a_trace_is_not_filled(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(profiling, "_EVENT_BYTES", 10**13)
    run(tmp_path, "5:6")
    assert "are needed" in capfd.readouterr().err
    assert not list((tmp_path / "profile").glob("*.json.gz"))


@pytest.mark.parametrize("method", ["start", "stop", "export_chrome_trace"])
def test_a_tracer_that_fails_is_told_and_the_run_goes_on(method, tmp_path, capfd, monkeypatch):
    def fails(*args: Any) -> None:
        raise RuntimeError("no tracer\nhere")

    monkeypatch.setattr(torch.profiler.profile, method, fails)
    run(tmp_path, "5:6")
    told = capfd.readouterr().err
    assert told.count("nothing more is traced, training goes on: RuntimeError: no tracer here\n") == 1
    assert not list(tmp_path.glob("profile/*.json.gz"))


def test_what_cannot_be_a_folder_is_told(tmp_path, capfd):
    (tmp_path / "profile").write_text("")
    run(tmp_path, "5:6")
    assert "training goes on: FileExistsError" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["5", "0:3", "7:5", "a:b", "5:", "-1:3", "1:2:3", "٣:٤", "1:99999999999"])
def test_a_window_that_is_none_is_refused(text):
    assert "train.profile_steps: want FIRST:LAST" in problem(f"train.profile_steps={text}")


def test_a_window_is_taken_as_typed():
    assert load_recipe("pretrain-nano", ["train.profile_steps=20:25"]).train.profile_steps == "20:25"


class Event(NamedTuple):
    """As the tracer's."""

    of: str
    at: int
    ns: int
    where: str = "DeviceType.CPU"
    id: int = 0
    by: int = 0
    lane: int = 1
    kind: str = ""

    def name(self) -> str:
        return self.of

    def start_ns(self) -> int:
        return self.at

    def duration_ns(self) -> int:
        return self.ns

    def device_type(self) -> str:
        return self.where

    def device_index(self) -> int:
        return 0

    def device_resource_id(self) -> int:
        return self.lane

    def start_thread_id(self) -> int:
        return self.lane

    def correlation_id(self) -> int:
        return self.id

    def linked_correlation_id(self) -> int:
        return self.by

    def is_user_annotation(self) -> bool:
        return self.kind == "mark"

    def is_async(self) -> bool:
        return self.kind == "async"


def test_the_own_time_of_an_operator_is_without_those_in_it_and_lanes_are_apart():
    spans = profile_table.spans_of([
        Event("a", 0, 100), Event("b", 10, 30), Event("c", 20, 5), Event("d", 50, 50), Event("e", 100, 7),
        Event("f", 0, 60, lane=2), Event("mark", 0, 1000, kind="mark"), Event("wait", 0, 1000, kind="async"),
    ])  # fmt: skip
    assert dict(zip([span.name for span in spans], profile_table.self_ns(spans), strict=True)) == {
        "a": 20, "b": 25, "c": 5, "d": 50, "e": 7, "f": 60,
    }  # fmt: skip
    assert profile_table.busy_ns(spans) == 107


def test_kernels_are_told_with_what_launched_them_and_how_busy_the_accelerator_was():
    cuda = "DeviceType.CUDA"
    text = profile_table.table(
        [
            Event("ofa_kernels::norm", 0, 10, id=7), Event("cudaLaunchKernel", 2, 1, id=7),
            Event("aten::mm", 20, 10, id=8), Event("forward_kernel", 100, 400_000, cuda, by=7),
            Event("sm80_xmma_gemm", 100, 600_000, cuda, by=8, lane=2), Event("Memcpy HtoD", 700_000, 200_000, cuda),
        ],
        title="t", num_steps=2, wall_ns=1_000_000,
    )  # fmt: skip
    assert "The accelerator was busy 80.0% of the time." in text
    for row in (
        r"0\.200 +33\.3% +0\.5 +400\.0  forward_kernel of ofa_kernels::norm", r"0\.300 +50\.0% .* matrix product",
        r"0\.200 +33\.3% .* norm", r"0\.100 +16\.7% .* copy", r"0\.300 .* sm80_xmma_gemm of aten::mm",
    ):  # fmt: skip
        assert re.search(f"^ *{row}$", text, re.MULTILINE), row


def test_each_operator_of_our_kernels_is_of_a_kind_that_has_a_name():
    text = "".join(file.read_text() for file in KERNELS.glob("*.py"))
    names = set(re.findall(r'"(ofa_kernels::\w+)"', text)) | {
        f"{each}Backward" for each in re.findall(r"class (_\w+)\(torch.autograd", text)
    }
    kinds = {name: profile_table.kind_of(f"forward_kernel of {name}") for name in names}
    assert len(kinds) >= 8 and set(kinds.values()) == {"attention", "norm", "vocabulary loss"}, kinds

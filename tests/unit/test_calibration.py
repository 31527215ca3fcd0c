"""The file of a machine's measurements: what is written is read, what is not one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ofa_ds.plan.calibration import Calibration, load_calibration

MEASURED = Calibration(
    device="cpu", machine="EPYC, 2 cores", date="2026-11-28", peak_flops=2e11, rates={"matmul": 1.5e11},
    costs={"encoder_layer.256": [1e-3, 2e-6]}, sizes={"process": [5e8]}, errors={"step": 0.08},
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(MEASURED.as_text())
    assert load_calibration(path) == MEASURED


def test_a_newer_measurement_adds_to_an_older_one() -> None:
    newer = Calibration(device="cpu", machine="EPYC, 2 cores", date="2026-11-29", costs={"optimizer": [1e-9]})
    both = MEASURED.merged(newer)
    assert both.costs == {"encoder_layer.256": [1e-3, 2e-6], "optimizer": [1e-9]}
    assert (both.date, both.peak_flops, both.errors) == ("2026-11-29", 2e11, {"step": 0.08})


def test_measurements_of_two_machines_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"calibration of machine 'EPYC, 2 cores', this is 'Xeon'"):
        MEASURED.merged(Calibration(device="cpu", machine="Xeon", date="2026-11-28"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 9, this ofa-ds reads version 1"),
        ({"speed": 1}, "unknown key 'speed'"),
        ({"rates": {"matmul": -1}}, "rates.matmul: want a number of at least 0, got -1"),
        ({"rates": {"matmul": float("nan")}}, "rates.matmul: want a number of at least 0, got nan"),
        ({"costs": {"a": 3}}, "costs.a: want a list of numbers"),
        ({"costs": {"a": ["x"]}}, "costs.a: want a number of at least 0, got x"),
        ({"peak_flops": True}, "peak_flops: want a number"),
        ({"machine": 3}, "machine: want text"),
        ({"sizes": []}, "sizes: want an object"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({**json.loads(MEASURED.as_text()), **change}))
    with pytest.raises(ValueError) as caught:
        load_calibration(path)
    text = str(caught.value)
    assert message in text and str(path) in text and "ofa-ds bench step" in text and "\n" not in text


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_calibration_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cpu.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a calibration") as caught:
        load_calibration(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file or directory; make one with: ofa-ds bench step"):
        load_calibration(tmp_path / "none.json")

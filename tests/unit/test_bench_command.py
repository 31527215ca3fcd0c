"""`ofa-ds bench`: what is wrong is told before anything is measured; a file is made, and added to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ofa_ds.bench import calibrate
from ofa_ds.cli.main import main as ofa_ds
from ofa_ds.plan.calibration import Calibration, load_calibration

OF_A_GPU = Calibration(device="NVIDIA H100", machine="x", date="2026-11-28", sizes={"process": [1.0]})


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that fails says, one line."""
    assert ofa_ds(["bench", *map(str, arguments)]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_wrong_usage_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_a_gpu, no_file = tmp_path / "gpu.json", tmp_path / "none.json"
    of_a_gpu.write_text(OF_A_GPU.as_text())
    assert "there is no directory" in told(capsys, "step", "--output", tmp_path / "no" / "cpu.json")
    assert "has no pieces yet; first: ofa-ds bench step" in told(capsys, "memory", "--output", no_file)
    assert "is of NVIDIA H100" in told(capsys, "memory", "--output", of_a_gpu)
    assert "no such directory" in told(capsys, "io", "--folder", tmp_path / "no", "--output", no_file)
    assert "No such file" in told(capsys, "plan", "--calibration", no_file)
    assert "there are 11, got 12" in told(capsys, "plan", "--calibration", of_a_gpu, "--cases", "1,12")
    (tmp_path / "text").write_text("{}")
    assert "not a calibration" in told(capsys, "step", "--output", tmp_path / "text")


def test_a_measurement_makes_the_file_and_adds_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "IO_BYTES", 1 << 26)
    path = tmp_path / "cpu.json"
    assert ofa_ds(["bench", "io", "--folder", str(tmp_path), "--output", str(path)]) == 0
    made = load_calibration(path)
    assert made.bandwidths.keys() == {"memory", "write", "read"} and min(made.bandwidths.values()) > 0
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "costs": {"optimizer": [1e-9]}}))
    assert ofa_ds(["bench", "io", "--output", str(path)]) == 0
    assert load_calibration(path).costs == {"optimizer": [1e-9]}
    assert str(path) in capsys.readouterr().out


def test_a_file_of_another_machine_is_not_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(calibrate, "IO_BYTES", 1 << 26)
    path = tmp_path / "gpu.json"
    path.write_text(OF_A_GPU.as_text())
    assert "give another file" in told(capsys, "io", "--output", path)

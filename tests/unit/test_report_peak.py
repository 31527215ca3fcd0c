"""MFU is a share of a peak that somebody knows: a data sheet's or a measured one. An unknown device has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from ofa_ds.plan.calibration import Calibration
from ofa_ds.train.report_peak import peak_of

A100, H100, H200 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.mark.parametrize(
    "device, tflops",
    [
        (A100, 312), ("NVIDIA A100-SXM4-40GB", 312), ("A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312), (H100, 989.4), (H200, 989.4),
    ],
)  # fmt: skip
def test_a_known_gpu_has_the_dense_bf16_peak_of_its_data_sheet(device: str, tflops: float) -> None:
    peak = peak_of([device] * 3)
    assert peak.flops == pytest.approx(3 * tflops * 1e12, rel=1e-3)
    assert device in peak.source and "dense bf16" in peak.source and f"{tflops:,.0f} TFLOP/s" in peak.source


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA A10",
        "NVIDIA B200", "NVIDIA GH200 480GB", "AMD Instinct MI300X", "NVIDIA A100X", "cpu", "",
    ],
)  # fmt: skip
def test_an_unknown_device_is_refused_in_one_line_that_says_what_to_do_and_not_guessed(device: str) -> None:
    with pytest.raises(
        ValueError, match="peak.*ofa-ds bench step --output FILE, then train.calibration=FILE"
    ) as caught:
        peak_of([A100, device])
    assert "\n" not in str(caught.value)


def test_ranks_of_two_kinds_have_the_sum_of_their_peaks() -> None:
    assert peak_of([A100, H200, A100]).flops == pytest.approx((2 * 312 + 989.4) * 1e12)


def calibration(place: Path, device: str, peak: float) -> str:
    found = Calibration(device=device, machine="EPYC, 2 cores", date="2026-11-28", peak_flops=peak)
    place.write_text(found.as_text())
    return str(place)


def test_a_measured_peak_counts_for_the_device_that_it_was_measured_on_and_says_where_from(tmp_path: Path) -> None:
    file = calibration(tmp_path / "cpu.json", "cpu", 5e10)
    peak = peak_of(["cpu", "cpu"], file)
    assert peak.flops == 1e11 and file in peak.source and "measured on EPYC, 2 cores on 2026-11-28" in peak.source
    assert peak_of([A100], file).flops == pytest.approx(312e12), "a data sheet's peak is taken where there is one"
    with pytest.raises(ValueError, match="is of 'cpu'"):
        peak_of(["NVIDIA B200"], file)
    with pytest.raises(ValueError, match="has no peak"):
        peak_of(["cpu"], calibration(tmp_path / "none.json", "cpu", 0.0))
    with pytest.raises(ValueError, match="No such file"):
        peak_of(["cpu"], str(tmp_path / "nowhere.json"))

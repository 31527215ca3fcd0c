"""What MFU is a share of: the peak of the devices at hand, and where that figure is from.

What is not known is not guessed: with the peak of another GPU a figure may be wrong by a factor of three. An unknown
device has no MFU, and a line says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ofa_ds.plan.calibration import load_calibration
from ofa_ds.plan.hardware import GPUS, gpu, gpu_of_device

CPU = "cpu"
"""What `Ranks` without a GPU call their device."""


class Peak(NamedTuple):
    flops: float
    """FLOP/s of all ranks' devices together."""
    source: str
    """In words."""


def peak_of(devices: Sequence[str], calibration: str = "") -> Peak:
    """devices: of each rank, the name of its GPU as the driver has it, or `cpu`. calibration: a file of measurements.

    A measured peak counts for the device it was measured on and where the table has none. Raises ValueError, one line:
    a device whose peak nobody knows.
    """
    measured = load_calibration(calibration) if calibration else None
    total, sources = 0.0, []
    for name in dict.fromkeys(devices):
        known = gpu_of_device(name)
        if known is not None:
            each = gpu(known).peak_flops
            what = f"{each / 1e12:,.0f} TFLOP/s, {name} in dense bf16 by its data sheet"
        elif measured is not None and measured.device == name and measured.peak_flops:
            each = measured.peak_flops
            what = (
                f"{each / 1e12:,.3g} TFLOP/s, {name} in {measured.dtype}, measured on {measured.machine} on "
                f"{measured.date} ({calibration})"
            )
        else:
            raise ValueError(_unknown(name, measured.device if measured else None, calibration))
        total += each * list(devices).count(name)
        sources.append(what)
    return Peak(total, "; ".join(sources))


def _unknown(device: str, measured: str | None, calibration: str) -> str:
    what = "a CPU has no rated peak" if device == CPU else f"the peak of {device!r} is not known"
    way_out = "measure it: ofa-ds bench step --output FILE, then train.calibration=FILE"
    if measured is not None:
        way_out = f"{calibration} is of {measured!r} or has no peak; {way_out}"
    known = "" if device == CPU else f" (known are {', '.join(GPUS)})"
    return f"{what}{known}; {way_out}"

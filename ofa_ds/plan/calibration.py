"""What `ofa-ds bench step|memory|io` measured of a machine, in one JSON file: rates, costs and their errors.

Every figure is a measurement of that machine. What is not in a file was not measured there: a plan then takes its own
constant, with a source, or says that it cannot tell.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
MEASUREMENTS = ("rates", "bandwidths", "costs", "sizes", "errors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Measurements of one machine, of one kind of device."""

    device: str
    """`cpu`, or the name of the GPU as torch has it."""
    machine: str
    """Processor and number of cores, or the GPU's host, in words."""
    date: str
    """ISO day of the newest measurement."""
    software: str = ""
    """Versions of what was measured with."""
    dtype: str = "fp32"
    """In which products were measured: `fp32` or `bf16`."""
    peak_flops: float = 0.0
    """FLOP/s of the fastest product found, of one rank (one thread, or one GPU); 0: not measured."""
    rates: dict[str, float] = field(default_factory=dict)
    """Attained FLOP/s of one rank by kind of `plan.flops.ModuleFlops`: matmul, attention, conv, vocabulary."""
    bandwidths: dict[str, float] = field(default_factory=dict)
    """Bytes/s: `memory` (a copy, read and write counted), `write`, `read` (files), `all_reduce.R`, `reduce_scatter.R`,
    `all_gather.R` (payload of R ranks of one host)."""
    costs: dict[str, list[float]] = field(default_factory=dict)
    """Seconds a feature of a piece of the step, `plan.cpu.FEATURES` says which."""
    sizes: dict[str, list[float]] = field(default_factory=dict)
    """Bytes a feature of what a process holds, likewise."""
    errors: dict[str, float] = field(default_factory=dict)
    """Largest relative error of a prediction from this file on what it was checked with: `step`, `memory`; `step.R`,
    `memory.R` on R ranks."""

    def error(self, what: str, default: float) -> float:
        return self.errors.get(what, default)

    def merged(self, newer: Calibration) -> Calibration:
        """This with what `newer` has measured in addition or again. Raises ValueError: of another machine."""
        for name in ("device", "machine", "dtype"):
            old, new = getattr(self, name), getattr(newer, name)
            if old != new:
                raise ValueError(f"calibration of {name} {old!r}, this is {new!r}; give another file")
        both = {name: getattr(self, name) | getattr(newer, name) for name in MEASUREMENTS}
        return dataclasses.replace(newer, peak_flops=newer.peak_flops or self.peak_flops, **both)

    def as_text(self) -> str:
        """The file's text."""
        values = {"version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(values, indent=1, allow_nan=False) + "\n"


def load_calibration(path: str | Path) -> Calibration:
    """Of a file that `ofa-ds bench` wrote. Raises ValueError, one line: no such file, not of this kind or version."""
    again = "make one with: ofa-ds bench step --output FILE"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; {again}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a calibration: not text; {again}") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a calibration: not valid JSON: {error}; {again}") from error
    try:
        return _calibration(values)
    except ValueError as error:
        raise ValueError(f"{path}: not a calibration: {error}; {again}") from error


def _calibration(values: Any) -> Calibration:
    if not isinstance(values, dict) or "version" not in values:
        raise ValueError("want a JSON object with a version")
    version = values.pop("version")
    if version != VERSION:
        raise ValueError(f"version {str(version)[:20]}, this ofa-ds reads version {VERSION}")
    fields = {each.name: each for each in dataclasses.fields(Calibration)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"unknown key {unknown[0][:40]!r}")
    if missing := [name for name in ("device", "machine", "date") if name not in values]:
        raise ValueError(f"no {missing[0]}")
    for name, value in values.items():
        _check(name, value)
    return Calibration(**values)


def _check(name: str, value: Any) -> None:
    if name == "peak_flops":
        _number(name, value)
    elif name in MEASUREMENTS:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: want an object")
        for key, each in value.items():
            if name not in ("costs", "sizes"):
                _number(f"{name}.{key}", each)
            elif not isinstance(each, list):
                raise ValueError(f"{name}.{key}: want a list of numbers")
            else:
                for number in each:
                    _number(f"{name}.{key}", number)
    elif not isinstance(value, str):
        raise ValueError(f"{name}: want text")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: want a number of at least 0, got {str(value)[:40]}")

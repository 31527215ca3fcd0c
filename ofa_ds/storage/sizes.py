"""Sizes as people read them."""

from __future__ import annotations

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def size_text(num_bytes: float) -> str:
    """Three digits and a decimal unit: `17 bytes`, `4.10 kB`, `25.0 GB`. Never 0 where there is something."""
    value, unit = float(num_bytes), 0
    while abs(value) >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if not unit:
        return f"{round(value)} {_UNITS[unit]}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {_UNITS[unit]}"

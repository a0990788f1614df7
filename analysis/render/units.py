"""Numbers as people read them. Every function gives an empty text for a missing value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

MIB, GIB = 2**20, 2**30


def is_missing(value: Any) -> bool:
    """None, NaN or pandas' NA."""
    if value is None or isinstance(value, str | list | dict):
        return value is None
    return type(value).__name__ in ("NAType", "NaTType") or bool(np.isnan(value))


def decimals(value: float, digits: int = 3) -> int:
    """Digits after the point that show `digits` significant ones."""
    if value == 0:
        return 0
    rounded = float(f"{abs(value):.{digits - 1}e}")  # 9.996 has the decimals of 10.0
    return max(0, digits - 1 - math.floor(math.log10(rounded)))


def number(value: Any, digits: int = 3) -> str:
    """Three significant digits; whole numbers from 100 on, with separators; tiny ones with an exponent."""
    if is_missing(value):
        return ""
    value = float(value)
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:,.{decimals(value, digits)}f}"


def size(value: Any) -> str:
    """Bytes as MiB or GiB."""
    if is_missing(value):
        return ""
    value = float(value)
    if value >= GIB:
        return f"{value / GIB:,.{min(2, decimals(value / GIB))}f} GiB"
    return f"{value / MIB:.{min(1, decimals(value / MIB))}f} MiB"


def with_interval(value: Any, lo: Any, hi: Any) -> str:
    """`12.3 +- 0.2`; the half-width has the decimals of the value, or one digit when it would vanish.

    One that is wider than the value itself says only that nothing is known: `12.3 +- over 100 %`.
    """
    if is_missing(value):
        return ""
    if is_missing(lo) or is_missing(hi):
        return number(value)
    places, half = decimals(float(value)), (float(hi) - float(lo)) / 2
    return f"{number(value)} +- {_half_width(half, float(value), places)}"


def _half_width(half: float, value: float, places: int) -> str:
    if half > abs(value):
        return "over 100 %"
    if half and round(half, places) == 0 and decimals(half, 1) <= 4:
        places = decimals(half, 1)
    return f"{half:,.{places}f}"


def ratio(value: Any, lo: Any = None, hi: Any = None) -> str:
    """`1.31x +- 0.02`."""
    if is_missing(value):
        return ""
    places = 2 if float(value) < 10 else 1
    text = f"{float(value):.{places}f}x"
    if is_missing(lo) or is_missing(hi):
        return text
    return f"{text} +- {_half_width((float(hi) - float(lo)) / 2, float(value), places)}"


def percent(value: Any) -> str:
    """A fraction in percent."""
    return "" if is_missing(value) else f"{100 * float(value):.{1 if abs(value) < 0.1 else 0}f} %"

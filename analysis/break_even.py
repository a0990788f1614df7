"""When does compilation pay? The calls after which the seconds in the compiler are won back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from analysis.compared import CALL
from analysis.frames import column, numbers
from analysis.pair import KEY
from tasks.cell import BASELINE
from tasks.row import Outcome

if TYPE_CHECKING:
    import pandas as pd

COLD = "cold"  # of `compile_cache`
FAMILY = "compile"  # the techniques whose partner is the same stack without them


def break_even_calls(compile_s: float, partner_ms: float, compiled_ms: float) -> float | None:
    """Seconds in the compiler over those saved per call against the uncompiled partner; None where none are saved.

    For a decode cell a call is a step of the whole batch: one token for each of its sequences.
    """
    saved_s = (partner_ms - compiled_ms) / 1e3
    if not all(map(math.isfinite, (compile_s, saved_s))) or saved_s <= 0 or compile_s < 0:
        return None
    return compile_s / saved_s


def uncompiled(stack: str) -> str | None:
    """The stack's text without its compile technique; None if it has none."""
    parts = stack.split("+")
    rest = [part for part in parts if part.partition(":")[0] != FAMILY]
    return None if len(rest) == len(parts) else "+".join(rest) or BASELINE


def with_break_even(table: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """`table` (a line per cell with its `call_ms`) with `cold_compile_s` and `break_even_calls`.

    The compiler's seconds are those of the slowest measured round that began with an empty cache: others find what it
    left there, and where it is missing nobody knows what compiling costs. The partner is the same stack without
    compilation in the same model, workload point and hardware; both by the time that the speed-up compares, so that the
    two columns speak of the same thing. Where the ratios to the baseline, if the table has them, say that the partner
    is not slower, nothing is won back.
    """
    table = table.copy()
    ok = (frame["outcome"] == Outcome.OK).fillna(False).astype(bool)
    cold = (column(frame, "compile_cache") == COLD).fillna(False).astype(bool)
    measured = frame[ok & cold & (numbers(frame, "graphs_compiled") > 0)]
    slowest = numbers(measured, "compile_s").groupby([measured[name] for name in KEY]).max()
    keys = list(zip(*(table[name] for name in KEY), strict=True))
    table["cold_compile_s"] = [float(slowest.get(key, math.nan)) for key in keys]
    places = list(zip(table["result_dir"], table["model"], table["workload_point"], table["hardware"], strict=True))
    call_ms = [float(value) for value in numbers(table, CALL)]
    known = dict(zip(zip(places, table["optimization"], strict=True), call_ms, strict=True))
    ratio = [float(value) for value in numbers(table, "ratio").mask(table["is_baseline"], 1.0)]
    ratios = dict(zip(zip(places, table["optimization"], strict=True), ratio, strict=True))
    calls = []
    for place, stack, seconds, own, own_ratio in zip(
        places, table["optimization"], table["cold_compile_s"], call_ms, ratio, strict=True
    ):
        partner = (place, uncompiled(str(stack)))
        slower = own_ratio >= ratios.get(partner, math.nan)
        calls.append(math.nan if slower else _calls(seconds, known.get(partner, math.nan), own))
    table["break_even_calls"] = calls
    return table


def _calls(compile_s: float, partner_ms: float, compiled_ms: float) -> float:
    found = break_even_calls(compile_s, partner_ms, compiled_ms)
    return math.nan if found is None else found

"""Each rung of a ladder against the one before it, and why one that should be faster is not.

A ladder is a sweep whose stacks, in the order in which it names them, each add one thing. Whether a technique pays is
a question to the rung below, not to the baseline; and where a rung is slower, its rows often say why.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from analysis.compared import GROWN_NOTE, POINT, compared, decodes, grown, interval, present, with_compared_time
from analysis.frames import numbers, records
from analysis.host_clock import COMPARED, WAITED
from analysis.pair import KEY
from analysis.table import Field, Table
from analysis.verdicts import NO_PAIR, verdicts
from tasks.row import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    _Line = dict[str, Any]

SECTION = ["result_dir", "model", "workload_point", "hardware"]
SAVED = 0.05  # share of its memory that a rung must save before speed counts as its price
_REFERENCE = " as the rung before"
APART = "never measured in one block with the rung before"
NO_INTERVAL = "1 round: no interval"
# Codes of reasons, in the order in which they are looked for; the first two end the search.
NOISE, MARGIN, DOUBT, MEMORY, HOST, UNEXPLAINED = "noise", "margin", "doubtful", "memory", "host", "unexplained"
LEGEND = (
    "speed-up: over the rung before, the last one measured in the order of the sweep; of the time that the comparison "
    "compares, from pairs within blocks, +- its 95 % interval over rounds; change: of memory and of what is reserved, "
    "against the same rung."
)
LEGEND_STEP = "step ms when decoding: of a step of the batch, one token for each of its sequences."
LEGEND_WHY = (
    "slower because: noise, the interval covers 1; margin, the difference is within the margin; doubtful, its rows are "
    f"flagged; memory, it saves {SAVED:.0%} or more of it; host, it waits for its launches; unexplained, none of these."
)


def ladder(frame: pd.DataFrame, floor: float | Mapping[str, float] = 0.0) -> pd.DataFrame:
    """One line per rung, sections (model, workload point, hardware) and stacks in the order of the sweep.

    A plan has baselines first; where it also says in which order the sweep names the stacks (`rung`), that counts,
    since the naive rung may be below what all are compared with.

    Columns, beside identity, `outcome`, `call_ms`, `memory_bytes` and `peak_reserved_bytes`:
        before: the stack of the rung that it is compared with, null for the first that was measured
        ratio, ratio_lo, ratio_hi: compared time over that rung's, from pairs within blocks, 95 % interval
        speedup, speedup_lo, speedup_hi: the same the other way round
        memory_change, reserved_change: of the peaks, as a fraction; below 0 is saved
        inversion: slower than the rung before
        why, reason: for inversions, codes (`noise`, `memory`, ...) joined by commas, and sentences
        doubt: for the others, why there is no verdict on them; failed: why a rung has no numbers

    Args:
        frame: rows as `load` gives them.
        floor: what the machine shows between equals, as for `verdicts`.
    """
    rows = with_compared_time(frame)
    table = compared(rows, COMPARED, None, floor)
    table = table.drop(columns=["ratio", "lo", "hi", "barred", "equivalent"])
    table["_section"] = table.groupby(SECTION, sort=False, dropna=False).ngroup()
    table["_rung"], table["_planned"] = numbers(table, "rung"), numbers(table, "plan_order")
    table = table.sort_values(["_section", "_rung", "_planned"], kind="stable", ignore_index=True)
    lines = records(table)
    before = _rungs_before(lines)
    steps = [(line, lower) for line, lower in zip(lines, before, strict=True) if lower]
    judged = _against(rows, steps, floor) if steps else {}
    compared_lines = [
        _compared(line, lower, judged.get((line["result_dir"], line["cell_id"]), {})) if lower else _first()
        for line, lower in zip(lines, before, strict=True)
    ]
    table["failed"] = table["reason"]  # why it has no numbers; `reason` is why it is slower
    for name in _first():
        table[name] = [line[name] for line in compared_lines]
    table["is_first"] = [lower is None and line["rounds_ok"] > 0 for line, lower in zip(lines, before, strict=True)]
    return table.drop(columns=["_section", "_rung", "_planned"])


def ladder_table(frame: pd.DataFrame, floor: float | Mapping[str, float] = 0.0) -> Table:
    """The ladder with its inversions and their reasons."""
    table = ladder(frame, floor)
    table["notes"] = [_notes(line) for line in records(table)]
    order = [
        "model", "workload_point", POINT, "hardware", "optimization", "outcome", "rounds_ok", "before", "call_ms",
        *interval("ratio"), *interval("speedup"), "memory_bytes", "memory_change", "peak_reserved_bytes",
        "reserved_change", "inversion", "why", "reason", "is_first", "notes", *KEY,
    ]  # fmt: skip
    any_decodes = bool(decodes(table).any())
    table = table[[name for name in order if name in table]]
    fields = [
        Field(header="rung", form="text", sources=("optimization",)),
        Field(header="step ms" if any_decodes else "ms", form="number", sources=("call_ms",), word="outcome"),
        Field(header="speed-up", form="ratio", sources=(*interval("speedup"), "is_first")),
        Field(header="memory", form="bytes", sources=("memory_bytes",), rank=1),
        Field(header="change", form="percent", sources=("memory_change",), rank=2),
        Field(header="reserved", form="bytes", sources=("peak_reserved_bytes",), rank=3),
        Field(header="its change", form="percent", sources=("reserved_change",), rank=4),
        Field(header="slower because", form="text", sources=("why",)),
    ]
    return Table(
        title="Ladder",
        frame=table,
        fields=present(table, fields),
        sections=("model", POINT, "hardware"),
        notes="notes",
        footnotes=(_summary(table), LEGEND, *((LEGEND_STEP,) if any_decodes else ()), LEGEND_WHY),
    )


def _rungs_before(lines: list[_Line]) -> list[_Line | None]:
    """For each line the last measured one before it in its section: a rung that did not run is no step to stand on."""
    found: list[_Line | None] = []
    last: dict[Any, _Line] = {}
    for line in lines:
        found.append(last.get(line["_section"]))
        if line["rounds_ok"] > 0:
            last[line["_section"]] = line
    return found


def _against(
    rows: pd.DataFrame, steps: list[tuple[_Line, _Line]], floor: float | Mapping[str, float]
) -> dict[tuple[str, str], _Line]:
    """Verdicts of the compared time with the rung before in the place of the baseline.

    Baselines are their own, so that a rung which is both compared and compared with stands there twice, as two cells.
    Two neighbouring steps share a rung as comparisons of a group share their baseline: the same correlation of the
    differences but for its sign, and so the same variances.
    """
    import pandas as pd

    lower = {(line["result_dir"], line["cell_id"]): before["cell_id"] + _REFERENCE for line, before in steps}
    keys = list(zip(rows["result_dir"], rows["cell_id"], strict=True))
    upper = rows.assign(baseline_id=[lower.get(key, "") for key in keys])[[key in lower for key in keys]]
    stood_on = {(before["result_dir"], before["cell_id"]) for _, before in steps}
    references = rows[[key in stood_on for key in keys]]
    names = references["cell_id"] + _REFERENCE
    both = pd.concat([upper, references.assign(cell_id=names, baseline_id=names)], ignore_index=True)
    judged = verdicts(both, COMPARED, floor)
    judged["equivalent"] = judged["equivalent"].fillna(False).astype(bool)
    return {(line["result_dir"], line["cell_id"]): line for line in records(judged)}


def _first() -> _Line:
    names = (*interval("ratio"), *interval("speedup"), "memory_change", "reserved_change")
    return {"before": None, **dict.fromkeys(names, math.nan), "inversion": False, "why": "", "reason": "", "doubt": ""}


def _compared(line: _Line, before: _Line, judged: _Line) -> _Line:
    """What a rung is against the one before it; without pairs the medians must do."""
    ratio, lo, hi = (judged.get(name, math.nan) for name in ("ratio", "lo", "hi"))
    if math.isnan(ratio):
        ratio = line["call_ms"] / before["call_ms"]
    memory, reserved = (_change(line, before, name) for name in ("memory_bytes", "peak_reserved_bytes"))
    found = {
        **_first(), "before": before["optimization"], "ratio": ratio, "ratio_lo": lo, "ratio_hi": hi,
        "speedup": 1 / ratio, "speedup_lo": 1 / hi, "speedup_hi": 1 / lo, "memory_change": memory,
        "reserved_change": reserved, "inversion": ratio > 1,
    }  # fmt: skip
    reasons = _reasons(found, judged, _waits(line), _waits(before)) if ratio > 1 else {}
    if line["rounds_ok"] and not ratio > 1:
        found["doubt"] = ", ".join(_reworded(reason) for reason in judged.get("barred") or [])
    return {**found, "why": ", ".join(reasons), "reason": "; ".join(reasons.values())}


def _reasons(rung: _Line, judged: _Line, waits: bool, before_waits: bool) -> dict[str, str]:
    """Code -> sentence of why a rung is slower, from what its rows and those of the rung before say."""
    if rung["ratio_lo"] <= 1 <= rung["ratio_hi"]:
        return {NOISE: "within noise: the interval covers 1"}
    if judged.get("equivalent"):
        return {MARGIN: "within the margin: too little to matter"}
    found = {}
    barred = [_reworded(reason) for reason in judged.get("barred") or []]
    if doubts := [reason for reason in barred if reason != NO_INTERVAL]:
        found[DOUBT] = f"doubtful: {', '.join(doubts)}"
    changes = {"peak": rung["memory_change"], "reserved": rung["reserved_change"]}
    saved = [f"{name} {change:.0%}" for name, change in changes.items() if change <= -SAVED]
    if saved and not any(change >= SAVED for change in changes.values()):
        found[MEMORY] = f"trades speed for memory: {', '.join(saved)}"
    if waits and before_waits:
        found[HOST] = "both wait for the host: it adds launches, or saves device work that nobody waits for"
    elif waits:
        found[HOST] = "waits for the host, which the rung before does not: it adds launches"
    if not found:
        found[UNEXPLAINED] = "unexplained: nothing in its rows says why"
    if NO_INTERVAL in barred:
        last = next(reversed(found))
        found[last] += " (1 round has no interval: it may be noise)"
    return found


def _reworded(barred: str) -> str:
    """Why there is no verdict, of a rung in the place of the baseline."""
    return APART if barred.startswith(NO_PAIR) else barred.replace("baseline", "rung before")


def _waits(line: _Line) -> bool:
    """Whether the device waited for its launches in more than half of the measured rounds."""
    return bool((line["flags"] or {}).get(WAITED, 0) > line["rounds_ok"] / 2)


def _change(line: _Line, before: _Line, name: str) -> float:
    """NaN where one has the peak of its tensors, and the other the growth of its process."""
    if grown(line) != grown(before):
        return math.nan
    return float(line[name] / before[name] - 1) if before[name] else math.nan


def _notes(line: _Line) -> list[str]:
    found = [line["reason"]] if line["reason"] else []
    if grown(line):
        found.append(GROWN_NOTE)
    if line["outcome"] != Outcome.OK:
        failed = (line.get("outcomes") or {}).get(line["outcome"], line["rounds"])
        found.append(f"{line['outcome']} in {failed} of {line['rounds']} rounds: {line['failed'] or 'no reason given'}")
    if line["doubt"]:
        found.append(f"no verdict: {line['doubt']}")
    return found


def _summary(table: pd.DataFrame) -> str:
    steps = int((table["before"].notna() & (table["rounds_ok"] > 0)).sum())
    slower = table.loc[table["inversion"].astype(bool), "why"]
    if slower.empty:
        return f"None of {steps} rungs is slower than the one before it."
    counts = slower.value_counts()
    kinds = "; ".join(f"{count} {why}" for why, count in counts.items())
    return f"{len(slower)} of {steps} rungs are slower than the one before: {kinds}."

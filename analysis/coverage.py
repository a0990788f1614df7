"""What became of the plan: every planned cell counted once, and how much of the time was measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.frames import column, numbers, records
from analysis.pair import cells
from tasks.row import Outcome

if TYPE_CHECKING:
    import pandas as pd

# `incomplete`: measured, but not in all planned rounds yet. `missing`: no row at all.
INCOMPLETE, MISSING = "incomplete", "missing"
ORDER = (
    Outcome.OK, Outcome.OOM, Outcome.UNSUPPORTED, Outcome.INVALID, Outcome.TIMEOUT, Outcome.ERROR, Outcome.CRASHED,
    Outcome.UNPLACED, INCOMPLETE, MISSING,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Cells per outcome, and shares of wall time (0 to 1, None where no row has times).

    `measuring_share` is warm-up and measuring over all wall time; `measuring_share_after_load` leaves loading and
    compiling out of the wall time. `missing` are the cell_ids without a row.
    """

    planned: int
    counts: dict[str, int]
    missing: tuple[str, ...]
    wall_s: float
    measuring_share: float | None
    measuring_share_after_load: float | None

    def line(self) -> str:
        """`12 planned: 9 ok, 2 oom, 1 missing`."""
        parts = [f"{self.counts[name]} {name}" for name in map(str, ORDER) if self.counts.get(name)]
        return f"{self.planned} planned: {', '.join(parts) or 'none run'}"

    def time_line(self) -> str | None:
        """How much of the sweep was measuring, None without times."""
        if self.measuring_share is None:
            return None
        text = f"{_duration(self.wall_s)} in cells, {self.measuring_share:.0%} of it warm-up and measuring"
        if self.measuring_share_after_load is None:
            return text
        return f"{text} ({self.measuring_share_after_load:.0%} of what is left without load and compile)"


def coverage(frame: pd.DataFrame, plan: pd.DataFrame | None = None) -> Coverage:
    """Count the plan's cells; without a plan, those that have rows (of several folders, each folder's own).

    Args:
        frame: rows as `load` gives them.
        plan: as `load_plan` gives it, of the same, single result folder.
    """
    summaries = records(cells(frame)) if len(frame) else []
    if plan is None:
        found = {(row["result_dir"], row["cell_id"]): row for row in summaries}
        rounds: dict[tuple[str, str], int | None] = dict.fromkeys(found)
    else:
        found = {("", row["cell_id"]): row for row in summaries}
        planned_rounds = column(plan, "rounds").astype("object")
        planned_rounds = planned_rounds.where(planned_rounds.notna(), None)
        rounds = {("", cell): number for cell, number in zip(plan["cell_id"], planned_rounds, strict=True)}
    counts: dict[str, int] = {}
    missing = []
    for key, expected in rounds.items():
        row = found.get(key)
        if row is None:
            name = MISSING
            missing.append(key[1])
        else:
            name = str(row["outcome"])
            if name == Outcome.OK and expected is not None and row["rounds_ok"] < expected:
                name = INCOMPLETE
        counts[name] = counts.get(name, 0) + 1
    wall, measuring, preparing = _seconds(frame)
    rest = wall - preparing
    return Coverage(
        planned=len(rounds),
        counts=counts,
        missing=tuple(missing),
        wall_s=wall,
        measuring_share=measuring / wall if wall > 0 else None,
        measuring_share_after_load=measuring / rest if rest > 0 else None,
    )


def _seconds(frame: pd.DataFrame) -> tuple[float, float, float]:
    """Wall, warm-up and measuring, load and compile, of the rows that have a wall time."""
    timed = frame[numbers(frame, "wall_s").notna()]

    def total(*names: str) -> float:
        return float(sum(numbers(timed, name).sum() for name in names))

    return total("wall_s"), total("measure_s", "warmup_s"), total("load_s", "compile_s")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

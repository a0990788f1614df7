"""What further tokens of a prompt cost: bytes of cache and memory, and time of a decode step, as a line over lengths.

A KV cache makes a step cost what reading the cache costs, so that both grow in proportion to the length; the slope is
the figure, and how far the lengths lie off the line says how much it is worth.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from analysis.compared import CALL, compared, grown, present, with_compared_time, without_axes
from analysis.errors import AnalysisError
from analysis.frames import numbers, records
from analysis.host_clock import COMPARED, WAITED
from analysis.pair import BARRING_FLAGS, KEY
from analysis.table import Field, Table
from tasks.row import Outcome
from tasks.statistics import t_interval

if TYPE_CHECKING:
    import pandas as pd

    _Line = dict[str, Any]
    _Points = list[tuple[float, float]]

SECTION = ["result_dir", "model", "workload_point", "hardware"]
LEGEND = (
    "per further token of a sequence's prompt, by least squares over the lengths; KV cache as stored, memory at its "
    "peak, which holds the prompt's own pass. ms: of a step of the batch, one token for each of its sequences, from "
    "requests that run through; +-: 95 % interval over rounds, one line each. off the line: the greatest distance of a "
    "length's step from it, of three or more."
)


def slope(points: _Points) -> tuple[float, float] | None:
    """Slope and intercept of the least-squares line through (x, y), None below two different x."""
    known = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len({x for x, _ in known}) < 2:
        return None
    middle_x, middle_y = (sum(values) / len(known) for values in zip(*known, strict=True))
    spread = sum((x - middle_x) ** 2 for x, _ in known)
    found = sum((x - middle_x) * (y - middle_y) for x, y in known) / spread
    return found, middle_y - found * middle_x


def growth(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per stack of each model, decode workload (but for its prompt's length) and hardware.

    Columns, beside identity (`workload_point` without `prompt_tokens`):
        lengths, shortest, longest: prompts that were measured, and their tokens
        kv_bytes_per_token, memory_bytes_per_token: slope of `kv_cache_bytes` and of peak memory, per sequence
        ms_per_1000_tokens, _lo, _hi: slope of the medians of `call_ms`, with the half-width that a t-interval has over
            the slopes of rounds that measured every length; null where fewer than two did
        call_ms_shortest, call_ms_longest: at the ends
        off_line: greatest distance of a length's `call_ms` from the line, as a fraction of it; null for two lengths

    Slopes are null for a stack that was measured at one length.
    """
    import pandas as pd

    rows = with_compared_time(frame)
    table = compared(rows, COMPARED, None, 0.0)
    table = table[(table["workload"] == "decode").fillna(False).astype(bool)].copy()
    table["tokens"], table["batch"] = numbers(table, "sequence_length"), numbers(table, "batch_size")
    table["workload_point"] = [without_axes(str(point), "prompt_tokens") for point in table["workload_point"]]
    by_round = _by_round(rows)
    groups = table.groupby([*SECTION, "optimization"], sort=False, dropna=False)
    return pd.DataFrame([_line(records(part), by_round) for _, part in groups], columns=_COLUMNS)


def growth_table(frame: pd.DataFrame) -> Table:
    """The slopes as a table.

    Raises:
        AnalysisError: no stack was measured at two lengths.
    """
    table = growth(frame)
    if not (table["lengths"] >= 2).any():
        raise AnalysisError("growth needs a decode stack that was measured at two or more prompt_tokens; there is none")
    fields = [
        Field(header="optimization", form="text", sources=("optimization",)),
        Field(header="prompts", form="text", sources=("prompts",)),
        Field(header="KV B/token", form="number", sources=("kv_bytes_per_token",)),
        Field(header="memory B/token", form="number", sources=("memory_bytes_per_token",)),
        Field(header="ms/1,000 tokens", form="interval", sources=_MS),
        Field(header="step ms, shortest", form="number", sources=("call_ms_shortest",)),
        Field(header="longest", form="number", sources=("call_ms_longest",)),
        Field(header="off the line", form="percent", sources=("off_line",)),
    ]
    return Table(
        title="Growth with the length of the prompt",
        frame=table,
        fields=present(table, fields),
        sections=("model", "workload_point", "hardware"),
        notes="notes",
        footnotes=(LEGEND,),
    )


_MS = ("ms_per_1000_tokens", "ms_per_1000_tokens_lo", "ms_per_1000_tokens_hi")
_COLUMNS = [
    "model", "workload_point", "hardware", "optimization", "batch_size", "lengths", "shortest", "longest", "prompts",
    "kv_bytes_per_token", "memory_bytes_per_token", *_MS, "call_ms_shortest", "call_ms_longest", "off_line", "notes",
    "result_dir",
]  # fmt: skip


def _by_round(rows: pd.DataFrame) -> dict[tuple[str, str], dict[int, float]]:
    """(result_dir, cell_id) -> round -> `call_ms` of the rows that are ok."""
    ok = rows[(rows["outcome"] == Outcome.OK).fillna(False).astype(bool)]
    found: dict[tuple[str, str], dict[int, float]] = {}
    for directory, cell_id, round_, value in zip(*(ok[name] for name in (*KEY, "round", CALL)), strict=True):
        found.setdefault((directory, cell_id), {})[int(round_)] = float(value)
    return found


def _line(cells: list[_Line], by_round: dict[tuple[str, str], dict[int, float]]) -> _Line:
    """One stack at all its lengths, `cells` being one of each."""
    measured = sorted((cell for cell in cells if cell["rounds_ok"] > 0), key=lambda cell: cell["tokens"])
    line = {name: cells[0][name] for name in (*SECTION, "optimization")} | {"batch_size": cells[0]["batch"]}
    line |= {"lengths": len(measured), "notes": _notes(cells, measured)}
    if not measured:
        return line
    ends = measured[0], measured[-1]
    line |= {"shortest": ends[0]["tokens"], "longest": ends[1]["tokens"]}
    line |= {"call_ms_shortest": ends[0][CALL], "call_ms_longest": ends[1][CALL]}
    line["prompts"] = ", ".join(f"{cell['tokens']:.0f}" for cell in measured)
    for name, source in (("kv_bytes_per_token", "kv_cache_bytes"), ("memory_bytes_per_token", "memory_bytes")):
        found = slope([(cell["tokens"], cell[source] / cell["batch"]) for cell in measured])
        line[name] = found[0] if found else math.nan
    if any(grown(cell) for cell in measured):  # by blocks of its arenas, not by tokens
        line["memory_bytes_per_token"] = math.nan
    half_width = _half_width(measured, by_round)
    if len(measured) > 1 and math.isnan(half_width):
        line["notes"].append("no interval: fewer than two rounds measured every length")
    return line | _time([(cell["tokens"], cell[CALL]) for cell in measured], half_width)


def _time(points: _Points, half_width: float) -> _Line:
    found = slope(points)
    if found is None:
        return {}
    rise = 1e3 * found[0]
    distances = [abs(y - found[0] * x - found[1]) / y for x, y in points]
    values = rise, rise - half_width, rise + half_width
    return dict(zip(_MS, values, strict=True)) | {"off_line": max(distances) if len(points) > 2 else math.nan}


def _half_width(measured: list[_Line], by_round: dict[tuple[str, str], dict[int, float]]) -> float:
    """Of the interval over rounds that measured every length, in ms per 1,000 tokens; NaN below two of them."""
    rounds = [by_round.get((cell["result_dir"], cell["cell_id"]), {}) for cell in measured]
    shared = sorted(set(rounds[0]).intersection(*rounds))
    lengths = [cell["tokens"] for cell in measured]
    lines = [slope(list(zip(lengths, (found[number] for found in rounds), strict=True))) for number in shared]
    slopes = [1e3 * found[0] for found in lines if found]
    interval = t_interval(slopes) if slopes else None
    return math.nan if interval is None else interval.half_width


def _doubts(cell: _Line) -> frozenset[str]:
    """Flags of a cell's rows that would bar a verdict."""
    return (BARRING_FLAGS | {"not_steady"}) & set(cell["flags"] or {})


def _notes(cells: list[_Line], measured: list[_Line]) -> list[str]:
    found = [f"{cell['outcome']} at {cell['tokens']:.0f} tokens" for cell in cells if cell["outcome"] != Outcome.OK]
    if len(measured) == 1:
        found.append("measured at one length: no slope")
    if len(measured) > 1 and (doubts := sorted({doubt for cell in measured for doubt in _doubts(cell)})):
        found.append(f"doubtful: {', '.join(doubts)} in some of its rounds")
    waiting = [cell for cell in measured if (cell["flags"] or {}).get(WAITED, 0) > cell["rounds_ok"] / 2]
    if len(measured) > 1 and waiting:
        at = ", ".join(f"{cell['tokens']:.0f}" for cell in waiting)
        found.append(f"waits for the host at {at} tokens: there its time does not follow the length")
    return found

"""Raw numbers, one line per row; lists joined by `; `; missing values empty."""

from __future__ import annotations

from analysis.table import Table


def to_csv(table: Table) -> str:
    """The table's frame as CSV with a header line."""
    frame = table.frame.copy()
    for name in frame.columns[frame.dtypes == "object"]:
        frame[name] = [("; ".join(map(str, value)) if isinstance(value, list) else value) for value in frame[name]]
    return str(frame.to_csv(index=False, lineterminator="\n"))

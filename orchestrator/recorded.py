"""What the journal holds of each run, as much of it as is asked while a sweep runs."""

from __future__ import annotations

from typing import Any

from orchestrator.store import Records
from tasks.row import Outcome

_KEPT = ("cell_id", "group_id", "round", "block_id", "outcome", "result_key", "run_id", "quality_reference")


class Recorded:
    """Rows by what the ledger asks of them, some 600 bytes each: reading the journal for every lost slot costs more."""

    def __init__(self, records: Records) -> None:
        self.records: list[dict[str, Any]] = []  # as `ledger.decide` takes them
        self._newest: dict[str, tuple[int, str]] = {}
        for record in records:
            if record.get("kind") == "row":
                self.add(record["row"])
            elif record.get("kind") == "run":
                self.records.append(record)

    def add(self, row: dict[str, Any]) -> None:
        self.records.append({"kind": "row", "row": {name: row[name] for name in _KEPT if row.get(name) is not None}})
        known = self._newest.get(row["cell_id"], (-1, ""))
        self._newest[row["cell_id"]] = (max(known[0], row["round"]), str(row["outcome"]))

    def next_round(self, cell_id: str) -> int:
        return self._newest[cell_id][0] + 1 if cell_id in self._newest else 0

    def outcome(self, cell_id: str) -> str | None:
        """Of the row that was written last."""
        return self._newest[cell_id][1] if cell_id in self._newest else None

    def needs(self, cell_id: str, outcome: Outcome) -> bool:
        """Whether a cell that is not run gets a row that says so.

        One that was measured once is not unplaced for want of that machine, but it can become unsupported.
        """
        newest = self.outcome(cell_id)
        return newest is None or (newest != outcome and (outcome == Outcome.UNSUPPORTED or newest == Outcome.UNPLACED))

"""What `status` says is left."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from orchestrator.show import _seconds_left


def test_an_unsupported_run_stands_for_all_its_rounds(tmp_path: Path) -> None:
    rows = [
        ("good", 0, "ok", 4.0), ("good", 1, "ok", 6.0), ("never", 0, "unsupported", 5.0), ("later", 0, "ok", 5.0),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["cell_id", "round", "outcome", "wall_s"]).assign(hardware="cpu")
    plan = {"cell_id": ["good", "never", "later", "else"], "rounds": [2, 2, 2, 2], "hardware": "cpu"}
    decisions = ["run", "run", "run", "unsupported"]
    pd.DataFrame(plan).assign(decision=decisions).to_parquet(tmp_path / "plan.parquet")
    assert _seconds_left(str(tmp_path), frame) == {"cpu": 5.0}
    assert _seconds_left(str(tmp_path), frame[frame["cell_id"] != "later"]) == {"cpu": 10.0}

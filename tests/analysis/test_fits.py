"""The card that a training cell fits on, from bytes made up by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pandas as pd
import pytest

from analysis import comparison_table, render
from analysis.fits import LEGEND, fits, needed_bytes

GB = 10**9
MEASURED = {
    "optimizer_state_bytes": 1.0, "peak_allocated_bytes": 6.5 * GB, "peak_reserved_bytes": 7.0 * GB,
    "non_torch_bytes": 0.5 * GB,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "card"),
    [
        ({}, "8 GB"),
        ({"peak_reserved_bytes": 7.6 * GB}, "8-16 GB"),
        ({"peak_allocated_bytes": 7.55 * GB, "peak_reserved_bytes": 7.6 * GB}, "16 GB"),
        # the H200's row of bf16+checkpointing: free blocks that the allocator gives back are no need
        (
            {"peak_allocated_bytes": 23.28 * GB, "peak_reserved_bytes": 25.56 * GB, "non_torch_bytes": 0.79 * GB},
            "48 GB",
        ),
        ({"peak_allocated_bytes": 23.0 * GB, "peak_reserved_bytes": 25.56 * GB}, "24-48 GB"),
        ({"peak_allocated_bytes_load": 20.0 * GB}, "24 GB"),
        ({"peak_allocated_bytes_warmup": 24.0 * GB}, "48 GB"),
        ({"non_torch_bytes": 40.0 * GB}, "48 GB"),
        # managed memory that the driver counts as the process's
        ({"non_torch_bytes": 40.0 * GB, "optimizer_paged_bytes": 39.5 * GB}, "8 GB"),
        ({"optimizer_paged_bytes": 39.5 * GB}, "8 GB"),
        ({"peak_reserved_bytes": 150.0 * GB}, "at least 8 GB"),
        ({"peak_allocated_bytes": 150.0 * GB, "peak_reserved_bytes": 150.0 * GB}, ""),
        ({"peak_reserved_bytes": None, "peak_allocated_bytes": None}, ""),
        ({"optimizer_state_bytes": None}, ""),
        ({"non_torch_bytes": None}, "at least 8 GB"),  # a container hides what the process takes
    ],
)
def test_smallest_card(changes: dict[str, float | None], card: str) -> None:
    assert fits(pd.DataFrame([{**MEASURED, **changes}])) == [card]


def test_unknown_columns_are_unknown_needs() -> None:
    assert all(need.isna().all() for need in needed_bytes(pd.DataFrame({"optimizer_state_bytes": [1.0]})))


def test_only_training_tables_say_so(build: SimpleNamespace, loaded: Callable[..., pd.DataFrame]) -> None:
    assert "fits" not in render(comparison_table(loaded(build.sweep())))
    table = comparison_table(loaded(build.sweep(**MEASURED | {"optimizer_state_bytes": 1, "non_torch_bytes": 0}), "b"))
    assert list(table.frame["fits"].unique()) == ["8 GB"]
    assert " 8 GB " in render(table)
    assert LEGEND in table.remarks()

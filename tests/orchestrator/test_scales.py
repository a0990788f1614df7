"""Scales of the shipped sweeps: every one is a sweep, headlines are few cells, the small ones need little."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import yaml

from orchestrator.expand import expand
from orchestrator.sweep import load_sweep, shipped
from tasks.footprint import lower_bound

SCALES = [
    (name, scale)
    for name, path in shipped().items()
    for scale in (yaml.safe_load(path.read_text()).get("scales") or {})
]


@cache
def cells(name: str, scale: str | None = None) -> Any:
    return [item.cell for item in expand(load_sweep(name, [f"scale={scale}"] if scale else []), "cpu")]


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_is_a_sweep(name: str, scale: str) -> None:
    found = cells(name, scale)
    assert found
    if scale == "headline":
        assert len(found) <= len(cells(name))
        assert {cell.cell_id for cell in found} <= {cell.cell_id for cell in cells(name)}, "part of the whole grid"
    if scale == "small":
        assert all((lower_bound(cell).total_bytes or 0) < 2**30 for cell in found)
        assert {cell.workload.kind for cell in found} <= {cell.workload.kind for cell in cells(name)}


@pytest.mark.parametrize("name", ["precision", "checkpointing", "accumulation", "finetune"])
def test_training_sweeps_have_both(name: str) -> None:
    assert {scale for known, scale in SCALES if known == name} == {"headline", "small"}
    stacks = {str(cell.stack) for cell in cells(name)}
    assert {str(cell.stack) for cell in cells(name, "headline")} <= stacks


def test_headlines_are_what_can_be_measured_in_twenty_minutes() -> None:
    headlines = {name: len(cells(name, scale)) for name, scale in SCALES if scale == "headline"}
    assert len(headlines) == 10
    assert sum(headlines.values()) <= 60, headlines

"""What the shipped sweeps ask of a card that can do everything."""

from typing import Any

import pytest
import yaml

from orchestrator.expand import expand
from orchestrator.sweep import load_sweep, shipped
from tasks.stacks import unsupported

GRIDS = [
    (name, scale)
    for name, file in sorted(shipped().items())
    for scale in ("", *yaml.safe_load(file.read_text()).get("scales", {}))
    if scale != "small"  # for CPUs
]


class Everything(dict[str, str]):
    """Every package is installed."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return "999"

    def get(self, name: str, default: Any = None) -> str:
        return self[name]


@pytest.mark.parametrize(("name", "scale"), GRIDS)
def test_no_cell_that_any_card_refuses(bench: Any, name: str, scale: str) -> None:
    """A stack that a sweep names has somewhere to run: a card, or else a CPU, of which the reason speaks."""
    card = bench.device("cuda", compute_capability=(9, 0), packages=Everything())
    sweep = load_sweep(name, [f"scale={scale}"] if scale else [])
    reasons = {str(item.cell): unsupported(item.cell, card) for item in expand(sweep, card.tag)}
    assert reasons
    assert {
        cell: reason for cell, reason in reasons.items() if reason is not None and "cpu" not in reason.lower()
    } == {}

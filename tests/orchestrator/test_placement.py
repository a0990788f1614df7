"""Placement: run, unsupported, does not fit or unplaced, each with its reason."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import placement
from orchestrator.expand import PlannedCell
from orchestrator.placement import GIB, Decision, place
from tasks.cell import Cell, ModelSpec, WorkloadPoint
from tasks.device import DeviceInfo
from tasks.footprint import Footprint
from tasks.stacks import parse_stack

PACKAGES = {"bitsandbytes": "0.50", "accelerate": "1.15"}
POCKET = ModelSpec(id="pocket", source="pocket", kind="language")
POINT = WorkloadPoint(kind="decode", parameters=(("batch_size", 1), ("new_tokens", 8), ("prompt_tokens", 8)))


@pytest.fixture(autouse=True)
def footprint(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the footprint of models; a test sets what every cell needs."""
    needs = SimpleNamespace(bytes=Footprint(weight_bytes=GIB, cache_bytes=None))
    monkeypatch.setattr(placement, "lower_bound", lambda cell: needs.bytes)
    return needs


def device(tag: str, **fields: Any) -> DeviceInfo:
    kind: Any = "cpu" if tag == "cpu" else "cuda"
    facts = {"compute_capability": (8, 0) if kind == "cuda" else None, "memory_bytes": 8 * GIB, "packages": PACKAGES}
    return DeviceInfo(kind=kind, name=tag.upper(), tag=tag, **{**facts, **fields})


def planned(hardware: str, stack: str = "baseline", **fields: Any) -> PlannedCell:
    cell = Cell(**{"model": POCKET, "workload": POINT, "stack": parse_stack(stack), "hardware": hardware, **fields})
    return PlannedCell(cell=cell, hardware_requested=hardware, rounds=3)


def test_run_on_the_first_matching_device() -> None:
    first, second = device("h200", uuid="a"), device("h200", uuid="b", index=1)
    (placed,) = place([planned("h200")], [device("cpu"), first, second])
    assert (placed.decision, placed.reason, placed.device) == (Decision.RUN, None, first)


def test_tag_without_memory_size_matches_both() -> None:
    (placed,) = place([planned("a100")], [device("a100-40gb")])
    assert placed.decision is Decision.RUN


def test_unplaced_names_the_tags() -> None:
    (placed,) = place([planned("rtx4060")], [device("h200"), device("cpu"), device("h200", index=1)])
    assert (placed.decision, placed.device) == (Decision.UNPLACED, None)
    assert placed.reason == "no device is tagged 'rtx4060'; tags here: cpu, h200"
    assert not placed.to_run
    assert place([planned("cpu")], [])[0].reason == "no device is tagged 'cpu'; tags here: none"


def test_unsupported_on_every_matching_device() -> None:
    vision = ModelSpec(id="net", source="random", reference="resnet-50", kind="vision")
    (placed,) = place([planned("cpu", model=vision)], [device("cpu")])
    assert (placed.decision, placed.reason) == (
        Decision.UNSUPPORTED,
        "decode needs a language model, net is vision",
    )
    assert not placed.to_run


def test_one_device_that_can_is_enough() -> None:
    lacking, able = device("h200", packages={}), device("h200", index=1)
    assert place([planned("h200", "nf4")], [lacking])[0].decision is Decision.UNSUPPORTED
    (placed,) = place([planned("h200", "nf4")], [lacking, able])
    assert (placed.decision, placed.device) == (Decision.RUN, able)


def test_does_not_fit_is_told_and_still_run(footprint: SimpleNamespace) -> None:
    footprint.bytes = Footprint(weight_bytes=15 * GIB, cache_bytes=GIB)
    (placed,) = place([planned("rtx4060")], [device("rtx4060")])
    assert placed.decision is Decision.DOES_NOT_FIT
    assert placed.reason == "needs at least 16.0 GiB (weights 15.0, cache 1.0), rtx4060 has 8.0 GiB"
    assert placed.to_run


def test_fits_on_the_larger_of_two(footprint: SimpleNamespace) -> None:
    footprint.bytes = Footprint(weight_bytes=60 * GIB, cache_bytes=None)
    small, large = device("a100-40gb", memory_bytes=40 * GIB), device("a100-80gb", memory_bytes=80 * GIB)
    assert place([planned("a100")], [small, large])[0].decision is Decision.RUN
    assert place([planned("a100")], [small])[0].decision is Decision.DOES_NOT_FIT


def test_memory_budget_and_unknown_footprints(footprint: SimpleNamespace) -> None:
    assert place([planned("cpu")], [device("cpu")], memory_budget_bytes=GIB // 2)[0].reason == (
        "needs at least 1.0 GiB (weights 1.0, cache 0.0), the budget is 0.5 GiB"
    )
    footprint.bytes = Footprint(weight_bytes=None, cache_bytes=None)
    assert place([planned("cpu")], [device("cpu")], memory_budget_bytes=1)[0].decision is Decision.RUN


def test_every_cell_gets_one_decision_in_order() -> None:
    cells = [planned(tag) for tag in ("cpu", "h200", "rtx3090", "cpu")]
    assert [item.planned for item in place(cells, [device("cpu"), device("h200")])] == cells


def test_a_hundred_thousand_cells() -> None:
    items = [planned("h200", "bf16+sdpa-flash")] * 100_000
    devices = [device("h200", index=index, uuid=str(index)) for index in range(64)]
    start = time.process_time()
    assert len(place(items, devices)) == 100_000
    assert time.process_time() - start < 20  # catches quadratic growth; the figure is in the notes

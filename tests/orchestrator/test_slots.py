"""What a slot waits for on a cluster that others use too: real Ray, an accelerator that is only declared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.inventory import Node
from orchestrator.runner import claimed
from orchestrator.slots import BenchSlot


@pytest.fixture(scope="module")
def node(cluster: Any) -> Iterator[Node]:
    """One with an accelerator, as Ray was told."""
    from orchestrator.connection import connect
    from orchestrator.inventory import Inventory

    cluster.add("a100")
    with connect(cluster.address):
        inventory = Inventory()
        inventory.settle()
        deadline = time.monotonic() + 60
        while not (found := [node for node in inventory.nodes.values() if node.accelerators]):
            assert time.monotonic() < deadline, "the node has not joined"
            time.sleep(0.2)
            inventory.refresh()
        yield found[0]


def slot(node: Node, device: Any, folder: Path) -> BenchSlot:
    return BenchSlot(slot_id="slot", node=node, device=device, log_path=str(folder / "slot.log"))


def answer(slot: BenchSlot) -> dict[str, Any]:
    import ray

    return dict(ray.get(slot.pending, timeout=120))


def test_one_process_of_a_machine_has_a_name() -> None:
    held = claimed("benchmatrix-test")
    assert held is not None
    assert claimed("benchmatrix-test") is None
    held.close()
    again = claimed("benchmatrix-test")
    assert again is not None
    again.close()


@pytest.mark.slow  # Ray keeps the first token that a process has seen: the fast tests use Ray without
def test_two_drivers_do_not_measure_on_one_cpu(node: Node, tmp_path: Path) -> None:
    first, second = (slot(node, node.devices[-1], tmp_path) for _ in range(2))
    first.start()
    assert "pid" in answer(first)
    second.start()
    assert answer(second) == {"taken": True}
    first.kill()
    deadline = time.monotonic() + 120
    found = {"taken": True}
    while found.get("taken") and time.monotonic() < deadline:  # a killed process ends a little later
        second.ask()
        found = answer(second)
    assert "pid" in found
    second.kill()


@pytest.mark.slow
def test_an_accelerator_that_others_hold_is_queued_for(node: Node, tmp_path: Path, tools: Any) -> None:
    import ray

    others, ours = (slot(node, node.devices[0], tmp_path) for _ in range(2))
    others.start()
    assert "pid" in answer(others)
    assert not others.queued(), "it was created"
    ours.start()
    ready, _ = ray.wait([ours.pending], timeout=3)
    assert not ready
    tools.wait_for(ours.queued, 60, "the word that it is queued for")
    others.kill()
    assert "pid" in answer(ours)
    assert not ours.queued()
    ours.kill()

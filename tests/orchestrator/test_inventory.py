"""What the driver makes of Ray's list of nodes, on a real instance and on plain entries."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.inventory import (
    Inventory,
    Node,
    VersionMismatch,
    bench_devices,
    declared_accelerators,
    declared_tag,
    probe_node,
)
from orchestrator.runner import undo_ray
from tasks.probe import NodeReport, probe

LOCAL = probe()


def node(node_id: str, tag: str | None, accelerators: int, report: NodeReport | None = None) -> Node:
    report = report or probe(tag, accelerators, cards=[])
    return Node(node_id=node_id, address="", accelerators=accelerators, report=report)


@pytest.mark.parametrize(
    ("entry", "tag", "accelerators"),
    [
        ({"Labels": {"bench/hw": "rtx3090"}, "Resources": {"GPU": 2.0}}, "rtx3090", 2),
        ({"Labels": {}, "Resources": {"CPU": 4.0, "hw:a100-80gb": 1.0}}, "a100-80gb", 0),
        ({"Resources": {"GPU": 1.0}}, None, 1),
        ({"Labels": {"bench/hw": "cpu"}, "Resources": {"hw:gpu": 1.0}}, "cpu", 0),
    ],
)
def test_what_a_node_declares(entry: dict[str, dict[str, str]], tag: str | None, accelerators: int) -> None:
    assert declared_tag(entry) == tag
    assert declared_accelerators(entry) == accelerators


def tags(*nodes: Node) -> list[tuple[str, str]]:
    return [(node.node_id, device.tag) for node, device in bench_devices(nodes)]


def test_cpu_of_an_accelerator_node_serves_only_where_no_other_is() -> None:
    gpu_node, cpu_node = node("a", "a100", 1), node("b", "cpu", 0)
    assert tags(gpu_node) == [("a", "a100"), ("a", "cpu")]
    assert tags(gpu_node, cpu_node) == [("a", "a100"), ("b", "cpu")]


def test_accelerators_that_ray_was_not_told_of_are_left_alone() -> None:
    seen = replace(
        LOCAL, devices=(replace(LOCAL.devices[-1], kind="cuda", tag="h200", uuid="GPU-1"), LOCAL.devices[-1])
    )
    assert tags(node("a", None, 0, seen)) == [("a", "cpu")]
    assert tags(node("a", None, 1, seen)) == [("a", "h200"), ("a", "cpu")]


def entry(**labels: str) -> dict[str, Any]:
    return {"NodeID": "f" * 56, "NodeManagerAddress": "192.0.2.1", "Labels": labels, "Resources": {"GPU": 1.0}}


def answer(**changes: Any) -> dict[str, Any]:
    import platform

    import ray

    versions = {"python": platform.python_version(), "ray": ray.__version__}
    return {**versions, "report": LOCAL.to_dict(), **changes}


def test_a_head_is_shown_and_not_measured() -> None:
    found = Inventory()._node(entry(**{"bench/hw": "head"}), answer(report=probe("head", 0, cards=[]).to_dict()))
    assert {device.tag for device in found.report.devices} == {"head"} and not found.report.disagreements
    assert tags(found) == [] and not found.cpu_only
    worker = node("b", "a100", 1)
    assert tags(found, worker) == [("b", "a100"), ("b", "cpu")]  # the head's CPU is no CPU node either


@pytest.mark.parametrize(("what", "text"), [("python", "it runs python 3.9.1"), ("ray", "it runs ray 3.9.1")])
def test_a_node_with_other_versions_is_refused(what: str, text: str) -> None:
    with pytest.raises(VersionMismatch, match=text):
        Inventory()._node(entry(), answer(**{what: "3.9.1"}))


def test_a_node_with_another_revision_of_the_project_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.inventory.git_revision", lambda: "b" * 40)
    report = replace(LOCAL, git_revision="a" * 40).to_dict()
    (text,) = Inventory()._node(entry(), answer(report=report)).report.disagreements
    assert "revision aaaaaaaaaaaa of this project and the driver bbbbbbbbbbbb" in text
    monkeypatch.setattr("orchestrator.inventory.git_revision", lambda: "a" * 40)
    assert not Inventory()._node(entry(), answer(report=report)).report.disagreements


OLDER = {name: value for name, value in LOCAL.to_dict().items() if name != "free_bytes"}
NEWER = {**LOCAL.to_dict(), "numa_nodes": 1}
OTHER_DEVICES = {**LOCAL.to_dict(), "devices": [{"kind": "cpu", "numa_node": 1}]}


@pytest.mark.parametrize("report", [OLDER, NEWER, OTHER_DEVICES], ids=["older", "newer", "devices"])
def test_a_report_of_another_revision_leaves_the_node_out(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", lambda reference: answer(report=report))
    inventory = Inventory()
    node_id = entry()["NodeID"]
    inventory._probing[node_id] = (object(), entry(), time.monotonic() + 60)
    joined, (text,) = inventory._collect({node_id: entry()})
    assert not joined and "is left out: it runs another revision of benchmatrix" in text and "\n" not in text
    assert node_id in inventory.left_out


@pytest.fixture(scope="module")
def instance() -> Iterator[tuple[Inventory, list[int]]]:
    from orchestrator.connection import connect

    with connect() as connection:
        assert connection.local
        inventory = Inventory()
        inventory.settle()
        yield inventory, [child.pid for child in psutil.Process().children(recursive=True)]


def test_local_instance_is_this_machine(instance: tuple[Inventory, list[int]]) -> None:
    inventory, _ = instance
    (found,) = inventory.nodes.values()
    assert found.report.machine_key == LOCAL.machine_key
    assert [device.tag for device in found.devices][-1] == "cpu"
    assert inventory.refresh().joined == [] and not inventory.pending()


@pytest.mark.parametrize(("dying", "joined"), [(1, 1), (2, 1), (3, 0)])
def test_a_probe_that_dies_is_asked_again_within_limits(
    instance: tuple[Inventory, list[int]], tmp_path: Path, dying: int, joined: int
) -> None:
    import ray

    def probe_or_die(entry: dict[str, Any]) -> Any:
        def asked() -> dict[str, Any]:
            count = tmp_path / "count"
            number = int(count.read_text()) if count.exists() else 0
            count.write_text(str(number + 1))
            if number < dying:
                os.kill(os.getpid(), 9)
            return probe_node(None, 0)

        return ray.remote(asked).options(num_cpus=0, max_retries=0).remote()

    inventory = Inventory()
    inventory._submit = probe_or_die  # type: ignore[method-assign]
    changes = inventory.settle()
    assert len(changes.joined) == joined and len(inventory.nodes) == joined
    assert sum("is left out" in message for message in changes.messages) == 1 - joined


def test_a_worker_is_as_the_driver_was(instance: tuple[Inventory, list[int]]) -> None:
    import ray

    state = ray.get(ray.remote(undo_ray).options(num_cpus=0).remote())
    assert state["nice"] == os.getpriority(os.PRIO_PROCESS, 0)
    if os.geteuid() == 0:
        assert state["oom_score_adj"] == 500


def test_nothing_is_left_of_a_local_instance() -> None:
    """In a process of its own, since this one may hold an instance already."""
    import subprocess
    import sys
    import tempfile

    code = (
        "import psutil\n"
        "from orchestrator.connection import connect\n"
        "with connect():\n"
        "    family = psutil.Process().children(recursive=True)\n"
        "print(len(family), [p for p in family if p.is_running() and p.status() != 'zombie'])\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short: Ray's sockets lie below it
        result = subprocess.run(
            [sys.executable, "-c", code], text=True, capture_output=True, timeout=240, check=False,
            cwd=Path(__file__).resolve().parents[2], env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
        assert result.returncode == 0 and result.stderr == ""
        assert list(Path(folder).iterdir()) == []
    count, left = result.stdout.split(maxsplit=1)
    assert int(count) > 3 and left.strip() == "[]"

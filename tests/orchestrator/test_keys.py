"""Result keys: what a stored row must agree in with the machine and the techniques as they are now."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.expand import expand
from orchestrator.inventory import Node
from orchestrator.keys import KeyMaker
from orchestrator.sweep import make_sweep
from tasks.cell import Cell
from tasks.device import DeviceInfo
from tasks.probe import probe
from tasks.registry import optimizations
from tasks.stacks import parse_stack

SWEEP: dict[str, Any] = {
    "models": ["pocket"], "workloads": [{"kind": "decode"}], "optimizations": ["baseline"], "quality": False
}  # fmt: skip
PACKAGES = {"torch": "2.13.0", "onnx": "1.20", "onnxscript": "0.5", "onnxruntime": "1.22.0"}


@pytest.fixture(scope="module")
def node() -> Node:
    return Node(node_id="1", address="", accelerators=0, report=probe("cpu", 0, cards=[]))


def key(node: Node, stack: str, packages: dict[str, str] | None = None, **sweep: Any) -> str:
    made = make_sweep(SWEEP | sweep)
    cell: Cell = replace(expand(made, "cpu")[0].cell, stack=parse_stack(stack))
    device = DeviceInfo(kind="cpu", name="a CPU", tag="cpu", memory_bytes=1, packages=packages or PACKAGES)
    return KeyMaker(made).key(cell, node, device)


@pytest.mark.parametrize(
    ("stack", "package"),
    [
        ("onnx", "onnxruntime"),
        ("onnx-int8", "onnxruntime"),
        ("onnx", "onnxruntime-gpu"),
        ("onnx", "onnxscript"),
        ("quantized-cache", "optimum-quanto"),
        ("quantized-cache", "hqq"),
        ("bf16+gptq", "triton"),
    ],
)
def test_what_a_technique_may_run_on_counts(node: Node, stack: str, package: str) -> None:
    """Required or optional: another version, or none, is another key, but for stacks that have no use for it."""
    older, newer = PACKAGES | {package: "1.0"}, PACKAGES | {package: "1.1"}
    without = {name: version for name, version in PACKAGES.items() if name != package}
    assert len({key(node, stack, packages) for packages in (older, newer, without)}) == 3
    assert key(node, "bf16", older) == key(node, "bf16", newer) == key(node, "bf16", without)


def test_another_way_of_making_is_another_row(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `artifact_version` of each technique of the stack, and of no other."""
    stacks = ("prune", "prune+bf16+gptq", "bf16+gptq", "bf16")
    before = {stack: key(node, stack) for stack in stacks}
    monkeypatch.setattr(type(optimizations()["prune"]), "artifact_version", 7)
    after = {stack: key(node, stack) for stack in stacks}
    assert [before[stack] == after[stack] for stack in stacks] == [False, False, True, True]

"""The result key a run of a cell would have on a machine: what a stored row must agree in to be reused."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from orchestrator.inventory import Node
from orchestrator.ledger import result_key
from orchestrator.placement import Placed
from orchestrator.sweep import Sweep
from tasks.cell import Cell, ModelSpec, Technique, canonical_json
from tasks.choices import content_hash
from tasks.device import DeviceInfo, tag_matches
from tasks.models.identity import checkpoint_hash
from tasks.quality import VERSION
from tasks.quality_images import VERSION as IMAGES_VERSION
from tasks.quality_tasks import PACKAGE
from tasks.registry import optimizations, workloads
from tasks.row import PROTOCOL_VERSION

_LIBRARIES = ("torch", "transformers", "accelerate")


class KeyMaker:
    """Result keys under one sweep's settings; hashes each checkpoint once.

    The time limit is no part of a key: a run that ended within it is the same under any other (`ledger` repeats those
    that did not).
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._checkpoints: dict[ModelSpec, str] = {}
        self._identities: dict[tuple[ModelSpec, str, str], str] = {}
        self._contents: dict[Technique, dict[str, str]] = {}

    def key(self, cell: Cell, node: Node, device: DeviceInfo) -> str:
        """The key of `cell` measured on this device of this node."""
        machine = node.report.machine_key
        shared = (cell.model, cell.workload.kind, machine)
        if shared not in self._identities:
            self._identities[shared] = self._identity(cell, machine)
        stack = [optimizations()[name] for name in cell.stack.names()]
        backends = [package for technique in stack for package in technique.needs.packages]
        # of those that a technique can do without, what is there may be what it runs on
        optional = (package for technique in stack for package in technique.needs.optional_packages)
        backends += [package for package in optional if package in device.packages]
        if self._sweep.quality.tasks and self._quality(cell):
            backends.append(PACKAGE)
        versions = tuple((name, device.packages.get(name)) for name in (*_LIBRARIES, *backends))
        content = {item.name: found for item in cell.stack.techniques if (found := self._content(item))}
        # 1 is left out, as in keys from before there were versions
        made = {technique.name: version for technique in stack if (version := technique.artifact_version) != 1}
        # of a stack that compiles, rounds that share what was tuned stand for less than rounds that do not
        each = self._sweep.compile_each_round and any(technique.family == "compile" for technique in stack)
        given = {"artifact_version": made, "compile_each_round": each, "content": content}
        facts = {key: value for key, value in given.items() if value}
        own = f"{canonical_json(facts)[1:-1]}," if facts else ""
        return result_key(f'{{"cell_id":"{cell.cell_id}",{own}{self._identities[shared]}', versions)

    def _identity(self, cell: Cell, machine: str) -> str:
        """The rest of the canonical JSON, after the cell's id: cells of one model and kind share it on a machine."""
        if cell.model not in self._checkpoints:
            self._checkpoints[cell.model] = checkpoint_hash(cell.model, self._sweep.search_path)
        identity = {
            "profile": self._sweep.profile,
            "seed": self._sweep.seed,
            "memory_budget_bytes": self._sweep.limits.memory_budget_bytes,
            "quality": self._quality(cell),
            "checkpoint": self._checkpoints[cell.model],
            "protocol": PROTOCOL_VERSION,
            "machine": machine,
        }
        return canonical_json(identity).removeprefix("{")

    def all(self, cell: Cell, machines: Iterable[tuple[Node, DeviceInfo]]) -> set[str] | None:
        """The keys of every live machine with the cell's tag, None when there is none."""
        found = {self.key(cell, node, device) for node, device in machines if tag_matches(cell.hardware, device.tag)}
        return found or None

    def one(self, placed: Placed, machines: Iterable[tuple[Node, DeviceInfo]]) -> str | None:
        """The key on the first matching machine, None where the cell is not run."""
        cell = placed.planned.cell
        for node, device in machines:
            if placed.to_run and tag_matches(cell.hardware, device.tag):
                return self.key(cell, node, device)
        return None

    def _content(self, technique: Technique) -> dict[str, str]:
        """Files that its options name count by what is in them."""
        if technique not in self._contents:
            found = optimizations()[technique.name].content(technique, self._sweep.search_path)
            self._contents[technique] = found
        return self._contents[technique]

    def _quality(self, cell: Cell) -> dict[str, Any] | None:
        """How its quality is judged, None where it is not: such cells keep their rows whatever the sweep asks."""
        wanted, workload = self._sweep.quality, workloads()[cell.workload.kind]
        if not wanted.enabled or not workload.needs_model or workload.training:
            return None
        if cell.model.kind == "language":
            return self._quality_wanted
        return {**self._quality_wanted, "images": IMAGES_VERSION}

    @cached_property
    def _quality_wanted(self) -> dict[str, Any]:
        """Files count by their content: questions that were edited are other questions."""
        wanted = self._sweep.quality
        return {
            "version": VERSION,
            "tokens": wanted.tokens,
            "choices": wanted.choices,
            "choices_file": content_hash(wanted.choices_file or ""),
            "tasks": wanted.tasks,
            "tasks_path": content_hash(wanted.tasks_path or ""),
            "tasks_limit": wanted.tasks_limit,
        }


def distinct_machines(devices: Iterable[tuple[Node, DeviceInfo]]) -> list[tuple[Node, DeviceInfo]]:
    """One of those that give equal keys: a thousand equal nodes are one machine here."""
    found: dict[tuple[Any, ...], tuple[Node, DeviceInfo]] = {}
    for node, device in devices:
        packages = tuple(sorted(device.packages.items()))
        found.setdefault((device.tag, node.report.machine_key, packages), (node, device))
    return list(found.values())

"""The result key a run of a cell would have on a machine: what a stored row must agree in to be reused."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from orchestrator.inventory import Node
from orchestrator.ledger import result_key
from orchestrator.placement import Placed
from tasks.cell import Cell, ModelSpec
from tasks.device import DeviceInfo, tag_matches
from tasks.models.identity import checkpoint_hash
from tasks.registry import optimizations
from tasks.row import PROTOCOL_VERSION

_LIBRARIES = ("torch", "transformers", "accelerate")


class KeyMaker:
    """Result keys under one profile; hashes each checkpoint once."""

    def __init__(self, profile: str) -> None:
        self._profile = profile
        self._checkpoints: dict[ModelSpec, str] = {}

    def key(self, cell: Cell, node: Node, device: DeviceInfo) -> str:
        """The key of `cell` measured on this device of this node."""
        if cell.model not in self._checkpoints:
            self._checkpoints[cell.model] = checkpoint_hash(cell.model)
        identity = {
            "cell_id": cell.cell_id,
            "profile": self._profile,
            "checkpoint": self._checkpoints[cell.model],
            "protocol": PROTOCOL_VERSION,
            "machine": node.report.machine_key,
        }
        backends = [package for name in cell.stack.names() for package in self._backends.get(name, ())]
        versions = {name: device.packages.get(name) for name in (*_LIBRARIES, *backends)}
        return result_key(identity, versions)

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

    @cached_property
    def _backends(self) -> dict[str, tuple[str, ...]]:
        return {name: technique.needs.packages for name, technique in optimizations().items()}

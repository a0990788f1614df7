"""What the live nodes are: Ray says which exist and what they claim, a probe on each says what is true."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tasks.device import HEAD_TAG, DeviceInfo
from tasks.environment import git_revision
from tasks.probe import NodeReport, probe

HARDWARE_LABEL = "bench/hw"
HARDWARE_RESOURCE = "hw:"
NODE_ID_LABEL = "ray.io/node-id"
PROBE_S = 120.0
MAX_PROBES = 3


class VersionMismatch(RuntimeError):
    """Nodes that do not run the same Python, Ray and benchmatrix; one sentence."""


def is_accelerator(device: DeviceInfo) -> bool:
    """Whether Ray counts this device as a GPU, real or pretended."""
    return device.kind == "cuda" or device.simulated


@dataclass(frozen=True, kw_only=True)
class Node:
    """One live node. `devices` are its bench slots: accelerators first, then its CPU."""

    node_id: str
    address: str
    accelerators: int
    report: NodeReport

    @property
    def short_id(self) -> str:
        return self.node_id[:6]

    @property
    def cpu_only(self) -> bool:
        return bool(self.devices) and not any(is_accelerator(device) for device in self.devices)

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        """Accelerators that Ray does not know of are left alone: the node was started without them."""
        known = [device for device in self.report.devices if device.tag != HEAD_TAG]
        return tuple(device for device in known if self.accelerators or not is_accelerator(device))


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a refresh found: nodes that joined, ids of nodes that are gone, and messages for the person."""

    joined: list[Node] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


class Inventory:
    """The nodes of the connected cluster. `refresh` is cheap; new nodes are probed in the background."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._probing: dict[str, tuple[Any, dict[str, Any], float]] = {}
        self.left_out: dict[str, str] = {}  # node id -> why nothing runs there
        self._failures: Counter[str] = Counter()
        self._again: set[str] = set()

    def settle(self) -> Changes:
        """The first refresh: waits until every node that is alive now has been probed."""
        import ray

        joined, messages = [], []
        while True:
            changes = self.refresh()
            joined += changes.joined
            messages += changes.messages
            if self._probing:
                ray.wait(self.pending(), timeout=1.0)
            elif not self._again:
                return Changes(joined=joined, messages=messages)

    def pending(self) -> list[Any]:
        """References of probes under way."""
        return [reference for reference, _, _ in self._probing.values()]

    def refresh(self) -> Changes:
        """Compare with Ray's list of nodes; 0.3 ms when nothing changed."""
        import ray

        self._again.clear()
        alive = {entry["NodeID"]: entry for entry in ray.nodes() if entry["Alive"]}
        lost = [node_id for node_id in self.nodes if node_id not in alive]
        for node_id in lost:
            del self.nodes[node_id]
        for node_id, entry in alive.items():
            if node_id not in self.nodes and node_id not in self._probing and node_id not in self.left_out:
                self._probing[node_id] = (self._submit(entry), entry, time.monotonic() + PROBE_S)
        joined, messages = self._collect(alive)
        return Changes(joined=joined, lost=lost, messages=messages)

    def _submit(self, entry: dict[str, Any]) -> Any:
        import ray

        call = ray.remote(probe_node).options(
            label_selector={NODE_ID_LABEL: entry["NodeID"]}, num_cpus=0, max_retries=0
        )
        return call.remote(declared_tag(entry), declared_accelerators(entry))

    def _collect(self, alive: dict[str, dict[str, Any]]) -> tuple[list[Node], list[str]]:
        import ray

        joined, messages = [], []
        for node_id, (reference, entry, deadline) in list(self._probing.items()):
            ready, _ = ray.wait([reference], timeout=0)
            late = time.monotonic() > deadline
            if not ready and not late and node_id in alive:
                continue
            del self._probing[node_id]
            name = entry.get("NodeManagerHostname") or node_id[:6]
            if not ready:
                if late:
                    messages.append(self._leave_out(node_id, name, f"it did not answer within {PROBE_S:.0f} s"))
                continue
            try:
                node = self._node(entry, ray.get(reference))
            except (ray.exceptions.RayError, VersionMismatch) as error:
                self._failures[node_id] += 1
                if self._failures[node_id] < MAX_PROBES and not isinstance(error, VersionMismatch):
                    self._again.add(node_id)  # a worker that died is not the node's fault: the next refresh asks again
                    continue
                text = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
                messages.append(self._leave_out(node_id, name, text))
                continue
            self.nodes[node_id] = node
            joined.append(node)
            messages += [f"node {name} ({node_id[:6]}): {text}" for text in node.report.disagreements]
        return joined, messages

    def _leave_out(self, node_id: str, name: str, why: str) -> str:
        self.left_out[node_id] = f"node {name} ({node_id[:6]}) is left out: {why}"
        return self.left_out[node_id]

    def _node(self, entry: dict[str, Any], answer: dict[str, Any]) -> Node:
        import ray

        for what, here in (("python", platform.python_version()), ("ray", str(ray.__version__))):
            if answer[what] != here:
                raise VersionMismatch(f"it runs {what} {answer[what]} and this driver {here}: both must be equal")
        report = _report(answer["report"])
        if declared_tag(entry) == HEAD_TAG:
            report = replace(report, devices=tuple(replace(device, tag=HEAD_TAG) for device in report.devices))
        ours = git_revision()
        if ours and report.git_revision and report.git_revision != ours:
            text = f"it has revision {report.git_revision[:12]} of this project and the driver {ours[:12]}: update one"
            report = replace(report, disagreements=(*report.disagreements, text))
        return Node(
            node_id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            accelerators=declared_accelerators(entry),
            report=report,
        )


def _report(data: dict[str, Any]) -> NodeReport:
    try:
        return NodeReport.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VersionMismatch(
            "it runs another revision of benchmatrix, whose report this driver cannot read "
            f"({type(error).__name__}: {error}): update one"
        ) from error


def probe_node(tag: str | None, accelerators: int) -> dict[str, Any]:
    """Runs on the node, as a Ray task: its report and the versions that must be equal everywhere."""
    import ray

    from orchestrator.connection import check_imports

    check_imports()
    return {
        "python": platform.python_version(),
        "ray": str(ray.__version__),
        "report": probe(tag, accelerators).to_dict(),
    }


def declared_tag(entry: dict[str, Any]) -> str | None:
    """The tag that the node was started with: label `bench/hw`, or a custom resource `hw:<tag>`."""
    label = entry.get("Labels", {}).get(HARDWARE_LABEL)
    if label:
        return str(label)
    named = [name for name in entry.get("Resources", {}) if name.startswith(HARDWARE_RESOURCE)]
    return named[0].removeprefix(HARDWARE_RESOURCE) if named else None


def declared_tags() -> set[str]:
    """The tags that the live nodes were started with; nodes without one tell theirs only when they are probed."""
    import ray

    return {tag for entry in ray.nodes() if entry["Alive"] and (tag := declared_tag(entry)) is not None}


def declared_accelerators(entry: dict[str, Any]) -> int:
    return int(entry.get("Resources", {}).get("GPU", 0))


def bench_devices(nodes: Iterable[Node]) -> list[tuple[Node, DeviceInfo]]:
    """Every slot of these nodes. The CPU of a node with accelerators serves only where no node is CPU-only."""
    nodes = list(nodes)
    dedicated = any(node.cpu_only for node in nodes)
    return [
        (node, device)
        for node in nodes
        for device in node.devices
        if is_accelerator(device) or node.cpu_only or not dedicated
    ]

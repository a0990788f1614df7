"""The kinds of node that a cluster file promises, so that a sweep can be planned before the nodes are up."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.device import HEAD_TAG, DeviceInfo, DeviceKind


class ClusterFileError(ValueError):
    """A cluster file cannot be understood; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class NodeClass:
    """One kind of node. `memory_bytes` is one device's memory, the host's for a CPU; `nodes` how many there are."""

    name: str
    tag: str
    kind: DeviceKind
    memory_bytes: int
    nodes: int = 1
    accelerators: int = 0
    compute_capability: tuple[int, int] | None = None

    def device(self) -> DeviceInfo:
        """A device of such a node as far as it is known before the node is up; installed packages are not."""
        return DeviceInfo(
            kind=self.kind,
            name=self.name,
            tag=self.tag,
            memory_bytes=self.memory_bytes,
            compute_capability=self.compute_capability,
        )


def load_cluster(path: Path) -> tuple[NodeClass, ...]:
    """Node classes of a Ray cluster file, without its unmeasured head.

    They come from the labels of `available_node_types` (cloud), or from `metadata.benchmatrix.nodes` (on-premise,
    where Ray refuses node types).

    Raises:
        ClusterFileError: not such a file, or a node class without tag or memory.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterFileError(f"Cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ClusterFileError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    try:
        if types := _mapping(data.get("available_node_types") or {}):
            classes = [_from_node_type(name, _mapping(node_type)) for name, node_type in types.items()]
        else:
            nodes = _mapping(_mapping(_mapping(data.get("metadata") or {}).get("benchmatrix") or {}).get("nodes") or {})
            classes = [_from_metadata(name, _mapping(node)) for name, node in nodes.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ClusterFileError(f"{path} does not describe node classes: {error}.") from error
    classes = [node_class for node_class in classes if node_class.tag != HEAD_TAG and node_class.nodes]
    if not classes:
        raise ClusterFileError(
            f"{path} names no nodes: give available_node_types with labels bench/hw, or metadata.benchmatrix.nodes."
        )
    return tuple(classes)


def _from_node_type(name: str, node_type: dict[str, Any]) -> NodeClass:
    labels = _mapping(node_type.get("labels") or {})
    tag = _required(labels, "bench/hw", name)
    gpus = int(_mapping(node_type.get("resources") or {}).get("GPU", 0))
    memory = 0 if tag == HEAD_TAG else _required(labels, "bench/memory-gib", name)
    return NodeClass(
        name=name,
        tag=tag,
        kind="cuda" if gpus else "cpu",
        memory_bytes=_bytes(memory),
        nodes=int(node_type.get("max_workers", 1)),
        accelerators=gpus,
        compute_capability=_capability(labels.get("bench/compute-capability")),
    )


def _from_metadata(name: str, node: dict[str, Any]) -> NodeClass:
    kind = _required(node, "kind", name)
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"{name}: kind is {kind!r}, not cuda or cpu")
    return NodeClass(
        name=name,
        tag=_required(node, "tag", name),
        kind=kind,
        memory_bytes=_bytes(_required(node, "memory_gib", name)),
        nodes=len(node.get("addresses", [None])),
        accelerators=int(node.get("accelerators", 1)) if kind == "cuda" else 0,
        compute_capability=_capability(node.get("compute_capability")),
    )


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a mapping")
    return value


def _required(mapping: dict[str, Any], key: str, name: str) -> Any:
    if key not in mapping:
        raise ValueError(f"{name} has no {key}")
    return mapping[key]


def _bytes(gibibytes: Any) -> int:
    return int(float(gibibytes) * 2**30)


def _capability(text: Any) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\.(\d+)", str(text))
    if match is None:
        raise ValueError(f"compute capability {text!r} is not like 8.6")
    return int(match.group(1)), int(match.group(2))

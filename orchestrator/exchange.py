"""What one node has made reaches the others: who has which artifact, who is making one, and how it travels.

The exchange is one actor beside the driver and knows names only. A courier is an idle actor beside every runner; it
streams the files of an artifact in chunks through Ray's object store, never while its machine is measuring.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.inventory import NODE_ID_LABEL
from tasks.artifacts import ArtifactSpec
from tasks.sharing import Alone, Part, parts, receive, sending, undisturbed

POLL_S = 1.0
# Who waits for an artifact asks this often at the least: others that have failed to make it let those go first.
ASKS_S = 3 * POLL_S
ANSWER_S = 30.0
# What a run may have to wait while its node sends something, before it begins.
SENDING_S = 600.0
_IN_FLIGHT = 4  # chunks that a sender is ahead of its receiver


@dataclass(kw_only=True)
class Known:
    """Of one artifact: the couriers of nodes that have it, which node makes it until when, which nodes could not, and
    when each asked for it last."""

    holders: dict[str, Any] = field(default_factory=dict)
    maker: str | None = None
    until: float = 0.0
    failed: set[str] = field(default_factory=set)
    asked: dict[str, float] = field(default_factory=dict)
    given: int = 0


class Exchange:
    """One per run. Nodes are Ray's node ids, keys are those of artifacts, couriers are handles that it only keeps."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}

    def claim(self, key: str, node: str, limit_s: float, able: bool = True) -> tuple[str, str | None, Any]:
        """What `node` is to do about an artifact that it lacks.

        `("fetch", holder, courier)`, `("wait", maker, None)`, `("make", None, None)`, which nobody else is told for the
        next `limit_s`, or `("lack", None, None)` where it is not `able` to make it and nobody else is about to.
        """
        known = self._known.setdefault(key, Known())
        now = time.monotonic()
        known.asked[node] = now
        holders = [holder for holder in known.holders if holder != node]
        if holders:
            known.given += 1
            holder = holders[known.given % len(holders)]
            return "fetch", holder, known.holders[holder]
        if known.maker not in (None, node) and now < known.until:
            return "wait", known.maker, None
        others = {other for other, at in known.asked.items() if other != node and now - at < ASKS_S} - known.failed
        if others and (node in known.failed or not able):
            return "wait", None, None
        if not able:
            del known.asked[node]
            return "lack", None, None
        known.maker, known.until = node, now + limit_s
        return "make", None, None

    def keep(self, key: str, node: str, courier: Any) -> None:
        """`node` has it."""
        known = self._known.setdefault(key, Known())
        known.holders[node] = courier
        known.failed.discard(node)
        if known.maker == node:
            known.maker = None

    def fail(self, key: str, node: str) -> None:
        """`node` could not make it: others that need it try before it tries again."""
        self.drop(key, node)
        self._known.setdefault(key, Known()).failed.add(node)

    def drop(self, key: str, node: str) -> None:
        """`node` has it no longer."""
        known = self._known.get(key)
        if known is not None:
            known.holders.pop(node, None)
            known.asked.pop(node, None)
            known.maker = None if known.maker == node else known.maker

    def forget(self, node: str) -> None:
        """The runner of `node` is lost, with its courier."""
        for key in self._known:
            self.drop(key, node)


class Courier:
    """Sends artifacts of its node's store."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def send(self, maker: str, key: str) -> Iterator[Part]:
        """The files of one artifact in chunks, once the machine measures nothing."""
        with sending(self._root):
            yield from parts(self._root / maker / key)


class Shared(Alone):
    """A runner's way to the artifacts of the other nodes. Whatever fails there, this node makes the artifact itself."""

    def __init__(self, exchange: Any, root: Path) -> None:
        import ray

        self._exchange, self._root = exchange, root
        self._node: str = ray.get_runtime_context().get_node_id()
        self._courier = _on(self._node, Courier).remote(str(root))

    def obtain(self, spec: ArtifactSpec, root: Path, limit_s: float, *, able: bool = True) -> None:
        import ray

        deadline = time.monotonic() + limit_s
        with suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            while time.monotonic() < deadline:
                claim = self._exchange.claim.remote(spec.key, self._node, limit_s, able)
                what, holder, courier = ray.get(claim, timeout=ANSWER_S)
                if what in ("make", "lack"):
                    return
                if what == "wait":
                    time.sleep(POLL_S)
                elif self._fetch(spec, root, courier):
                    return
                else:
                    ray.get(self._exchange.drop.remote(spec.key, holder), timeout=ANSWER_S)

    def made(self, spec: ArtifactSpec) -> None:
        self._exchange.keep.remote(spec.key, self._node, self._courier)

    def failed(self, spec: ArtifactSpec) -> None:
        self._exchange.fail.remote(spec.key, self._node)

    def undisturbed(self) -> AbstractContextManager[None]:
        return undisturbed(self._root)

    def _fetch(self, spec: ArtifactSpec, root: Path, courier: Any) -> bool:
        import ray

        stream = courier.send.options(num_returns="streaming", _generator_backpressure_num_objects=_IN_FLIGHT).remote(
            spec.maker, spec.key
        )
        try:
            return receive(spec, root, (ray.get(part) for part in stream))
        except (ray.exceptions.RayError, ValueError, OSError):
            return False


def start_exchange() -> Any:
    """An exchange on the driver's node, which ends with the driver."""
    import ray

    return _on(ray.get_runtime_context().get_node_id(), Exchange).remote()


def _on(node: str, actor: type) -> Any:
    import ray

    return ray.remote(actor).options(label_selector={NODE_ID_LABEL: node}, num_cpus=0)

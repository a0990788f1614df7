"""What one node has made reaches the others: who has which artifact, who is making one, and how it travels.

The exchange is one actor beside the driver and knows names only. A courier is an idle actor beside every runner; it
streams the files of an artifact in chunks through Ray's object store, never while its machine is measuring.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.inventory import NODE_ID_LABEL
from tasks.artifacts import ArtifactSpec, find
from tasks.sharing import Alone, Part, disturbing, parts, receive

POLL_S = 1.0
# Who waits asks every POLL_S: who has not asked for this long waits no more.
WAITING_S = 3 * POLL_S
ANSWER_S = 30.0
_IN_FLIGHT = 4  # chunks that a sender is ahead of its receiver


@dataclass(kw_only=True)
class Known:
    """Of one artifact. Slots make and receive, nodes hold and send; times are those of this process's clock.

    `holders` has, of nodes that have it, the slot that said so and its courier; `sends` to which slot a node sends it
    and until when at the most; `makers` until when slots may be making it; `failed` the slots that could not; `asked`
    when slots that were told to wait asked last, and whether they could make it.
    """

    holders: dict[str, tuple[str, Any]] = field(default_factory=dict)
    sends: dict[str, tuple[str, float]] = field(default_factory=dict)
    makers: dict[str, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    asked: dict[str, tuple[float, bool]] = field(default_factory=dict)


class Exchange:
    """One per run. Nodes are Ray's node ids, slots `slot_name` of these, keys are those of artifacts, couriers are
    handles that it only keeps."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}

    def claim(self, key: str, slot: str, limit_s: float, able: bool = True) -> tuple[str, str | None, Any]:
        """What `slot` is to do about an artifact that its node lacks.

        `("fetch", holder, courier)`, which sends this artifact to nobody else meanwhile; `("wait", None, None)`, to ask
        again soon; `("make", None, None)`, which others wait for, `limit_s` at the most, until a first one has failed:
        then all try for themselves; `("lack", None, None)` for a slot that has failed or is not `able`, where nobody
        else makes it or is about to.
        """
        known, now = self._known.setdefault(key, Known()), time.monotonic()
        known.asked.pop(slot, None)
        able = able and slot not in known.failed
        answer = self._answer(known, slot, now, able)
        if answer == "fetch":
            holder = next(holder for holder in self._free(known, slot, now))
            known.sends[holder] = slot, now + limit_s
            return answer, holder, known.holders[holder][1]
        if answer == "make":
            known.makers[slot] = now + limit_s
        if answer == "wait":
            known.asked[slot] = now, able
        return answer, None, None

    def _answer(self, known: Known, slot: str, now: float, able: bool) -> str:
        if any(holder != _node(slot) for holder in known.holders):
            received = any(to != slot and _node(to) == _node(slot) and now < at for to, at in known.sends.values())
            return "fetch" if not received and any(self._free(known, slot, now)) else "wait"
        made = any(maker != slot and now < until for maker, until in known.makers.items())
        if not able:
            coming = any(could and now - at < WAITING_S for at, could in known.asked.values())
            return "wait" if made or coming else "lack"
        return "wait" if made and not known.failed else "make"

    def _free(self, known: Known, slot: str, now: float) -> Iterator[str]:
        for holder in known.holders:
            to, until = known.sends.get(holder, (slot, 0.0))
            if holder != _node(slot) and (to == slot or now >= until):
                yield holder

    def keep(self, key: str, slot: str, courier: Any) -> int:
        """The node of `slot` has it; how many slots of other nodes wait for it."""
        known, now = self._known.setdefault(key, Known()), time.monotonic()
        known.holders[_node(slot)] = slot, courier
        known.failed.discard(slot)
        known.asked.pop(slot, None)
        known.makers.pop(slot, None)
        self.release(key, slot)
        return sum(_node(other) != _node(slot) and now - at < WAITING_S for other, (at, _) in known.asked.items())

    def fail(self, key: str, slot: str) -> None:
        """`slot` could not make it."""
        known = self._known.setdefault(key, Known())
        known.makers.pop(slot, None)
        known.failed.add(slot)

    def release(self, key: str, slot: str) -> None:
        """`slot` receives it no longer."""
        known = self._known.setdefault(key, Known())
        known.sends = {holder: send for holder, send in known.sends.items() if send[0] != slot}

    def drop(self, key: str, node: str) -> None:
        """`node` has it no longer, or does not send it."""
        known = self._known.get(key)
        if known is not None:
            known.holders.pop(node, None)
            known.sends.pop(node, None)

    def forget(self, slot: str) -> None:
        """The runner of `slot` is lost, with its courier: what it made, sent or received."""
        for key, known in self._known.items():
            self.release(key, slot)
            known.makers.pop(slot, None)
            known.asked.pop(slot, None)
            if known.holders.get(_node(slot), ("", None))[0] == slot:
                self.drop(key, _node(slot))


def slot_name(node: str, pid: int) -> str:
    return f"{node}/{pid}"


def _node(slot: str) -> str:
    return slot.partition("/")[0]


class Courier:
    """Sends artifacts of its node's store."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def send(self, maker: str, key: str) -> Iterator[Part]:
        """The files of one artifact in chunks, once the machine measures nothing."""
        with disturbing():
            yield from parts(self._root / maker / key)


class Shared(Alone):
    """A runner's way to the artifacts of the other nodes. Where that fails, it is up to its own node."""

    def __init__(self, exchange: Any, root: Path) -> None:
        import ray

        node: str = ray.get_runtime_context().get_node_id()
        self._exchange, self._slot = exchange, slot_name(node, os.getpid())
        self._courier = _on(node, Courier).remote(str(root))

    def obtain(self, spec: ArtifactSpec, root: Path, limit_s: float, *, able: bool = True) -> None:
        import ray

        deadline = time.monotonic() + limit_s
        with suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError, OSError):
            while time.monotonic() < deadline:
                claim = self._exchange.claim.remote(spec.key, self._slot, limit_s, able)
                what, holder, courier = ray.get(claim, timeout=ANSWER_S)
                if what in ("make", "lack"):
                    return
                if what == "wait":
                    time.sleep(POLL_S)
                    if find(spec, root) is not None:  # another slot of this node has it by now
                        return
                    continue
                try:
                    if receive(spec, root, _arriving(courier, spec, deadline)):
                        return
                except (ray.exceptions.RayError, ValueError):
                    pass
                except OSError:  # this node's own fault: no space, or no time left
                    self._exchange.release.remote(spec.key, self._slot)
                    raise
                ray.get(self._exchange.drop.remote(spec.key, holder), timeout=ANSWER_S)

    def made(self, spec: ArtifactSpec) -> None:
        import ray

        with suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            kept = self._exchange.keep.remote(spec.key, self._slot, self._courier)
            if ray.get(kept, timeout=ANSWER_S):
                time.sleep(2 * POLL_S)  # one of those that wait asks, and is sent it before this slot measures again

    def failed(self, spec: ArtifactSpec) -> None:
        self._exchange.fail.remote(spec.key, self._slot)


def _arriving(courier: Any, spec: ArtifactSpec, deadline: float) -> Iterator[Part]:
    """What a courier sends; it begins when the first part is asked for, when the receiver has made room."""
    import ray

    stream = courier.send.options(num_returns="streaming", _generator_backpressure_num_objects=_IN_FLIGHT).remote(
        spec.maker, spec.key
    )
    while ray.wait([stream], timeout=max(deadline - time.monotonic(), 0.0))[0]:
        try:
            yield ray.get(next(stream))
        except StopIteration:
            return
    raise TimeoutError("what another node sends did not come in time")


def start_exchange() -> Any:
    """An exchange on the driver's node, which ends with the driver."""
    import ray

    return _on(ray.get_runtime_context().get_node_id(), Exchange).remote()


def _on(node: str, actor: type) -> Any:
    import ray

    return ray.remote(actor).options(label_selector={NODE_ID_LABEL: node}, num_cpus=0)

"""What a run on a cluster tells others: its state for `status --address`, and its counts as Prometheus metrics.

Both go through Ray: the state as JSON into the head's key-value store, the counts into the metrics that every node
exports where Ray was installed with its extra `default`. Neither may disturb the run: what fails is left out.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.durable import utc_now

NAMESPACE = b"benchmatrix"
PUBLISH_S = 5.0
FAILED_S = 60.0  # a call that fails may take its time, and the run waits for it
# The store is the head's memory: older runs make room.
KEPT_RUNS = 20
_MESSAGES = 5
_WALL_TIMES = 50

Lanes = Mapping[str, tuple[str, str, float]]  # slot -> hardware tag, what it does, since when (monotonic)


class Watch:
    """Told of every row and of the slots' state; publishes every few seconds.

    Args:
        run: `run_id`, `sweep`, `out`: plain data that names the run.
        left: hardware tag -> runs that have not begun.
    """

    def __init__(self, run: Mapping[str, Any], left: Callable[[], Mapping[str, int]]) -> None:
        self._left = left
        self._state: dict[str, Any] = {**run, "host": socket.gethostname(), "pid": os.getpid(), "started_at": utc_now()}
        self._outcomes: dict[str, Counter[str]] = {}
        self._wall_s: dict[str, deque[float]] = {}
        self._messages: deque[str] = deque(maxlen=_MESSAGES)
        self._next = 0.0  # when to publish again
        self._runs, self._runs_left, self._slots = _metrics()
        self._tags = {"sweep": str(run["sweep"]), "run_id": str(run["run_id"])}

    def finished(self, row: Mapping[str, Any], seconds: float | None) -> None:
        """A row is there; `seconds` is what its run took, None for a cell that was not run."""
        tag, outcome = str(row["hardware"]), str(row["outcome"])
        self._outcomes.setdefault(tag, Counter())[outcome] += 1
        if seconds is not None:
            self._wall_s.setdefault(tag, deque(maxlen=_WALL_TIMES)).append(seconds)
        if self._runs is not None:
            self._runs.inc(1, tags={**self._tags, "hardware": tag, "outcome": outcome})

    def said(self, text: str) -> None:
        self._messages.append(f"{utc_now()} {text}")

    def refresh(self, lanes: Lanes, *, now: bool = False) -> None:
        """Publish, at most every few seconds unless `now`."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PUBLISH_S
        try:
            self._publish(lanes)
        except Exception as error:  # Ray's own errors are of many kinds; the dispatcher meets them where they matter
            self._next = time.monotonic() + FAILED_S
            self._messages.append(f"the state could not be published: {type(error).__name__}")

    def close(self, status: int) -> None:
        """The run has ended with this exit status."""
        self._state["ended"] = {"at": utc_now(), "status": status}
        self.refresh({}, now=True)

    def document(self, lanes: Lanes) -> dict[str, Any]:
        """The state as it is published."""
        left = {tag: number for tag, number in self._left().items() if number}
        running = {
            slot: {"hardware": tag, "doing": doing, "seconds": round(time.monotonic() - since, 1)}
            for slot, (tag, doing, since) in lanes.items()
        }
        return {
            **self._state,
            "updated_at": utc_now(),
            "outcomes": {tag: dict(counts) for tag, counts in self._outcomes.items()},
            "running": running,
            "left": left,
            "seconds_left": self._seconds_left(left, running),
            "messages": list(self._messages),
        }

    def _seconds_left(self, left: Mapping[str, int], running: Mapping[str, Any]) -> dict[str, float]:
        at_work = Counter(lane["hardware"] for lane in running.values())
        means = {tag: sum(times) / len(times) for tag, times in self._wall_s.items()}
        return {tag: round(left[tag] * means[tag] / max(at_work[tag], 1), 1) for tag in left if tag in means}

    def _publish(self, lanes: Lanes) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        state = self.document(lanes)
        if self._runs_left is not None and self._slots is not None:
            for tag in {*self._outcomes, *state["left"]}:
                self._runs_left.set(state["left"].get(tag, 0), tags={**self._tags, "hardware": tag})
            busy = Counter(tag for tag, _, _ in lanes.values())
            for tag in {*self._outcomes, *busy}:
                self._slots.set(busy[tag], tags={**self._tags, "hardware": tag})
        key = f"{self._state['started_at']} {self._state['run_id']}".encode()
        first = "published" not in self._state
        self._state["published"] = True
        _internal_kv_put(key, json.dumps(state).encode(), overwrite=True, namespace=NAMESPACE)
        if first:
            _forget_old()


def _metrics() -> tuple[Any, Any, Any]:
    """Counter of runs, gauges of runs left and slots at work; None where this Ray cannot count."""
    try:
        from ray.util.metrics import Counter as RayCounter
        from ray.util.metrics import Gauge

        tags = ("sweep", "run_id", "hardware")
        return (
            RayCounter("benchmatrix_runs", "Finished runs of cells by outcome.", tag_keys=(*tags, "outcome")),
            Gauge("benchmatrix_runs_left", "Runs that have not begun.", tag_keys=tags),
            Gauge("benchmatrix_slots_at_work", "Bench slots that start, prepare or measure.", tag_keys=tags),
        )
    except Exception:  # whatever Ray's agent, its exporter or a missing extra raises: no metric is worth a run
        return None, None, None


def _forget_old() -> None:
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list

    for key in sorted(_internal_kv_list(b"", namespace=NAMESPACE))[:-KEPT_RUNS]:
        _internal_kv_del(key, namespace=NAMESPACE)


def read_states() -> list[dict[str, Any]]:
    """The states of the last runs on the connected cluster, oldest first."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    keys = sorted(_internal_kv_list(b"", namespace=NAMESPACE))
    found = [_internal_kv_get(key, namespace=NAMESPACE) for key in keys]
    return [json.loads(data) for data in found if data]

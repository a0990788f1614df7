"""What a call did on the host and on the device, from PyTorch's profiler.

Read from its trace file: the list of events that the profiler makes takes 0.1 ms per event, a second for one request.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.session import Session

HOST = ("cpu_op", "user_annotation")
KERNEL, COPY = "kernel", "gpu_memcpy"


@dataclass(frozen=True, eq=False)
class Event:
    """Something with a beginning and an end; `parent` is what it happened in, on the same thread or stream.

    `stream` is the device's, -1 for what happened on the host.
    """

    name: str
    category: str
    start_us: float
    end_us: float
    stream: int = -1
    parent: Event | None = field(default=None, repr=False)


def traced(call: Callable[[], None], *, device: bool) -> list[Event]:
    """The events of a call in the order of their beginnings, those of the CUDA device only if asked for.

    The call must wait for the device itself. The first start of the device's profiler takes a second.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device else [])]
    with profile(activities=activities) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        seen.export_chrome_trace(str(path))
        return events_of(json.loads(path.read_text(encoding="utf-8", errors="replace")))


def traced_step(session: Session, *, device: bool) -> list[Event]:
    """The events of one short call of the session's step."""

    def call() -> None:
        assert session.step is not None
        session.step.run_short()
        session.synchronize()

    return traced(call, device=device)


def events_of(trace: dict[str, Any]) -> list[Event]:
    """The events of a trace in Chrome's format, each below the innermost one that encloses it."""
    found: list[Event] = []
    open_on: dict[Any, list[Event]] = {}
    spans = [entry for entry in trace["traceEvents"] if entry.get("ph") == "X" and "cat" in entry]
    for entry in sorted(spans, key=lambda entry: (entry["ts"], -entry["dur"])):
        start, end = entry["ts"], entry["ts"] + entry["dur"]
        enclosing = open_on.setdefault((entry["pid"], entry["tid"]), [])
        while enclosing and enclosing[-1].end_us < end:
            enclosing.pop()
        parent = enclosing[-1] if enclosing else None
        event = Event(entry["name"], entry["cat"], start, end, entry.get("args", {}).get("stream", -1), parent)
        enclosing.append(event)
        found.append(event)
    return found

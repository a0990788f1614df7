"""The fastest CPU for the thread that launches GPU work.

On a shared host one virtual CPU may run at little more than half the speed of the next one for minutes, when its
physical core is shared with somebody else's work; no counter inside the machine shows it. Work that waits for the host
then differs by as much from process to process. So each CPU is tried for some milliseconds with a fixed loop, and the
launching thread stays on one of those that were as fast as the best.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.interference import canary_s

AS_FAST = 1.02
AT_MOST = 32  # CPUs that are tried: 3 ms each


@dataclass(frozen=True, kw_only=True)
class CoreChoice:
    """`cpus` are those that the thread may use now; `canary_ms` is the loop on the fastest, `slowest_ms` on the
    slowest of the `tried`."""

    cpus: tuple[int, ...]
    tried: int
    canary_ms: float
    slowest_ms: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cpus": list(self.cpus)}


def stay_on_fast_cores(canary: Callable[[int], float] = canary_s) -> CoreChoice | None:
    """Bind the launching threads (this one, and autograd's) to the fastest of their CPUs; None with one CPU."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        return None
    tried = evenly(allowed, AT_MOST)
    seconds: dict[int, float] = {}
    try:
        for cpu in tried:
            os.sched_setaffinity(0, {cpu})
            seconds[cpu] = canary(3)
    finally:
        os.sched_setaffinity(0, allowed)
    chosen = fastest(seconds)
    for thread in (0, *_autograd_threads()):
        os.sched_setaffinity(thread, chosen)
    return CoreChoice(
        cpus=tuple(chosen),
        tried=len(tried),
        canary_ms=min(seconds.values()) * 1e3,
        slowest_ms=max(seconds.values()) * 1e3,
    )


def fastest(seconds: dict[int, float]) -> list[int]:
    """CPUs whose loop took at most `AS_FAST` times the least, and two in any case: telemetry needs one too."""
    limit = AS_FAST * min(seconds.values())
    ranked = sorted(seconds, key=lambda cpu: seconds[cpu])
    return sorted(cpu for rank, cpu in enumerate(ranked) if rank < 2 or seconds[cpu] <= limit)


def _autograd_threads() -> list[int]:
    """Threads of this process that run backward passes, and so launch their kernels."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it may just have ended
            if (task / "comm").read_text().startswith("pt_autograd"):
                found.append(int(task.name))
    return found


def evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of `items`, spread evenly."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]

"""A scripted GPU with a known truth, for tests and for trying the instruments on a machine without one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from tasks.gpu import EventReason, Gpu, GpuFacts, GpuProcess

T = TypeVar("T")


class ManualClock:
    """A clock that moves only when told; `sleep` tells it."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.0)


Steps = Sequence[tuple[float, float]]  # (from this second on, this value); the first also holds before it


class FakeGpu(Gpu):
    """A card that follows a script over `clock`, for tests and for trying the instruments without a card.

    `power_w`, `sm_clock_mhz`, `temperature_c` and `event_reasons` are a value or steps `[(second, value), ...]`. The
    energy counter integrates the power exactly and shows it at every multiple of `tick_s` plus `phase_s`; it starts
    again at zero at `reset_at_s`, overflows at `wrap_mj` and stops changing at `stuck_at_s`. Queries named in
    `unsupported` answer as if the card had them not.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        power_w: float | Steps = 300.0,
        tick_s: float = 0.1,
        phase_s: float = 0.0,
        start_mj: int = 1_000_000,
        reset_at_s: float | None = None,
        wrap_mj: int | None = None,
        stuck_at_s: float | None = None,
        sm_clock_mhz: float | Steps = 1980.0,
        temperature_c: float | Steps = 40.0,
        event_reasons: float | Steps = 0.0,
        slowdown_ns: dict[str, int] | None = None,
        processes: tuple[GpuProcess, ...] | None = (),
        utilization_percent: float = 0.0,
        facts: GpuFacts | None = None,
        unsupported: Collection[str] = (),
    ) -> None:
        self.clock = clock
        self.power = _steps(power_w)
        self.tick_s, self.phase_s, self.start_mj = tick_s, phase_s, start_mj
        self.reset_at_s, self.wrap_mj, self.stuck_at_s = reset_at_s, wrap_mj, stuck_at_s
        self.clocks, self.temperature, self.reasons = _steps(sm_clock_mhz), _steps(temperature_c), _steps(event_reasons)
        self.counters = dict(slowdown_ns or {})
        self.running, self.utilization, self.unsupported = processes, utilization_percent, frozenset(unsupported)
        self.identity = facts or GpuFacts(
            name="NVIDIA Fake", uuid="GPU-fake", index=0, driver="0.0", compute_capability=(9, 0), memory_bytes=2**34
        )

    def joules_between(self, start_s: float, end_s: float) -> float:
        """The truth: the integral of the scripted power."""
        times = [start_s, *(at for at, _ in self.power if start_s < at < end_s), end_s]
        return sum(_at(self.power, a) * (b - a) for a, b in pairwise(times))

    def facts(self) -> GpuFacts:
        return replace(self.identity, **dict.fromkeys(self.unsupported & set(GpuFacts.__dataclass_fields__)))

    def total_energy_mj(self) -> int | None:
        if "total_energy_mj" in self.unsupported:
            return None
        now = self.clock() if self.stuck_at_s is None else min(self.clock(), self.stuck_at_s)
        # The margin keeps 7.000000001 - 7 from costing a tick.
        shown = (now - self.phase_s + 1e-9) // self.tick_s * self.tick_s + self.phase_s
        if self.reset_at_s is not None and shown >= self.reset_at_s:
            value = self.joules_between(self.reset_at_s, shown) * 1000
        else:
            value = self.start_mj + self.joules_between(min(0.0, shown), shown) * 1000
        return round(value) if self.wrap_mj is None else round(value) % self.wrap_mj

    def power_w(self) -> float | None:
        return self._tell("power_w", _at(self.power, self.clock()))

    def power_average_w(self) -> float | None:
        return self._tell("power_average_w", self.joules_between(self.clock() - 1.0, self.clock()))

    def power_limit_w(self) -> float | None:
        return self._tell("power_limit_w", 700.0)

    def sm_clock_mhz(self) -> int | None:
        return self._tell("sm_clock_mhz", int(_at(self.clocks, self.clock())))

    def memory_clock_mhz(self) -> int | None:
        return self._tell("memory_clock_mhz", 3201)

    def clocks_locked(self) -> bool | None:
        return self._tell("clocks_locked", False)

    def temperature_c(self) -> int | None:
        return self._tell("temperature_c", int(_at(self.temperature, self.clock())))

    def event_reasons(self) -> EventReason | None:
        return self._tell("event_reasons", EventReason(int(_at(self.reasons, self.clock()))))

    def slowdown_ns(self) -> dict[str, int]:
        return self._tell("slowdown_ns", dict(self.counters)) or {}

    def memory_used_bytes(self) -> int | None:
        return self._tell("memory_used_bytes", sum(process.memory_bytes or 0 for process in self.running or ()))

    def processes(self) -> tuple[GpuProcess, ...] | None:
        return self._tell("processes", self.running)

    def utilization_percent(self) -> float | None:
        return self._tell("utilization_percent", self.utilization)

    def _tell(self, query: str, value: T) -> T | None:
        return None if query in self.unsupported else value


def _steps(script: float | Steps) -> Steps:
    return [(0.0, float(script))] if isinstance(script, int | float) else script


def _at(steps: Steps, now: float) -> float:
    return steps[max(bisect_right([at for at, _ in steps], now) - 1, 0)][1]

"""Clocks, temperature, power and event reasons of a GPU, sampled by a thread beside the throughput pass.

The latency pass is timed with the thread paused: it then asks nothing and wakes nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tasks.cores import step_aside
from tasks.gpu import POWER_CAP_COUNTER, THROTTLING, EventReason, Gpu

CLOCK_DRIFT = 0.02
IDLE_FRACTION, IDLE_SAMPLES = 0.10, 2  # with the GPU-idle bit: the host or the input did not keep up


class TelemetrySample(NamedTuple):
    """One look at the card, `at_s` on the sampler's clock; None where it does not tell."""

    at_s: float
    sm_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    reasons: EventReason | None


@dataclass(frozen=True, kw_only=True)
class TelemetrySummary:
    """What the samples say; None where nothing was told. Fractions are of the samples that told event reasons.

    `clock_drift` is median SM clock of the second half over that of the first, minus one. `throttled_by` names the
    event reasons and cumulative counters that saw a thermal or power-brake slowdown. A software power cap is normal
    for large matrix products and only recorded. Flags: `throttled`, `clock_drift`, `gpu_idle`.
    """

    samples: int
    sm_clock_mhz_median: float | None
    clock_drift: float | None
    power_w_median: float | None
    power_capped_fraction: float | None
    power_capped_s: float | None
    gpu_idle_fraction: float | None
    throttled: bool | None
    throttled_by: tuple[str, ...]
    temperature_c_start: float | None
    temperature_c_end: float | None
    flags: tuple[str, ...]


class Telemetry:
    """Samples every `period_s` (2 to 10 Hz) from `start` to `stop`, except between `pause` and `resume`."""

    def __init__(self, gpu: Gpu, *, period_s: float = 0.2, clock: Callable[[], float] = time.perf_counter) -> None:
        self._gpu, self._period_s, self._clock = gpu, period_s, clock
        self.samples: list[TelemetrySample] = []
        self._asking = threading.Lock()
        self._awake, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._counters_before: dict[str, int] | None = None

    def start(self, *, paused: bool = False) -> None:
        """Begin; `paused` leaves the thread asleep until `resume`. Without a card there is no thread at all."""
        self.count()
        if self._gpu.unavailable is not None or self._thread is not None:
            return
        if not paused:
            self._awake.set()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def count(self) -> None:
        """From here on slow-downs count that the card's own counters see: also while nobody samples."""
        if self._counters_before is None:
            self._counters_before = self._gpu.slowdown_ns()

    def pause(self) -> None:
        """Stop asking; on return no query is under way."""
        self._awake.clear()
        with self._asking:
            pass

    def resume(self) -> None:
        self._awake.set()

    def stop(self) -> TelemetrySummary:
        """End, and sum up all samples. May be called without `start`."""
        self._stopped.set()
        self._awake.set()
        if self._thread is not None:
            self._thread.join()
        return summarize(self.samples, self._counters_before or {}, self._gpu.slowdown_ns())

    def sample(self) -> None:
        """One look now."""
        gpu = self._gpu
        self.samples.append(
            TelemetrySample(self._clock(), gpu.sm_clock_mhz(), gpu.temperature_c(), gpu.power_w(), gpu.event_reasons())
        )

    def clocks(self, since_s: float = 0.0) -> tuple[list[float], list[float]]:
        """SM clocks in MHz and when, in seconds after `since_s` on the sampler's clock: for `SampleSeries`."""
        known = [(float(item.sm_clock_mhz), item.at_s - since_s) for item in self.samples if item.sm_clock_mhz]
        return [mhz for mhz, _ in known], [at for _, at in known]

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._awake.wait()
            step_aside()
            with self._asking:
                if self._awake.is_set() and not self._stopped.is_set():
                    self.sample()
            self._stopped.wait(self._period_s)


def summarize(
    samples: Sequence[TelemetrySample], counters_before: dict[str, int], counters_after: dict[str, int]
) -> TelemetrySummary:
    """Sum up samples, and what the cumulative slow-down counters (nanoseconds) gained meanwhile."""
    clocks = [sample.sm_clock_mhz for sample in samples if sample.sm_clock_mhz is not None]
    powers = [sample.power_w for sample in samples if sample.power_w is not None]
    temperatures = [sample.temperature_c for sample in samples if sample.temperature_c is not None]
    reasons = [sample.reasons for sample in samples if sample.reasons is not None]
    gained = {name: counters_after[name] - counters_before[name] for name in counters_before if name in counters_after}
    causes = sorted(
        {reason.name.lower() for bits in reasons for reason in THROTTLING & bits if reason.name}
        | {name for name, nanoseconds in gained.items() if name != POWER_CAP_COUNTER and nanoseconds > 0}
    )
    throttled = bool(causes) if reasons or gained else None
    drift = _drift(clocks)
    idle = _fraction(reasons, EventReason.GPU_IDLE)
    findings = {
        "throttled": bool(throttled),
        "clock_drift": drift is not None and abs(drift) > CLOCK_DRIFT,
        "gpu_idle": idle is not None and idle >= IDLE_FRACTION and round(idle * len(reasons)) >= IDLE_SAMPLES,
    }
    return TelemetrySummary(
        samples=len(samples),
        sm_clock_mhz_median=float(np.median(clocks)) if clocks else None,
        clock_drift=drift,
        power_w_median=float(np.median(powers)) if powers else None,
        power_capped_fraction=_fraction(reasons, EventReason.SW_POWER_CAP),
        power_capped_s=gained[POWER_CAP_COUNTER] / 1e9 if POWER_CAP_COUNTER in gained else None,
        gpu_idle_fraction=idle,
        throttled=throttled,
        throttled_by=tuple(causes),
        temperature_c_start=float(temperatures[0]) if temperatures else None,
        temperature_c_end=float(temperatures[-1]) if temperatures else None,
        flags=tuple(name for name, found in findings.items() if found),
    )


def _drift(clocks: Sequence[int]) -> float | None:
    """Second half over first half, minus one; the middle of an odd number belongs to neither."""
    half = len(clocks) // 2
    if half == 0:
        return None
    first = float(np.median(clocks[:half]))
    return float(np.median(clocks[-half:])) / first - 1.0 if first > 0 else None


def _fraction(reasons: Sequence[EventReason], bit: EventReason) -> float | None:
    return sum(bit in bits for bits in reasons) / len(reasons) if reasons else None

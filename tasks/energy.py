"""Energy of a stretch of work: a thread watches NVML's counter while chunks run; RAPL around chunks on a CPU.

`tasks/energy_window.py` holds the arithmetic and says why it is done so.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from tasks.cores import step_aside
from tasks.energy_window import (
    MIN_TICKS,
    STUCK_S,
    Edge,
    EnergyReading,
    Reading,
    find_edges,
    from_counter,
    from_power,
    pool,
    short_chunks,
)
from tasks.gpu import Gpu
from tasks.interference import FOREIGN_GPU_PERCENT, foreign_processes
from tasks.metric import Missing
from tasks.rapl import Rapl

__all__ = ["EnergyReading", "calls_per_chunk", "idle_power", "measure", "measure_cpu", "pool", "probe_tick"]

POWER_PERIOD_S = 0.06  # 10 to 20 Hz
SHARED = "shared_gpu"
_CHUNK_TICKS = 0.25
_RAPL_TICK_S = 0.001
_LEARN_EDGES = 5
_MIN_POLLED_S = 1.0

Clock = Callable[[], float]


def calls_per_chunk(call_s: float, tick_s: float) -> int:
    """Calls that fill a quarter of a tick: long against a synchronisation, short against the window."""
    return max(1, round(_CHUNK_TICKS * tick_s / max(call_s, 1e-9)))


def probe_tick(
    gpu: Gpu, clock: Clock = time.perf_counter, sleep: Callable[[float], None] = time.sleep, seconds: float = 2.0
) -> float | Missing:
    """Seconds between changes of the counter, the least of up to eight; at most `seconds` of looking."""
    readings = _watch(gpu, clock, sleep, seconds, enough=9, poll_s=0.001)
    if isinstance(readings, Missing):
        return readings
    edges = find_edges(readings)
    if isinstance(edges, Missing):
        return edges
    if len(edges) < 2:
        return Missing(reason="counter_stuck")
    return min(after.time - before.time for before, after in pairwise(edges))


def idle_power(
    gpu: Gpu,
    clock: Clock = time.perf_counter,
    seconds: float = 2.0,
    sleep: Callable[[float], None] = time.sleep,
    tick_s: float = 0.1,
) -> float | Missing:
    """Watts from jump to jump of the counter while the caller leaves the device alone.

    Before the caller has a context on it, this is the power of the idle card; with one, of the idle context too.
    """
    readings = _watch(gpu, clock, sleep, seconds, poll_s=_poll_s(tick_s))
    if isinstance(readings, Missing):
        return readings
    edges = find_edges(readings)
    if isinstance(edges, Missing):
        return edges
    if len(edges) < 2:
        return Missing(reason="counter_stuck" if seconds >= MIN_TICKS * tick_s else "window_too_short")
    return (edges[-1].joules - edges[0].joules) / (edges[-1].time - edges[0].time)


def measure(
    run_chunk: Callable[[], float],
    gpu: Gpu,
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
    window_s: float,
    tick_s: float = 0.1,
    idle_power_w: float | None = None,
    other_gpus: Sequence[Gpu] = (),
    background: bool = True,
) -> EnergyReading | Missing:
    """Run chunks until the device was busy for a window of at least `window_s` and 20 ticks; its energy.

    `run_chunk` issues some whole calls (`calls_per_chunk`) and returns how many units they do; `synchronize` then
    waits for them. `tick_s` is where to start from: the thread learns the counter's own. `background=False` reads the
    counter after each chunk instead of in a thread, for clocks that do not run by themselves. Null reasons:
    nvml_missing, not_supported, mig, shared_gpu, counter_reset, counter_stuck, window_too_short.
    """
    if gpu.unavailable is not None:
        return Missing(reason=gpu.unavailable)
    if gpu.facts().mig:
        return Missing(reason="mig")
    counter = gpu.total_energy_mj() is not None
    if not counter and gpu.power_w() is None:
        return Missing(reason="not_supported")
    sharing = _sharing(gpu, other_gpus)
    if isinstance(sharing, Missing):
        return sharing
    chunks = [(clock(), 0.0)]
    meter = _Meter(gpu, clock, tick_s, chunks[0][0])
    with meter.watching(background):
        while not meter.done(chunks, window_s, counter):
            units = chunks[-1][1] + run_chunk()
            synchronize()
            chunks.append((clock(), units))
            if not background:
                meter.look()
    after = _sharing(gpu, other_gpus)
    if isinstance(after, Missing):
        return after
    if counter:
        reading = from_counter(
            meter.readings,
            chunks,
            meter.powers,
            tick_s=meter.tick_s,
            need_s=meter.need_s(window_s),
            counts_from=meter.counts_from,
        )
    else:
        reading = from_power(meter.powers, chunks, need_s=max(window_s, _MIN_POLLED_S))
    if isinstance(reading, Missing):
        return reading
    flags = tuple(dict.fromkeys((*reading.flags, *sharing, *after)))
    return replace(reading, idle_power_w=idle_power_w, flags=flags)


def measure_cpu(
    run_chunk: Callable[[], float],
    rapl: Rapl | Missing,
    *,
    clock: Clock = time.perf_counter,
    window_s: float,
    idle_power_w: float | None = None,
) -> EnergyReading | Missing:
    """Energy of all packages and their DRAM, other processes included, while chunks run; windows of at least 1 s.

    The counters change every millisecond, so nothing watches them meanwhile: the CPU is what is measured.
    """
    if isinstance(rapl, Missing):
        return rapl
    run_chunk()
    begun, before, units = clock(), rapl.joules(), 0.0
    while (elapsed := clock() - begun) < max(window_s, 1.0):
        units += run_chunk()
    joules = rapl.joules() - before
    if joules <= 0:
        return Missing(reason="counter_stuck")
    return EnergyReading(
        source="rapl",
        joules=joules,
        elapsed_s=elapsed,
        units=units,
        relative_uncertainty=2 * _RAPL_TICK_S / elapsed,
        idle_power_w=idle_power_w,
    )


class _Meter:
    """Reads the counter often around its jumps, seldom between them, and the power at 10 to 20 Hz."""

    def __init__(self, gpu: Gpu, clock: Clock, tick_s: float, began: float) -> None:
        self._gpu, self._clock, self.tick_s = gpu, clock, tick_s
        self.readings: list[Reading] = []
        self.powers: list[tuple[float, float]] = []
        self.edges: list[Edge] = []  # those that count: after a whole tick of work
        self.counts_from = began + tick_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watching(self, background: bool) -> _Meter:
        self.look()
        if background:
            self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)
        return self

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        begun = self._clock()
        millijoules = self._gpu.total_energy_mj()
        ended = self._clock()
        if millijoules is not None:
            before = self.readings[-1] if self.readings else None
            if before and before.millijoules != millijoules and before.begun >= self.counts_from:
                self.edges.append(Edge(before.begun, ended, millijoules / 1000))
            self.readings.append(Reading(begun, ended, millijoules))
        if not self.powers or ended >= self.powers[-1][0] + POWER_PERIOD_S:
            watts = self._gpu.power_w()
            if watts is not None:
                self.powers.append((self._clock(), watts))

    def _watch(self) -> None:
        delay = poll_s = _poll_s(self.tick_s)
        learned = False
        step_aside()
        while not self._stop.wait(delay):
            step_aside()
            self.look()
            delay = poll_s
            if not learned and len(self.edges) >= _LEARN_EDGES:
                self.tick_s = min(after.time - before.time for before, after in pairwise(self.edges))
                learned, poll_s = True, _poll_s(self.tick_s)
            if learned:
                quiet_s = self.edges[-1].time + 0.8 * self.tick_s - self._clock()
                delay = max(poll_s, min(quiet_s, POWER_PERIOD_S / 2))

    def need_s(self, window_s: float) -> float:
        return max(window_s, MIN_TICKS * self.tick_s)

    def done(self, chunks: Sequence[tuple[float, float]], window_s: float, counter: bool) -> bool:
        """Whether the window is complete, or never will be; costs microseconds, since the device idles meanwhile."""
        began, now = chunks[0][0], chunks[-1][0]
        if len(chunks) < 2:
            return False
        if not counter:
            return now - chunks[1][0] >= max(window_s, _MIN_POLLED_S) and len(self.powers) >= 12
        seen = [edge for edge in self.edges[-3:] if edge.late <= now]  # the thread may be ahead of the chunk
        silent_s = now - (seen[-1].time if seen else began)
        if silent_s > max(MIN_TICKS * self.tick_s, STUCK_S) and len(chunks) > 2:
            return True
        if not seen:
            return False
        first = self.edges[0].time
        need_s = 0.995 * self.need_s(window_s)  # jumps are located to milliseconds: not one tick more for that
        if short_chunks(chunks, self.tick_s):
            return seen[-1].time - first >= need_s
        return now - chunks[bisect_left(chunks, (first, 0.0))][0] >= need_s


def _poll_s(tick_s: float) -> float:
    return min(max(tick_s / 50, 0.001), 0.01)


def _watch(
    gpu: Gpu, clock: Clock, sleep: Callable[[float], None], seconds: float, *, poll_s: float, enough: int | None = None
) -> list[Reading] | Missing:
    """Readings of the counter over `seconds`, or until it has changed `enough` times."""
    if gpu.unavailable is not None:
        return Missing(reason=gpu.unavailable)
    if gpu.facts().mig:
        return Missing(reason="mig")
    began, changes = clock(), 0
    readings: list[Reading] = []
    while clock() - began <= seconds and (enough is None or changes < enough):
        begun = clock()
        millijoules = gpu.total_energy_mj()
        if millijoules is None:
            return Missing(reason="not_supported")
        changes += bool(readings) and millijoules != readings[-1].millijoules
        readings.append(Reading(begun, clock(), millijoules))
        sleep(poll_s)
    return readings


def _sharing(gpu: Gpu, other_gpus: Sequence[Gpu]) -> tuple[str, ...] | Missing:
    """Flags about who else uses the device; `shared_gpu` as a reason when they are at work on it."""
    flags: list[str] = []
    foreign = foreign_processes(gpu, resident=True)
    if any((process.utilization_percent or 0.0) > FOREIGN_GPU_PERCENT for process in foreign):
        return Missing(reason=SHARED)
    if foreign:
        flags.append(SHARED)
    if any(process.pid == os.getpid() for other in other_gpus for process in other.processes() or ()):
        flags.append("several_gpus")
    return tuple(flags)

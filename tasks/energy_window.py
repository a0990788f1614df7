"""The arithmetic of an energy window: from readings of a counter and ends of chunks to joules with a bound.

The counter is a staircase: every tick (0.1 s on an H200) it jumps to the energy used up to then, so two arbitrary
readings are off by up to a tick at each end, 10 % of one second. Here the device is kept busy with chunks of work,
every jump is located in time, and only energy between jumps is counted:

- chunks not longer than a tick: the window runs from jump to jump. Its joules are exact; the units done in it are
  interpolated inside the two chunks that hold its ends.
- longer chunks: the window runs from chunk end to chunk end. Its units are exact; its joules are interpolated inside
  the two ticks that hold its ends.

A jump counts only after a whole tick of work, so the device is busy at both ends. `relative_uncertainty` is the bound
that follows, not a standard error: everything that could be misplaced inside those two chunks or ticks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from tasks.metric import Missing

MIN_TICKS = 20
STUCK_S = 2.0  # a counter without a jump for this long, and for 20 ticks, is stuck
CROSS_CHECK_TOLERANCE = 0.05
MIN_POWER_SAMPLES = 10

Source = Literal["nvml_counter", "nvml_power", "rapl"]


@dataclass(frozen=True, kw_only=True)
class EnergyReading:
    """Energy of one window. Gross joules hold the idle share; `net_joules` is without `idle_power_w` x `elapsed_s`.

    `units` were done in the window. `relative_uncertainty` bounds the error of `joules_per_unit`. `polled_joules` is
    the same window from instantaneous power, zero-order hold over all samples; None without at least ten samples.
    Flags: `energy_suspect` (the two differ by more than 5 %), `energy_polled` (no counter, the polled figure is all),
    `shared_gpu` (others hold a context on the device, idle), `several_gpus` (this process also uses another card,
    which is not counted).
    """

    source: Source
    joules: float
    elapsed_s: float
    units: float
    relative_uncertainty: float
    ticks: int | None = None
    idle_power_w: float | None = None
    polled_joules: float | None = None
    power_samples: int = 0
    flags: tuple[str, ...] = ()

    @property
    def mean_w(self) -> float:
        return self.joules / self.elapsed_s

    @property
    def joules_per_unit(self) -> float:
        return self.joules / self.units

    @property
    def units_per_s(self) -> float:
        return self.units / self.elapsed_s

    @property
    def net_joules(self) -> float | None:
        return None if self.idle_power_w is None else self.joules - self.idle_power_w * self.elapsed_s

    @property
    def net_joules_per_unit(self) -> float | None:
        return None if self.net_joules is None else self.net_joules / self.units


class Reading(NamedTuple):
    """One look at the counter: it held `millijoules` at some moment between `begun` and `ended`."""

    begun: float
    ended: float
    millijoules: int


class Edge(NamedTuple):
    """A jump of the counter, somewhere between `early` and `late`, to `joules`."""

    early: float
    late: float
    joules: float

    @property
    def time(self) -> float:
        return (self.early + self.late) / 2


def find_edges(readings: Sequence[Reading]) -> list[Edge] | Missing:
    """The counter's jumps; `counter_reset` when it ever fell."""
    edges: list[Edge] = []
    for before, after in pairwise(readings):
        if after.millijoules < before.millijoules:
            return Missing(reason="counter_reset")
        if after.millijoules > before.millijoules:
            edges.append(Edge(before.begun, after.ended, after.millijoules / 1000))
    return edges


def from_counter(
    readings: Sequence[Reading],
    chunks: Sequence[tuple[float, float]],
    powers: Sequence[tuple[float, float]],
    *,
    tick_s: float,
    need_s: float,
    counts_from: float | None = None,
) -> EnergyReading | Missing:
    """The energy of the widest window inside `chunks`, which are `(end time, units so far)` from `(begin, 0)` on.

    Jumps count after `counts_from`, by default a tick after the begin.
    """
    found = find_edges(readings)
    if isinstance(found, Missing):
        return found
    counts_from = chunks[0][0] + tick_s if counts_from is None else counts_from
    busy = [edge for edge in found if edge.early >= counts_from and edge.late <= chunks[-1][0]]
    if len(busy) < 2:
        stuck = chunks[-1][0] - chunks[0][0] >= MIN_TICKS * tick_s
        return Missing(reason="counter_stuck" if stuck else "window_too_short")
    times, done = [at for at, _ in chunks], [units for _, units in chunks]
    edge_times, joules = [edge.time for edge in busy], [edge.joules for edge in busy]
    silence = times[-1] - edge_times[-1]
    if silence > max(MIN_TICKS * tick_s, STUCK_S):
        return Missing(reason="counter_stuck")
    # Long chunks end between jumps: the last few ticks' power carries the energy on, as a rule for less than a tick.
    recent = -min(len(busy), 6)
    last_w = (joules[-1] - joules[recent]) / (edge_times[-1] - edge_times[recent])
    ahead = (times[-1], joules[-1] + last_w * silence) if silence > 0 else None
    curve_times = [*edge_times, ahead[0]] if ahead else edge_times
    curve = [*joules, ahead[1]] if ahead else joules

    by_tick = short_chunks(chunks, tick_s)
    start = edge_times[0] if by_tick else times[bisect_left(times, edge_times[0])]
    end = edge_times[-1] if by_tick else times[-1]
    elapsed = end - start
    if elapsed < need_s * 0.98 or elapsed <= 0:
        return Missing(reason="window_too_short")
    gained = float(np.interp(end, curve_times, curve) - np.interp(start, curve_times, curve))
    units = float(np.interp(end, times, done) - np.interp(start, times, done))
    if units <= 0 or gained <= 0:
        return Missing(reason="window_too_short")
    if by_tick:
        misplaced = _misplaced(busy[0].early, busy[0].late, times, done)
        misplaced += _misplaced(busy[-1].early, busy[-1].late, times, done)
        bound = misplaced / units
    else:
        slack = max((edge.late - edge.early) / 2 for edge in busy)
        misplaced = _misplaced(start - slack, start + slack, curve_times, curve)
        bound = (misplaced + last_w * (max(silence, 0.0) + slack)) / gained
    polled, samples = hold(powers, start, end)
    suspect = polled is not None and abs(polled / gained - 1.0) > CROSS_CHECK_TOLERANCE
    return EnergyReading(
        source="nvml_counter",
        joules=gained,
        elapsed_s=elapsed,
        units=units,
        relative_uncertainty=bound,
        ticks=sum(start < at <= end for at in edge_times),
        polled_joules=polled,
        power_samples=samples,
        flags=("energy_suspect",) if suspect else (),
    )


def from_power(
    powers: Sequence[tuple[float, float]], chunks: Sequence[tuple[float, float]], *, need_s: float
) -> EnergyReading | Missing:
    """Without a counter: instantaneous power held from sample to sample, over all chunks after the first."""
    start, end = chunks[min(1, len(chunks) - 1)], chunks[-1]
    elapsed, units = end[0] - start[0], end[1] - start[1]
    joules, samples = hold(powers, start[0], end[0])
    if joules is None or joules <= 0 or units <= 0 or elapsed < need_s * 0.98:
        return Missing(reason="window_too_short")
    return EnergyReading(
        source="nvml_power",
        joules=joules,
        elapsed_s=elapsed,
        units=units,
        relative_uncertainty=2 / samples,
        power_samples=samples,
        flags=("energy_polled",),
    )


def hold(powers: Sequence[tuple[float, float]], start: float, end: float) -> tuple[float | None, int]:
    """Joules of `(time, watts)` samples from `start` to `end`, each held until the next, and how many lie inside.

    Equal samples are samples too, and both edges of the window count: without them a constant power integrates to
    nothing. None with fewer than ten samples inside.
    """
    times = [at for at, _ in powers]
    first, last = bisect_right(times, start), bisect_left(times, end)
    inside = last - first
    if inside < MIN_POWER_SAMPLES:
        return None, max(inside, 0)
    bounds = [start, *times[first:last], end]
    watts = [powers[max(first - 1, 0)][1], *(watts for _, watts in powers[first:last])]
    return sum(w * (b - a) for w, (a, b) in zip(watts, pairwise(bounds), strict=True)), inside


def pool(readings: Sequence[EnergyReading]) -> EnergyReading:
    """Several windows of the same work as one: sums, the worst bound, every flag."""
    polled = [reading.polled_joules for reading in readings if reading.polled_joules is not None]
    ticks = [reading.ticks for reading in readings if reading.ticks is not None]
    return replace(
        readings[0],
        joules=sum(reading.joules for reading in readings),
        elapsed_s=sum(reading.elapsed_s for reading in readings),
        units=sum(reading.units for reading in readings),
        relative_uncertainty=max(reading.relative_uncertainty for reading in readings),
        ticks=sum(ticks) if len(ticks) == len(readings) else None,
        polled_joules=sum(polled) if len(polled) == len(readings) else None,
        power_samples=sum(reading.power_samples for reading in readings),
        flags=tuple(dict.fromkeys(flag for reading in readings for flag in reading.flags)),
    )


def short_chunks(chunks: Sequence[tuple[float, float]], tick_s: float) -> bool:
    return (chunks[-1][0] - chunks[0][0]) / (len(chunks) - 1) <= tick_s


def _misplaced(early: float, late: float, times: Sequence[float], values: Sequence[float]) -> float:
    """How much a value interpolated between `early` and `late` can differ from the truth: a step of the curve."""
    low = values[max(bisect_right(times, early) - 1, 0)]
    high = values[min(bisect_left(times, late), len(values) - 1)]
    middle = float(np.interp((early + late) / 2, times, values))
    return max(middle - low, high - middle)

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.energy import EnergyReading, calls_per_chunk, idle_power, measure, measure_cpu, pool, probe_tick
from tasks.energy_window import Reading, find_edges, from_counter, hold
from tasks.metric import Missing
from tasks.nvml import FakeGpu, Gpu, GpuFacts, GpuProcess, ManualClock, NoGpu
from tasks.rapl import Rapl

UNITS = 8.0


def busy(
    gpu: Gpu, clock: ManualClock, *, chunk_s: float = 0.02, window_s: float = 2.0, tick_s: float = 0.1, idle: float = 75
) -> EnergyReading | Missing:
    def chunk() -> float:
        clock.sleep(chunk_s)
        return UNITS

    return measure(chunk, gpu, clock=clock, window_s=window_s, tick_s=tick_s, idle_power_w=idle, background=False)


def reading(result: EnergyReading | Missing) -> EnergyReading:
    assert isinstance(result, EnergyReading), result
    return result


def reason(result: object) -> str:
    assert isinstance(result, Missing), result
    return result.reason


def test_constant_300_w_for_7_s_are_2100_j() -> None:
    clock = ManualClock(3.217)
    found = reading(busy(FakeGpu(clock, power_w=300), clock, window_s=7.0))
    assert found.elapsed_s == pytest.approx(7.0, abs=0.11)
    assert found.joules == pytest.approx(2100, abs=300 * 0.11)
    assert found.mean_w == pytest.approx(300, rel=0.003)
    assert found.joules_per_unit == pytest.approx(300 * 0.02 / UNITS, rel=found.relative_uncertainty)
    assert found.relative_uncertainty < 0.004
    assert found.net_joules == pytest.approx(found.joules - 75 * found.elapsed_s)
    assert found.net_joules_per_unit == pytest.approx(225 * 0.02 / UNITS, rel=0.01)
    assert found.units_per_s == pytest.approx(UNITS / 0.02, rel=0.003)
    assert found.polled_joules == pytest.approx(found.joules, rel=0.01)
    assert found.power_samples >= 70
    assert found.ticks == 70
    assert (found.source, found.flags) == ("nvml_counter", ())


def test_a_step_to_600_w_and_back_is_integrated_exactly() -> None:
    clock = ManualClock()
    gpu = FakeGpu(clock, power_w=[(0, 100), (4, 600), (12, 100)])
    found = reading(busy(gpu, clock, window_s=15.0, chunk_s=0.025))
    truth = gpu.joules_between(0.2, 0.2 + found.elapsed_s)
    assert found.joules == pytest.approx(truth, abs=600 * 0.03)
    assert found.polled_joules == pytest.approx(truth, rel=0.02)
    assert found.flags == ()


@settings(max_examples=60, deadline=None)
@given(
    watts=st.floats(20, 1000),
    chunk_s=st.floats(0.002, 0.4),
    tick_s=st.sampled_from([0.02, 0.1, 0.25]),
    phase=st.floats(0, 1),
)
def test_the_truth_lies_within_the_bound(watts: float, chunk_s: float, tick_s: float, phase: float) -> None:
    clock = ManualClock(phase)
    gpu = FakeGpu(clock, power_w=watts, tick_s=tick_s, phase_s=tick_s * phase * 0.99)
    found = reading(busy(gpu, clock, chunk_s=chunk_s, tick_s=tick_s))
    truth = watts * chunk_s / UNITS
    assert found.joules_per_unit == pytest.approx(truth, rel=found.relative_uncertainty + 1e-4)
    assert found.elapsed_s >= 2.0 * 0.98
    assert found.elapsed_s >= 20 * tick_s * 0.98


def test_long_calls_keep_whole_calls_in_the_window() -> None:
    """A call of 0.7 s, of which 0.2 s at 700 W and the rest at 300 W: only whole calls have its mean."""
    clock = ManualClock()
    steps = [(0.7 * call + at, watts) for call in range(40) for at, watts in ((0.0, 700.0), (0.2, 300.0))]
    gpu = FakeGpu(clock, power_w=steps)
    readings = [Reading(now, now, _counter(gpu, clock, now)) for now in _grid(0.0, 8.0, 0.002)]
    chunks = [(0.7 * call, UNITS * call) for call in range(7)]
    found = from_counter(readings, chunks, [], tick_s=0.1, need_s=2.0)
    assert reading(found).units == 5 * UNITS
    assert reading(found).joules_per_unit == pytest.approx((0.2 * 700 + 0.5 * 300) / UNITS, rel=0.02)


def _counter(gpu: FakeGpu, clock: ManualClock, now: float) -> int:
    clock.now = now
    value = gpu.total_energy_mj()
    assert value is not None
    return value


def _grid(start: float, end: float, step: float) -> list[float]:
    return [start + number * step for number in range(int((end - start) / step))]


def test_a_thread_watches_the_counter_while_real_time_passes() -> None:
    gpu = FakeGpu(time.perf_counter, power_w=300, tick_s=0.02)

    def chunk() -> float:
        time.sleep(0.004)
        return 1.0

    found = reading(measure(chunk, gpu, window_s=0.5, tick_s=0.02))
    # how exact it is, tests on a manual clock say: this thread may be stopped for a tenth of a second
    assert found.mean_w == pytest.approx(300, rel=0.5)
    assert found.elapsed_s >= 0.4
    assert found.ticks and found.ticks >= 8


@pytest.mark.parametrize("tick_s", [0.01, 0.05])
def test_the_thread_learns_the_counters_own_tick(tick_s: float) -> None:
    gpu = FakeGpu(time.perf_counter, power_w=300, tick_s=tick_s)

    def chunk() -> float:
        time.sleep(0.004)
        return 1.0

    found = reading(measure(chunk, gpu, window_s=0.4, tick_s=0.02))
    assert found.mean_w == pytest.approx(300, rel=0.5)
    assert found.elapsed_s >= 0.75 * max(0.4, 18 * tick_s)


def test_the_thread_ends_when_the_work_fails() -> None:
    import threading

    def chunk() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure(chunk, FakeGpu(time.perf_counter), window_s=1.0, tick_s=0.1)
    assert not [thread for thread in threading.enumerate() if thread.name == "energy"]


def test_work_is_synchronised_after_every_chunk() -> None:
    clock, order = ManualClock(), []

    def chunk() -> float:
        order.append("work")
        return 1.0

    def synchronize() -> None:
        order.append("wait")
        clock.sleep(0.05)

    measure(chunk, FakeGpu(clock), synchronize=synchronize, clock=clock, window_s=2, tick_s=0.1, background=False)
    assert order[::2] == ["work"] * (len(order) // 2)
    assert order[1::2] == ["wait"] * (len(order) // 2)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda clock: NoGpu(), "nvml_missing"),
        (lambda clock: FakeGpu(clock, facts=GpuFacts(mig=True)), "mig"),
        (lambda clock: FakeGpu(clock, unsupported=("total_energy_mj", "power_w")), "not_supported"),
        (lambda clock: FakeGpu(clock, reset_at_s=1.5), "counter_reset"),
        (lambda clock: FakeGpu(clock, start_mj=0, wrap_mj=300_000), "counter_reset"),
        (lambda clock: FakeGpu(clock, stuck_at_s=0.0), "counter_stuck"),
        (lambda clock: FakeGpu(clock, stuck_at_s=1.0), "counter_stuck"),
        (lambda clock: FakeGpu(clock, processes=(GpuProcess(1 << 30, 5, 80.0), _me())), "shared_gpu"),
    ],
)
def test_what_cannot_be_measured_is_null_with_its_reason(make: Callable[[ManualClock], Gpu], expected: str) -> None:
    clock = ManualClock(0.05)
    assert reason(busy(make(clock), clock)) == expected


def _me() -> GpuProcess:
    return GpuProcess(os.getpid(), 1, 50.0)


def test_a_window_shorter_than_a_tick_is_null() -> None:
    readings = [Reading(now, now, 1000) for now in _grid(0.0, 0.05, 0.005)]
    result = from_counter(readings, [(0.0, 0.0), (0.05, 1.0)], [], tick_s=0.1, need_s=0.05)
    assert reason(result) == "window_too_short"


def test_a_quiet_foreign_process_is_a_flag() -> None:
    clock = ManualClock()
    gpu = FakeGpu(clock, processes=(_me(), GpuProcess(1 << 30, 5, 0.0)))
    assert reading(busy(gpu, clock)).flags == ("shared_gpu",)


def test_a_container_that_shows_foreign_pids_for_ours_does_not_flag_us() -> None:
    clock = ManualClock()
    assert reading(busy(FakeGpu(clock, processes=(GpuProcess(1 << 30, 5, 90.0),)), clock)).flags == ()


def test_use_of_a_second_card_is_said() -> None:
    clock = ManualClock()

    def chunk() -> float:
        clock.sleep(0.02)
        return 1.0

    result = measure(
        chunk,
        FakeGpu(clock),
        other_gpus=[FakeGpu(clock, processes=(_me(),))],
        clock=clock,
        window_s=2.0,
        tick_s=0.1,
        background=False,
    )
    assert reading(result).flags == ("several_gpus",)


def test_a_counter_that_power_contradicts_is_suspect() -> None:
    clock = ManualClock()

    class Crooked(FakeGpu):
        def power_w(self) -> float | None:
            return 330.0

    found = reading(busy(Crooked(clock, power_w=300), clock))
    assert found.flags == ("energy_suspect",)
    assert found.joules == pytest.approx(600, rel=0.06)


def test_without_a_counter_the_power_is_integrated_and_says_so() -> None:
    clock = ManualClock()
    gpu = FakeGpu(clock, power_w=300, unsupported=("total_energy_mj",))
    found = reading(busy(gpu, clock))
    assert (found.source, found.flags, found.ticks) == ("nvml_power", ("energy_polled",), None)
    assert found.mean_w == pytest.approx(300)
    assert found.joules_per_unit == pytest.approx(300 * 0.02 / UNITS, rel=1e-6)


def test_zero_order_hold_counts_equal_samples_and_the_edges() -> None:
    constant = [(0.1 * number, 300.0) for number in range(71)]
    assert hold(constant, 0.0, 7.0)[0] == pytest.approx(2100)
    step = [(0.1 * number, 600.0 if 20 <= number < 100 else 100.0) for number in range(121)]
    assert hold(step, 0.0, 12.0)[0] == pytest.approx(5200)
    assert hold(constant[:5], 0.0, 7.0) == (None, 4)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40))
def test_edges_are_where_the_counter_grows(steps: list[int]) -> None:
    total, readings = 0, []
    for number, step in enumerate(steps):
        total += step
        readings.append(Reading(float(number), float(number), total))
    edges = find_edges(readings)
    assert not isinstance(edges, Missing)
    assert len(edges) == sum(step > 0 for step in steps[1:])


def test_the_tick_is_found() -> None:
    clock = ManualClock(0.033)
    assert probe_tick(FakeGpu(clock, tick_s=0.1), clock, clock.sleep) == pytest.approx(0.1, abs=0.0021)
    assert clock.now < 1.1  # does not use its two seconds when it knows earlier
    assert reason(probe_tick(FakeGpu(clock, stuck_at_s=0.0), clock, clock.sleep)) == "counter_stuck"
    assert reason(probe_tick(NoGpu(), clock, clock.sleep)) == "nvml_missing"
    assert reason(probe_tick(FakeGpu(clock, unsupported=("total_energy_mj",)), clock, clock.sleep)) == "not_supported"


def test_idle_power_is_the_counters_slope() -> None:
    clock = ManualClock()
    assert idle_power(FakeGpu(clock, power_w=77), clock, 2.0, clock.sleep) == pytest.approx(77, rel=0.01)
    assert reason(idle_power(FakeGpu(clock), clock, 0.05, clock.sleep)) == "window_too_short"
    assert reason(idle_power(FakeGpu(clock, stuck_at_s=0), clock, 3.0, clock.sleep)) == "counter_stuck"
    assert reason(idle_power(FakeGpu(clock, facts=GpuFacts(mig=True)), clock, 1.0, clock.sleep)) == "mig"


def test_windows_are_pooled_by_their_sums() -> None:
    clock = ManualClock()
    gpu = FakeGpu(clock, power_w=300)
    parts = [reading(busy(gpu, clock)) for _ in range(3)]
    whole = pool(parts)
    assert whole.joules == pytest.approx(sum(part.joules for part in parts))
    assert whole.mean_w == pytest.approx(300, rel=0.01)
    assert whole.ticks == sum(part.ticks or 0 for part in parts)


def test_a_chunk_is_a_quarter_of_a_tick_or_one_call() -> None:
    assert calls_per_chunk(0.001, 0.1) == 25
    assert calls_per_chunk(2.0, 0.1) == 1


def test_cpu_energy_is_what_rapl_gained(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    for name, value in {"name": "package-0", "energy_uj": 0, "max_energy_range_uj": 10**9}.items():
        (package / name).write_text(str(value))
    clock = ManualClock()

    def chunk() -> float:
        clock.sleep(0.1)
        (package / "energy_uj").write_text(str(round(clock.now * 45e6)))
        return 2.0

    rapl = Rapl.open(tmp_path)
    found = reading(measure_cpu(chunk, rapl, clock=clock, window_s=3.0))
    assert found.mean_w == pytest.approx(45.0)
    assert found.joules_per_unit == pytest.approx(2.25)
    assert found.source == "rapl"
    assert reason(measure_cpu(chunk, Missing(reason="rapl_absent"), clock=clock, window_s=1.0)) == "rapl_absent"

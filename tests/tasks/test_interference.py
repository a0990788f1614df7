from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.interference import (
    CpuSnapshot,
    CpuWatch,
    InterferenceReport,
    canary_s,
    compare,
    foreign_gpu_activity,
    foreign_processes,
    own_pids,
    snapshot,
)
from tasks.nvml import FakeGpu, GpuFacts, GpuProcess, ManualClock, NoGpu

START = CpuSnapshot(
    wall_s=100.0,
    process_cpu_s=5.0,
    involuntary_switches=7,
    run_delay_s=0.5,
    pressure_s=3.0,
    busy_s=50.0,
    steal_s=1.0,
    cpus=4,
)
# Two seconds of four busy threads on four CPUs.
QUIET = replace(START, wall_s=102.0, process_cpu_s=13.0, busy_s=58.0)

WAITED = (START.run_delay_s or 0.0) + 8 * 0.06


def report(
    changed: dict[str, Any] | None = None, canary: tuple[float, float] | None = (1.0, 1.0)
) -> InterferenceReport:
    return compare(START, replace(QUIET, **(changed or {})), threads=4, canary=canary)


def test_a_quiet_machine_has_no_flags() -> None:
    quiet = report()
    assert quiet.flags == ()
    assert not quiet.barred
    assert (quiet.cpu_share, quiet.foreign_share, quiet.steal_share, quiet.pressure_share) == (1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({"process_cpu_s": 5.0 + 8 * 0.96}, ()),
        ({"process_cpu_s": 5.0 + 8 * 0.94, "run_delay_s": WAITED}, ("interference",)),
        ({"process_cpu_s": 5.0 + 8 * 0.89, "run_delay_s": WAITED}, ("interference", "foreign_load", "cpu_starved")),
        ({"process_cpu_s": 5.0 + 8 * 0.89, "busy_s": 57.1, "run_delay_s": WAITED}, ("interference", "cpu_starved")),
        # work that does not parallelise leaves CPUs alone by itself
        ({"process_cpu_s": 5.0 + 8 * 0.50, "busy_s": 54.0}, ()),
        ({"involuntary_switches": 26}, ()),
        ({"involuntary_switches": 28}, ("interference",)),
        ({"pressure_s": 3.09}, ()),
        ({"pressure_s": 3.11}, ("interference",)),
        ({"steal_s": 1.03}, ()),
        ({"steal_s": 1.05}, ("interference", "steal")),
        ({"busy_s": 58.7}, ()),
        ({"busy_s": 58.9}, ("interference", "foreign_load")),
    ],
)
def test_each_threshold(changed: dict[str, float], flags: tuple[str, ...]) -> None:
    found = report(changed)
    assert found.flags == flags
    assert found.barred == (len(flags) > 1)
    assert found.to_dict()["flags"] == list(flags)


def test_a_canary_that_slows_is_interference_but_bars_nothing() -> None:
    assert report(canary=(1.0, 1.02)).flags == ()
    slow = report(canary=(1.0, 1.04))
    assert slow.flags == ("interference",)
    assert not slow.barred


def test_what_the_kernel_does_not_tell_is_none() -> None:
    blind = replace(START, pressure_s=None, busy_s=None, steal_s=None, run_delay_s=None)
    found = compare(blind, replace(blind, wall_s=102.0, process_cpu_s=13.0), threads=4)
    assert (found.pressure_share, found.steal_share, found.foreign_share) == (None, None, None)
    assert (found.run_delay_share, found.canary_ratio, found.flags) == (None, None, ())


def test_counters_are_read_from_proc(tmp_path: Path) -> None:
    hertz = os.sysconf("SC_CLK_TCK")
    cpus = sorted(os.sched_getaffinity(0))
    lines = ["cpu  9 9 9 9 9 9 9 9 9 9"]
    lines += [f"cpu{cpu} {hertz} {hertz} {hertz} 77 77 {hertz} {hertz} {2 * hertz} 5 5" for cpu in cpus]
    lines += [f"cpu{max(cpus) + 1} 999 0 0 0 0 0 0 999 0 0", "intr 5"]
    (tmp_path / "stat").write_text("\n".join(lines))
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "cpu").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull x\n")
    for thread, delay in {"1": 10**9, "2": 2 * 10**9}.items():
        (tmp_path / "self" / "task" / thread).mkdir(parents=True)
        (tmp_path / "self" / "task" / thread / "schedstat").write_text(f"5 {delay} 9")
    seen = snapshot(tmp_path)
    assert (seen.busy_s, seen.steal_s) == (5.0 * len(cpus), 2.0 * len(cpus))
    assert (seen.pressure_s, seen.run_delay_s, seen.cpus) == (2.5, 3.0, len(cpus))


def test_an_empty_proc_gives_none_and_no_exception(tmp_path: Path) -> None:
    seen = snapshot(tmp_path)
    assert (seen.busy_s, seen.steal_s, seen.pressure_s, seen.run_delay_s) == (None, None, None, None)


def test_the_watch_brackets_a_region() -> None:
    watch = CpuWatch(threads=1, canary=lambda: 0.001)
    watch.begin()
    total = sum(range(300_000))
    found = watch.end()
    assert total and found.wall_s > 0
    assert 0 < found.cpu_share <= 1.5
    assert found.canary_ratio == 1.0


def test_the_canary_takes_about_a_millisecond() -> None:
    assert 1e-5 < canary_s(3) < 0.1


def test_own_pids_hold_the_process_and_its_parent() -> None:
    assert {os.getpid(), os.getppid()} <= own_pids()


def gpu(*processes: GpuProcess, **rest: object) -> FakeGpu:
    return FakeGpu(ManualClock(), processes=processes, **rest)  # type: ignore[arg-type]


def hidden(**rest: object) -> FakeGpu:
    """A card that does not say which processes use it."""
    return gpu(unsupported=("processes",), **rest)


def test_foreign_processes_are_all_but_ours() -> None:
    card = gpu(GpuProcess(1), GpuProcess(2))
    assert foreign_processes(card, {1}) == (GpuProcess(2),)
    # Ours is not listed although it holds a context: one of the two is it.
    assert foreign_processes(card, {3}, resident=True) == (GpuProcess(2),)
    assert foreign_processes(card, {3}) == (GpuProcess(1), GpuProcess(2))
    assert foreign_processes(NoGpu(), {3}) == ()


@pytest.mark.parametrize(
    ("card", "percent", "flags"),
    [
        (gpu(GpuProcess(9, 1, 1.0)), 1.0, ()),
        (gpu(GpuProcess(9, 1, 1.5), GpuProcess(8, 1, 1.5)), 3.0, ("foreign_gpu_process",)),
        (gpu(GpuProcess(9, 1, None), utilization_percent=50.0), 50.0, ("foreign_gpu_process",)),
        (hidden(facts=GpuFacts(display_active=False), utilization_percent=50.0), 50.0, ("foreign_gpu_process",)),
        (hidden(facts=GpuFacts(display_active=True), utilization_percent=50.0), 50.0, ()),
        (hidden(facts=GpuFacts(display_active=None), utilization_percent=50.0), 50.0, ()),
        # nobody holds a context: the utilisation that is remembered is the cell before
        (gpu(facts=GpuFacts(display_active=False), utilization_percent=50.0), None, ()),
        (gpu(facts=GpuFacts(display_active=False), unsupported=("utilization_percent", "processes")), None, ()),
        (NoGpu(), None, ()),
    ],
)
def test_foreign_activity_above_two_percent_is_flagged_and_a_display_is_not(
    card: FakeGpu, percent: float | None, flags: tuple[str, ...]
) -> None:
    waits: list[float] = []
    assert foreign_gpu_activity(card, {1}, waits.append) == (percent, flags)
    assert len(waits) == len(flags)


def test_the_cell_before_is_not_foreign() -> None:
    card = hidden(facts=GpuFacts(display_active=False), utilization_percent=50.0)

    def sleep(seconds: float) -> None:
        card.utilization = 0.0

    assert foreign_gpu_activity(card, {1}, sleep) == (0.0, ())

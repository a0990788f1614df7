"""Chunks that are queued, on a simulated device: calls take device time, issuing them takes host time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks import timing
from tasks.cores import Feeder
from tasks.timing import Passes

UNITS = 7.0


class Simulation:
    """A clock, a stream that works through calls in turn, and a step of one call."""

    boundaries: dict[str, bool] = {}
    primary = "call"
    units_per_call = UNITS
    energy_units_per_call = None

    def __init__(self, device_s: float, issue_s: float, ramp_s: float) -> None:
        self.device_s, self.issue_s, self.ramp_s = device_s, issue_s, ramp_s
        self.now = self.free_at = 0.0
        self.finished: list[float] = []  # when each call was, or will be

    def perf_counter(self) -> float:
        return self.now

    def run(self, index: int, mark: Any) -> None:
        # what must be issued before the device can begin, and then the rest
        self.free_at = max(self.free_at, self.now + self.ramp_s) + self.device_s
        self.finished.append(self.free_at)
        self.now += self.issue_s

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)

    def event(self) -> Any:
        simulation, at = self, []

        def record() -> None:
            at.append(simulation.free_at)

        def wait() -> None:
            simulation.now = max(simulation.now, at[0])

        return SimpleNamespace(record=record, synchronize=wait, query=lambda: simulation.now >= at[0])


def passes(monkeypatch: pytest.MonkeyPatch, simulation: Simulation) -> Passes:
    monkeypatch.setattr(torch.cuda, "Event", simulation.event)
    monkeypatch.setattr(timing.time, "perf_counter", simulation.perf_counter)
    profile = SimpleNamespace(throughput_s=0.5)
    session: Any = SimpleNamespace(
        step=simulation,
        on_cuda=True,
        meter=None,
        profile=profile,
        synchronize=simulation.synchronize,
        timings=None,
        feeder=Feeder(),
    )
    made = Passes(session)
    made._seconds_per_call = simulation.device_s
    return made


def units_of(made: Passes, simulation: Simulation, chunks: int) -> tuple[float, int]:
    """What so many chunks return, and the calls that the device had finished by then."""
    returned = sum(made._chunk() for _ in range(chunks))
    return returned, sum(at <= simulation.now for at in simulation.finished)


@pytest.mark.parametrize("device_s", [0.003, 0.021, 0.3])
def test_the_device_never_waits_between_chunks(monkeypatch: pytest.MonkeyPatch, device_s: float) -> None:
    simulation = Simulation(device_s, issue_s=0.5 * device_s, ramp_s=0.1 * device_s)
    made = passes(monkeypatch, simulation)
    made.throughput()
    result = made.timings.throughput
    assert result.per_s == pytest.approx(UNITS / device_s, rel=1e-6)
    assert result.units == UNITS * result.calls
    assert result.seconds >= 0.29


def test_the_host_is_looked_at_during_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(0.02, issue_s=0.01, ramp_s=0.0)
    made = passes(monkeypatch, simulation)
    made.session.feeder = made.feeder = Feeder(
        speed=lambda: 0.001 * (1 + simulation.now), move=lambda cpus: None, clock=lambda: simulation.now
    )
    with made.feeder.seated():
        made.throughput()
    assert made.feeder.looks > 4
    assert 0.001 < (made.timings.throughput.host_loop_s or 0.0) < 0.001 * (1 + simulation.now)


@pytest.mark.parametrize("issue_s", [0.001, 0.009], ids=["device-bound", "host-bound"])
def test_every_finished_call_is_counted_once(monkeypatch: pytest.MonkeyPatch, issue_s: float) -> None:
    simulation = Simulation(0.004, issue_s=issue_s, ramp_s=0.0)
    made = passes(monkeypatch, simulation)
    made._chunk_calls = 6
    returned, finished = units_of(made, simulation, 20)
    # where the host is slower, the chunk in the queue is done as well
    in_flight = 6 if issue_s > 0.004 else 0
    assert returned == UNITS * (finished - in_flight) == UNITS * 20 * 6


def test_a_host_that_has_become_slow_lowers_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was fast enough in the latency pass; for half of the time it needs twice what the device does."""
    simulation = Simulation(0.004, issue_s=0.002, ramp_s=0.0)
    made = passes(monkeypatch, simulation)
    made._chunk_calls = 6
    for _ in range(50):
        made._chunk()
    simulation.issue_s = 0.008
    for _ in range(50):
        made._chunk()
    assert made.timings.throughput.per_s == pytest.approx(UNITS / ((0.004 + 0.008) / 2), rel=0.03)


def test_what_was_queued_before_a_pause_has_units_but_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(0.004, issue_s=0.002, ramp_s=0.0)
    made = passes(monkeypatch, simulation)
    made._chunk_calls = 6
    returned = 0.0
    for _ in range(2):
        before, _ = units_of(made, simulation, 20)
        returned += before
        simulation.now += 3.0
    # the chunk that ended in the first pause used energy, but nobody saw when it ended
    assert returned == UNITS * (sum(at <= simulation.now for at in simulation.finished) - 6)
    assert made.timings.throughput.per_s == pytest.approx(UNITS / 0.004, rel=1e-6)


def test_a_device_that_waits_for_launches_is_not_queued_for(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(0.004, issue_s=0.005, ramp_s=0.0)
    made = passes(monkeypatch, simulation)
    made._launch_bound = True
    made.throughput()
    assert made._queued is None
    # each chunk waits for its last call
    assert made.timings.throughput.per_s == pytest.approx(UNITS / 0.005, rel=0.2)

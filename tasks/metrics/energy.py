"""Energy of the throughput pass: NVML's counter in tick-aligned windows, RAPL on a CPU, else null with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.energy import SHARED, measure, measure_cpu, pool
from tasks.energy_window import EnergyReading
from tasks.metric import Column, Metric, Missing, Phase
from tasks.nvml import other_gpus
from tasks.rapl import Rapl

if TYPE_CHECKING:
    from tasks.session import Session

TICK_S = 0.1  # of the cards seen; a slower counter makes the window longer, since 20 ticks are waited for


class Energy(Metric):
    name = "energy"
    columns = (
        Column(name="energy_j", type="float", doc="gross energy of the window, idle share included"),
        Column(
            name="energy_j_per_unit",
            type="float",
            doc="energy_j over the units done; decode: whole requests over all their new tokens",
        ),
        Column(name="energy_j_per_unit_net", type="float", doc="the same without the idle power"),
        Column(name="energy_uncertainty", type="float", doc="relative bound of the error of energy_j_per_unit"),
        Column(
            name="energy_j_integrated", type="float", doc="instantaneous power held and summed over the window: a check"
        ),
        Column(name="energy_window_s", type="float", doc="length of the window"),
        Column(name="power_w_mean", type="float", doc="energy_j over the window"),
        Column(name="power_w_idle", type="float", doc="idle power of the device, once per sweep"),
        Column(name="energy_source", type="string", doc="nvml_counter, nvml_power or rapl"),
    )

    def begin(self, phase: Phase, session: Session) -> None:
        if phase is Phase.THROUGHPUT:
            session.meter = meter(session)

    def collect(self, session: Session) -> dict[str, Any]:
        reading = session.timings.energy if session.timings else None
        idle = session.job.idle_power_w
        why = session.job.idle_power_missing or "nothing has measured this device"
        power_w_idle = Missing(reason=f"the idle power is not known: {why}") if idle is None else idle
        if not isinstance(reading, EnergyReading):
            reason = reading or Missing(reason="the throughput pass was not reached")
            if reason.reason == SHARED:
                session.row.flag("foreign_gpu_process")  # it came after the look before loading
            return {**{column.name: reason for column in self.columns}, "power_w_idle": power_w_idle}
        session.row.flag(*reading.flags)
        net = reading.net_joules_per_unit
        return {
            "energy_j": reading.joules,
            "energy_j_per_unit": reading.joules_per_unit,
            "energy_j_per_unit_net": power_w_idle if net is None else net,
            "energy_uncertainty": reading.relative_uncertainty,
            "energy_j_integrated": Missing(reason="power was not sampled beside the counter")
            if reading.polled_joules is None
            else reading.polled_joules,
            "energy_window_s": reading.elapsed_s,
            "power_w_mean": reading.mean_w,
            "power_w_idle": power_w_idle,
            "energy_source": reading.source,
        }


def meter(session: Session) -> Callable[[Callable[[], float]], EnergyReading | Missing]:
    """What runs the throughput pass over the profile's energy windows."""
    profile, idle = session.profile, session.job.idle_power_w
    others = other_gpus(session.gpu) if session.on_cuda else []

    def windows(chunk: Callable[[], float]) -> EnergyReading | Missing:
        readings: list[EnergyReading] = []
        for _ in range(profile.energy_windows):
            if session.on_cuda:
                reading = measure(
                    chunk,
                    session.gpu,
                    window_s=profile.energy_window_s,
                    tick_s=TICK_S,
                    idle_power_w=idle,
                    other_gpus=others,
                )
            else:
                reading = measure_cpu(chunk, Rapl.open(), window_s=profile.energy_window_s, idle_power_w=idle)
            if isinstance(reading, Missing):
                return reading
            readings.append(reading)
        return pool(readings)

    return windows

"""What can be asked of one GPU: a query answers None where nobody tells, never 0 and never an exception."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple


class EventReason(IntFlag):
    """Bits of NVML's clocks event reasons: why the clock is not higher."""

    GPU_IDLE = 0x1
    APPLICATION_CLOCKS = 0x2
    SW_POWER_CAP = 0x4
    HW_SLOWDOWN = 0x8
    SYNC_BOOST = 0x10
    SW_THERMAL = 0x20
    HW_THERMAL = 0x40
    HW_POWER_BRAKE = 0x80
    DISPLAY_CLOCK = 0x100


THROTTLING = EventReason.HW_SLOWDOWN | EventReason.SW_THERMAL | EventReason.HW_THERMAL | EventReason.HW_POWER_BRAKE
POWER_CAP_COUNTER = "power_cap"


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """What does not change while a cell runs. Clocks in MHz, power limits in watts; None where not told."""

    name: str | None = None
    uuid: str | None = None
    index: int | None = None
    pci_bus_id: str | None = None
    vbios: str | None = None
    driver: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    ecc: bool | None = None
    mig: bool | None = None
    persistence: bool | None = None
    compute_mode: int | None = None
    display_active: bool | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    power_limit_default_w: float | None = None
    power_limit_min_w: float | None = None
    power_limit_max_w: float | None = None


class GpuProcess(NamedTuple):
    """A process with a compute context. `utilization_percent` is its share of SM time in the last two seconds."""

    pid: int
    memory_bytes: int | None = None
    utilization_percent: float | None = None


class Gpu:
    """A card that tells nothing; the real and the scripted one answer what they can."""

    unavailable: str | None = None  # null reason when there is no card to ask

    def facts(self) -> GpuFacts:
        return GpuFacts()

    def total_energy_mj(self) -> int | None:
        """Energy since the driver was loaded, in millijoules; changes only once per tick (0.1 s on an H200)."""
        return None

    def power_w(self) -> float | None:
        """Instantaneous power of the card."""
        return None

    def power_average_w(self) -> float | None:
        """Power averaged by the driver over about one second."""
        return None

    def power_limit_w(self) -> float | None:
        """The limit that is enforced now."""
        return None

    def sm_clock_mhz(self) -> int | None:
        return None

    def memory_clock_mhz(self) -> int | None:
        return None

    def clocks_locked(self) -> bool | None:
        """Whether a setting holds the clocks: application clocks off their default, or the driver names them."""
        return None

    def temperature_c(self) -> int | None:
        return None

    def event_reasons(self) -> EventReason | None:
        return None

    def slowdown_ns(self) -> dict[str, int]:
        """Cumulative nanoseconds per kind of slow-down (`power_cap`, `thermal`, ...); only what the card counts."""
        return {}

    def memory_used_bytes(self) -> int | None:
        """Memory used on the device by everybody, the driver included."""
        return None

    def processes(self) -> tuple[GpuProcess, ...] | None:
        """Processes with a compute context, as far as this PID namespace sees them; None where not told."""
        return None

    def process_memory_bytes(self, pid: int) -> int | None:
        """Memory of one process; None when its pid is not visible (other PID namespace, WDDM, MIG)."""
        return next((process.memory_bytes for process in self.processes() or () if process.pid == pid), None)

    def utilization_percent(self) -> float | None:
        """Share of the last sampling period in which some kernel, graphics included, ran."""
        return None


class NoGpu(Gpu):
    """Stands where no card can be asked; `reason` is the null reason of everything it would have told."""

    def __init__(self, reason: str = "nvml_missing") -> None:
        self.unavailable = reason

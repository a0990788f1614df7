"""A GPU as NVML sees it, found by UUID since CUDA_VISIBLE_DEVICES renumbers; the one name to import all of it from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from tasks.fake_gpu import FakeGpu, ManualClock
from tasks.gpu import POWER_CAP_COUNTER, THROTTLING, EventReason, Gpu, GpuFacts, GpuProcess, NoGpu

__all__ = [
    "POWER_CAP_COUNTER",
    "THROTTLING",
    "EventReason",
    "FakeGpu",
    "Gpu",
    "GpuFacts",
    "GpuProcess",
    "ManualClock",
    "NoGpu",
    "NvmlGpu",
    "gpus",
    "open_gpu",
]

# Cumulative nanoseconds spent in each kind of slow-down, as NVML field ids.
SLOWDOWN_FIELDS = {POWER_CAP_COUNTER: 74, "thermal": 75, "sw_thermal": 269, "hw_thermal": 270, "hw_power_brake": 271}
_POWER_AVERAGE, _POWER_INSTANT = 185, 186
_UTILIZATION_WINDOW_S = 2.0


class NvmlGpu(Gpu):
    """A card, or a MIG slice of `parent`, through the module `pynvml` (distribution nvidia-ml-py)."""

    def __init__(self, handle: Any, nvml: Any, parent: Any = None) -> None:
        self._handle = handle
        self._nvml = nvml
        self._card = handle if parent is None else parent
        self._slice = parent is not None

    def _ask(self, query: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, query)(*arguments)
        except (self._nvml.NVMLError, AttributeError, ValueError, OSError):
            return None

    def _get(self, what: str, *arguments: Any) -> Any:
        return self._ask(f"nvmlDeviceGet{what}", self._handle, *arguments)

    def _watts(self, what: str) -> float | None:
        milliwatts = self._get(what)
        return None if milliwatts is None else milliwatts / 1000.0

    def _fields(self, ids: Sequence[int]) -> dict[int, int]:
        """Field id -> value, for those that are supported."""
        member = {1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal"}  # 0, a double, is none of ours
        values = self._get("FieldValues", list(ids)) or ()
        return {
            value.fieldId: int(getattr(value.value, member[value.valueType]))
            for value in values
            if value.nvmlReturn == 0 and value.valueType in member
        }

    def facts(self) -> GpuFacts:
        ask, card = self._ask, self._card
        mig_mode = ask("nvmlDeviceGetMigMode", card)
        memory = self._get("MemoryInfo")
        limits = ask("nvmlDeviceGetPowerManagementLimitConstraints", card) or (None, None)
        default = ask("nvmlDeviceGetPowerManagementDefaultLimit", card)
        capability = ask("nvmlDeviceGetCudaComputeCapability", card)
        pci = ask("nvmlDeviceGetPciInfo", card)
        ecc = ask("nvmlDeviceGetCurrentEccMode", card)
        return GpuFacts(
            name=_text(self._get("Name")),
            uuid=_text(self._get("UUID")),
            index=ask("nvmlDeviceGetIndex", card),
            pci_bus_id=None if pci is None else _text(pci.busId),
            vbios=_text(ask("nvmlDeviceGetVbiosVersion", card)),
            driver=_text(ask("nvmlSystemGetDriverVersion")),
            compute_capability=None if capability is None else (int(capability[0]), int(capability[1])),
            memory_bytes=None if memory is None else int(memory.total),
            ecc=_flag(ecc),
            mig=self._slice or (None if mig_mode is None else bool(mig_mode[0])),
            persistence=_flag(ask("nvmlDeviceGetPersistenceMode", card)),
            compute_mode=ask("nvmlDeviceGetComputeMode", card),
            display_active=_flag(ask("nvmlDeviceGetDisplayActive", card)),
            sm_clock_max_mhz=ask("nvmlDeviceGetMaxClockInfo", card, 1),
            memory_clock_max_mhz=ask("nvmlDeviceGetMaxClockInfo", card, 2),
            power_limit_default_w=_scaled(default),
            power_limit_min_w=_scaled(limits[0]),
            power_limit_max_w=_scaled(limits[1]),
        )

    def total_energy_mj(self) -> int | None:
        value = self._get("TotalEnergyConsumption")
        return None if value is None else int(value)

    def power_w(self) -> float | None:
        instant = self._fields([_POWER_INSTANT]).get(_POWER_INSTANT)
        if instant is not None:
            return instant / 1000.0
        return None if self._usage_is_average() else self._watts("PowerUsage")

    def power_average_w(self) -> float | None:
        average = self._fields([_POWER_AVERAGE]).get(_POWER_AVERAGE)
        if average is not None:
            return average / 1000.0
        return self._watts("PowerUsage") if self._usage_is_average() else None

    def _usage_is_average(self) -> bool:
        """GA100 (8.0) and older give the instant in nvmlDeviceGetPowerUsage, later ones a one-second average."""
        capability = self._ask("nvmlDeviceGetCudaComputeCapability", self._card)
        return capability is None or tuple(capability) > (8, 0)

    def power_limit_w(self) -> float | None:
        return self._watts("EnforcedPowerLimit")

    def sm_clock_mhz(self) -> int | None:
        value: int | None = self._get("ClockInfo", 1)
        return value

    def memory_clock_mhz(self) -> int | None:
        value: int | None = self._get("ClockInfo", 2)
        return value

    def clocks_locked(self) -> bool | None:
        reasons = self.event_reasons()
        target, default = self._get("ApplicationsClock", 1), self._get("DefaultApplicationsClock", 1)
        if reasons is None and (target is None or default is None):
            return None
        return bool((reasons or 0) & EventReason.APPLICATION_CLOCKS) or target != default

    def temperature_c(self) -> int | None:
        value: int | None = self._get("Temperature", 0)
        return value

    def event_reasons(self) -> EventReason | None:
        bits = self._get("CurrentClocksEventReasons")
        if bits is None:
            bits = self._get("CurrentClocksThrottleReasons")  # the name before driver 535
        return None if bits is None else EventReason(int(bits))

    def slowdown_ns(self) -> dict[str, int]:
        values = self._fields(list(SLOWDOWN_FIELDS.values()))
        return {name: values[field] for name, field in SLOWDOWN_FIELDS.items() if field in values}

    def memory_used_bytes(self) -> int | None:
        memory = self._get("MemoryInfo")
        return None if memory is None else int(memory.used)

    def processes(self) -> tuple[GpuProcess, ...] | None:
        running = self._get("ComputeRunningProcesses")
        if running is None:
            return None
        busy = self._busy_percent() if running else None
        return tuple(
            GpuProcess(process.pid, process.usedGpuMemory, None if busy is None else busy.get(process.pid, 0.0))
            for process in running
        )

    def _busy_percent(self) -> dict[int, float] | None:
        """pid -> SM utilisation; NVML lists only processes that were active, so absence means idle."""
        since_us = int((time.time() - _UTILIZATION_WINDOW_S) * 1e6)
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, since_us)
        except self._nvml.NVMLError as error:
            # No sample since then is an answer; pynvml raises it as success or as not-found.
            return {} if error.value in (0, 6) else None
        busy: dict[int, float] = {}
        for sample in samples:
            if sample.timeStamp >= since_us:
                busy[sample.pid] = max(busy.get(sample.pid, 0.0), float(sample.smUtil))
        return busy

    def utilization_percent(self) -> float | None:
        rates = self._get("UtilizationRates")
        return None if rates is None else float(rates.gpu)


@cache
def _library() -> Any:
    """The initialised `pynvml`, or None: no driver, or no card for it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or whichever NVMLError of the missing, unloaded or mismatched driver
        return None
    return pynvml


def gpus(nvml: Any = None) -> list[Gpu]:
    """Every card that CUDA could use, in NVML's order; a card in MIG mode counts as its slices."""
    nvml = nvml or _library()
    found: list[Gpu] = []
    if nvml is None:
        return found
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError:
            continue  # a card that fell off the bus, or that the container may not open
        card = NvmlGpu(handle, nvml)
        found += _slices(handle, nvml) if card.facts().mig else [card]
    return found


def other_gpus(gpu: Gpu, nvml: Any = None) -> list[Gpu]:
    """The cards of this machine beside `gpu`."""
    return [card for card in gpus(nvml) if card.facts().uuid != gpu.facts().uuid]


def _slices(card: Any, nvml: Any) -> list[Gpu]:
    slices: list[Gpu] = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        try:
            slices.append(NvmlGpu(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index), nvml, parent=card))
        except nvml.NVMLError:
            continue  # fewer slices than there may be
    return slices


def open_gpu(uuid: str | None, nvml: Any = None) -> Gpu:
    """The card with this UUID (`GPU-...`, or as torch prints it, without), since CUDA_VISIBLE_DEVICES renumbers.

    Without a UUID, the only card there is. `NoGpu` when there is none, or none that is surely meant.
    """
    nvml = nvml or _library()
    if nvml is None:
        return NoGpu("nvml_missing")
    cards = gpus(nvml)
    if uuid is None:
        return cards[0] if len(cards) == 1 else NoGpu("not_supported")
    wanted = uuid.removeprefix("GPU-").removeprefix("MIG-")
    for card in cards:
        if (card.facts().uuid or "").removeprefix("GPU-").removeprefix("MIG-") == wanted:
            return card
    return NoGpu("not_supported")


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _flag(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _scaled(milliwatts: Any) -> float | None:
    return None if milliwatts is None else milliwatts / 1000.0

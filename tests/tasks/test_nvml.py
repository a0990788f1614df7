from __future__ import annotations

import inspect
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tasks import nvml
from tasks.nvml import EventReason, FakeGpu, Gpu, GpuFacts, GpuProcess, ManualClock, NoGpu, NvmlGpu, gpus, open_gpu

QUERIES = [name for name, _ in inspect.getmembers(Gpu, inspect.isfunction) if not name.startswith("_")]


class FakeError(Exception):
    def __init__(self, value: int = 3) -> None:
        self.value = value


class FakeLibrary:
    """Stands for the module pynvml: answers from a dict, everything else is not supported."""

    NVMLError = FakeError

    def __init__(self, cards: list[dict[str, Any]]) -> None:
        self.cards = cards

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if self.cards[index].get("lost"):
            raise FakeError(15)
        return self.cards[index]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: dict[str, Any], index: int) -> Any:
        if index >= len(card["slices"]):
            raise FakeError(6)
        return card["slices"][index]

    def __getattr__(self, query: str) -> Any:
        if not query.startswith("nvml"):
            raise AttributeError(query)

        def answer(card: dict[str, Any] | None = None, *arguments: Any) -> Any:
            what = query.removeprefix("nvmlDeviceGet")
            if card is None or what not in card:
                raise FakeError(3)
            value = card[what]
            return value(*arguments) if callable(value) else value

        return answer


def fields(**supported: int) -> Any:
    """Answers nvmlDeviceGetFieldValues with unsigned integers (value type 1), the rest not supported."""
    known = {int(name.removeprefix("f")): value for name, value in supported.items()}
    return lambda ids: [
        SimpleNamespace(
            fieldId=field,
            nvmlReturn=0 if field in known else 3,
            valueType=1,
            value=SimpleNamespace(uiVal=known.get(field, 0)),
        )
        for field in ids
    ]


@pytest.mark.parametrize("gpu", [NoGpu(), NvmlGpu({}, FakeLibrary([{}]))], ids=["none", "tells nothing"])
@pytest.mark.parametrize("query", QUERIES)
def test_unsupported_is_none_and_never_zero_or_an_exception(gpu: Gpu, query: str) -> None:
    answer = getattr(gpu, query)(*([1234] if query == "process_memory_bytes" else []))
    assert answer is None or answer == {} or answer == GpuFacts()


def test_every_query_is_overridden_by_the_real_and_the_scripted_card() -> None:
    shared = {"process_memory_bytes"}  # follows from processes()
    for kind in (NvmlGpu, FakeGpu):
        assert set(QUERIES) - shared <= set(vars(kind)), kind


def test_no_gpu_says_why() -> None:
    assert NoGpu().unavailable == "nvml_missing"
    assert NoGpu("mig").unavailable == "mig"


def test_a_card_is_found_by_uuid_whatever_its_number() -> None:
    library = FakeLibrary([{"UUID": "GPU-b", "Name": "B"}, {"UUID": b"GPU-a", "Name": b"A"}, {"lost": True}])
    assert [card.facts().name for card in gpus(library)] == ["B", "A"]
    assert open_gpu("GPU-a", library).facts().name == "A"
    assert open_gpu("a", library).facts().uuid == "GPU-a"  # torch prints it without the prefix
    assert open_gpu("GPU-c", library).unavailable == "not_supported"
    assert open_gpu(None, library).unavailable == "not_supported"  # two cards: nobody can say which is meant
    assert open_gpu(None, FakeLibrary([{"UUID": "GPU-a", "Name": "A"}])).facts().name == "A"


def test_a_card_in_mig_mode_counts_as_its_slices() -> None:
    slices = [{"UUID": "MIG-1", "Name": "NVIDIA A100 MIG 1g.5gb"}, {"UUID": "MIG-2", "Name": "NVIDIA A100 MIG 1g.5gb"}]
    card = {"UUID": "GPU-a", "MigMode": [1, 1], "CudaComputeCapability": (8, 0), "slices": slices}
    found = gpus(FakeLibrary([card]))
    assert [one.facts().uuid for one in found] == ["MIG-1", "MIG-2"]
    assert found[0].facts().mig is True
    assert found[0].facts().compute_capability == (8, 0)
    assert found[0].total_energy_mj() is None


def test_facts_and_readings_come_in_our_units() -> None:
    card = {
        "Name": "NVIDIA H200",
        "MemoryInfo": SimpleNamespace(total=150, used=50),
        "PciInfo": SimpleNamespace(busId=b"0000:17:00.0"),
        "EnforcedPowerLimit": 700_000,
        "PowerManagementLimitConstraints": [200_000, 700_000],
        "CurrentEccMode": 1,
        "MigMode": [0, 0],
        "DisplayActive": 0,
        "ClockInfo": lambda kind: {1: 1980, 2: 3201}[kind],
        "MaxClockInfo": lambda kind: {1: 1980, 2: 3201}[kind],
        "Temperature": lambda sensor: 31,
        "CurrentClocksThrottleReasons": 0x24,
        "FieldValues": fields(f186=512_500, f74=10, f269=20),
        "TotalEnergyConsumption": 7,
    }
    gpu = NvmlGpu(card, FakeLibrary([card]))
    facts = gpu.facts()
    assert (facts.pci_bus_id, facts.ecc, facts.mig, facts.display_active) == ("0000:17:00.0", True, False, False)
    assert (facts.power_limit_min_w, facts.power_limit_max_w, facts.power_limit_default_w) == (200.0, 700.0, None)
    assert (gpu.power_limit_w(), gpu.power_w(), gpu.memory_used_bytes()) == (700.0, 512.5, 50)
    assert (gpu.sm_clock_mhz(), gpu.memory_clock_mhz(), gpu.temperature_c()) == (1980, 3201, 31)
    assert gpu.event_reasons() == EventReason.SW_POWER_CAP | EventReason.SW_THERMAL
    assert gpu.slowdown_ns() == {"power_cap": 10, "sw_thermal": 20}


@pytest.mark.parametrize(
    ("capability", "instant", "average"), [((7, 5), 250.0, None), ((8, 0), 250.0, None), ((8, 6), None, 250.0)]
)
def test_the_old_power_query_is_an_instant_or_an_average_by_generation(
    capability: tuple[int, int], instant: float | None, average: float | None
) -> None:
    card = {"PowerUsage": 250_000, "CudaComputeCapability": capability}
    gpu = NvmlGpu(card, FakeLibrary([card]))
    assert (gpu.power_w(), gpu.power_average_w()) == (instant, average)


def test_processes_carry_memory_and_recent_utilisation() -> None:
    now_us = int(time.time() * 1e6)
    samples = [
        SimpleNamespace(pid=1, smUtil=40, timeStamp=now_us),
        SimpleNamespace(pid=1, smUtil=99, timeStamp=now_us - 10_000_000),  # long ago
    ]
    running = [SimpleNamespace(pid=1, usedGpuMemory=10), SimpleNamespace(pid=2, usedGpuMemory=None)]
    card = {"ComputeRunningProcesses": running, "ProcessUtilization": lambda since: samples}
    gpu = NvmlGpu(card, FakeLibrary([card]))
    assert gpu.processes() == (GpuProcess(1, 10, 40.0), GpuProcess(2, None, 0.0))
    assert gpu.process_memory_bytes(1) == 10
    assert gpu.process_memory_bytes(3) is None  # not visible: another PID namespace


@pytest.mark.parametrize(("error", "utilization"), [(0, 0.0), (6, 0.0), (3, None), (4, None)])
def test_no_sample_means_idle_but_no_support_means_unknown(error: int, utilization: float | None) -> None:
    def fail(since: int) -> None:
        raise FakeError(error)

    card = {"ComputeRunningProcesses": [SimpleNamespace(pid=1, usedGpuMemory=10)], "ProcessUtilization": fail}
    assert NvmlGpu(card, FakeLibrary([card])).processes() == (GpuProcess(1, 10, utilization),)


def test_without_a_driver_there_is_no_card() -> None:
    if nvml._library() is not None:
        pytest.skip("this machine has NVML")
    assert gpus() == []
    assert open_gpu("GPU-a").unavailable == "nvml_missing"


def test_the_fake_counter_moves_only_at_ticks_and_by_the_scripted_energy() -> None:
    clock = ManualClock()
    gpu = FakeGpu(clock, power_w=[(0, 100), (2, 600), (10, 100)], tick_s=0.1, start_mj=0)
    clock.now = 1.95
    assert gpu.total_energy_mj() == 190_000
    clock.now = 12.0
    assert gpu.total_energy_mj() == 5_200_000
    assert gpu.joules_between(0, 12) == pytest.approx(5200)
    assert gpu.power_w() == 100


def test_the_fake_counter_can_reset_wrap_and_stick() -> None:
    clock = ManualClock(5.0)
    assert FakeGpu(clock, power_w=100, start_mj=10**6, reset_at_s=4.0).total_energy_mj() == 100_000
    assert FakeGpu(clock, power_w=100, start_mj=0, wrap_mj=300_000).total_energy_mj() == 200_000
    assert FakeGpu(clock, power_w=100, start_mj=0, stuck_at_s=1.0).total_energy_mj() == 100_000
    assert FakeGpu(clock, unsupported=("total_energy_mj",)).total_energy_mj() is None
    assert FakeGpu(clock, unsupported=("slowdown_ns",), slowdown_ns={"thermal": 1}).slowdown_ns() == {}

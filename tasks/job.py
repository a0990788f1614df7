"""What crosses the border into an isolated process and back: plain data, JSON both ways."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tasks.cell import Cell
from tasks.device import DeviceInfo


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How long and how precisely one run measures. Times in seconds, `precision` a relative half-width."""

    name: str
    rounds: int
    precision: float
    warmup_min_s: float
    warmup_max_s: float
    latency_s: float
    latency_max_s: float
    device_s: float
    throughput_s: float
    energy_window_s: float
    energy_windows: int
    executed: bool


PROFILES = {
    "quick": Profile(
        name="quick", rounds=3, precision=0.02, warmup_min_s=0.5, warmup_max_s=5.0, latency_s=1.0, latency_max_s=2.0,
        device_s=0.5, throughput_s=1.0, energy_window_s=2.0, energy_windows=1, executed=False,
    ),
    "standard": Profile(
        name="standard", rounds=5, precision=0.01, warmup_min_s=3.0, warmup_max_s=60.0, latency_s=3.0,
        latency_max_s=30.0, device_s=2.0, throughput_s=5.0, energy_window_s=5.0, energy_windows=1, executed=True,
    ),
    "publish": Profile(
        name="publish", rounds=10, precision=0.005, warmup_min_s=3.0, warmup_max_s=60.0, latency_s=10.0,
        latency_max_s=120.0, device_s=5.0, throughput_s=10.0, energy_window_s=10.0, energy_windows=3, executed=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """One run of one cell, as the driver hands it to a runner.

    `device` is the slot it runs on; a simulated one runs on the CPU. `memory_budget_bytes` caps the process (CPU)
    or the device (CUDA). `artifact_dir` is local to the node, and making one artifact may take
    `artifact_timeout_s`. `checkpoint` is the hash of the model's weights, where the supervisor has read them:
    minutes for large ones. `ceilings` and `idle_power_w` (`idle_power_missing`: why not) were measured on this
    device in this sweep. `executed` demands a freshly executed process. `search_path` are folders in which a model
    factory may be found, the sweep file's own first. `quality_choices_file` holds the user's questions, the shipped
    ones when empty; `quality_tasks` are names of lm-evaluation-harness. `temperature_c` is what the block's first
    run started at.
    """

    sweep: str
    cell: Cell
    hardware_requested: str
    device: DeviceInfo
    profile: str
    round: int
    block_id: str
    order_in_round: int
    result_key: str
    run_id: str
    attempt: int = 1
    timeout_s: float = 600.0
    threads: int | None = None
    cpus: tuple[int, ...] = ()
    memory_budget_bytes: int | None = None
    artifact_dir: str = ""
    artifact_timeout_s: float = 3600.0
    checkpoint: str = ""
    compile_cache_dir: str = ""
    compile_cold: bool = False
    executed: bool = False
    quality: bool = False
    quality_tokens: int = 2048
    quality_choices: int = 100
    quality_choices_file: str = ""
    quality_tasks: tuple[str, ...] = ()
    quality_tasks_path: str = ""
    quality_tasks_limit: int | None = None
    ceilings: dict[str, float] = field(default_factory=dict)
    idle_power_w: float | None = None
    idle_power_missing: str = ""
    temperature_c: float | None = None
    search_path: tuple[str, ...] = ()
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "ceilings": dict(self.ceilings),
            "cell": self.cell.to_dict(),
            "device": self.device.to_dict(),
            "cpus": list(self.cpus),
            "search_path": list(self.search_path),
            "quality_tasks": list(self.quality_tasks),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CellJob:
        return cls(
            **{
                **data,
                "cell": Cell.from_dict(data["cell"]),
                "device": DeviceInfo.from_dict(data["device"]),
                "cpus": tuple(data["cpus"]),
                "search_path": tuple(data["search_path"]),
                "quality_tasks": tuple(data["quality_tasks"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class SampleSeries:
    """Raw samples of one pass of one run: milliseconds and when each ended, seconds since the pass began.

    SM clocks stand beside those of the latency pass, `clock_s` on its time: asked just before it, and again while the
    throughput pass runs, since asking would disturb the passes between.
    """

    cell_id: str
    round: int
    result_key: str
    measured_in: str  # latency, device, throughput, warmup
    label: str
    values_ms: list[float]
    ended_s: list[float]
    sm_clock_mhz: list[float] = field(default_factory=list)
    clock_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one run leaves: the finished row and its raw samples, plain data."""

    row: dict[str, Any]
    samples: list[dict[str, Any]] = field(default_factory=list)

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import environment, host
from tasks.environment import fingerprint, git_revision, machine_key, packages_hash, public_variables, this_machine_key
from tasks.metric import Missing
from tasks.nvml import FakeGpu, GpuFacts, ManualClock, NoGpu
from tasks.row import ENVIRONMENT, Row

OTHERS_FILL = {
    "device_kind",
    "host_loop_ms",
    "host_loop_throughput_ms",
    "process_kind",
    "profile",
    "sm_clock_mhz_median",
    "temperature_c_start",
    "temperature_c_end",
    "throttled",
}


@pytest.mark.parametrize("gpu", [NoGpu(), FakeGpu(ManualClock())], ids=["cpu", "gpu"])
def test_the_fingerprint_fills_the_environment_columns_of_a_row(gpu: NoGpu | FakeGpu) -> None:
    found = fingerprint(gpu)
    assert set(found) == {column.name for column in ENVIRONMENT} - OTHERS_FILL
    Row().set(**found)  # refuses unknown columns and wrong types
    assert None not in found.values()


def test_a_cpu_has_no_uuid_and_says_so() -> None:
    found = fingerprint(NoGpu())
    assert found["device_name"] == host.cpu_info()["model"]
    assert found["device_uuid"] == found["power_limit_w"] == Missing(reason="cpu")
    assert json.loads(found["environment"])["gpu"] is None


def test_a_gpu_is_described_from_nvml() -> None:
    found = fingerprint(FakeGpu(ManualClock()))
    assert (found["device_name"], found["device_uuid"], found["power_limit_w"]) == ("NVIDIA Fake", "GPU-fake", 700.0)
    assert json.loads(found["environment"])["gpu"]["sm_clock_mhz"] == 1980


def test_torch_is_read_back_but_never_imported() -> None:
    code = (
        "import sys, json; from tasks.environment import fingerprint; from tasks.nvml import NoGpu\n"
        "f = fingerprint(NoGpu()); assert 'torch' not in sys.modules; print(f['threads'], f['cuda'], f['torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "torch_not_imported" in done.stdout


def test_settings_are_those_of_the_live_process() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = fingerprint(NoGpu())
    finally:
        torch.set_num_threads(before)
    assert found["threads"] == 1
    assert json.loads(found["environment"])["torch"]["sdpa_math"] is True


def test_a_warm_fingerprint_takes_less_than_30_ms() -> None:
    fingerprint(NoGpu())
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        fingerprint(NoGpu())
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.03


BASE: dict[str, Any] = {"cpu_model": "EPYC", "physical_cores": 64, "memory_bytes": 256 * 2**30, "gpus": []}
CARDS = [GpuFacts(uuid="GPU-a", name="A100", memory_bytes=80), GpuFacts(uuid="GPU-b", name="A100", memory_bytes=80)]


@pytest.mark.parametrize(
    "changed",
    [
        {"memory_bytes": 256 * 2**30 - 50 * 2**20},  # the kernel reserves a little more after an update
        {"gpus": []},
    ],
)
def test_the_machine_key_survives_a_reboot(changed: dict[str, Any]) -> None:
    assert machine_key(**BASE) == machine_key(**{**BASE, **changed})


@pytest.mark.parametrize(
    "changed", [{"cpu_model": "Xeon"}, {"physical_cores": 32}, {"memory_bytes": 128 * 2**30}, {"gpus": CARDS}]
)
def test_the_machine_key_tells_machines_apart(changed: dict[str, Any]) -> None:
    assert machine_key(**BASE) != machine_key(**{**BASE, **changed})


def test_with_gpus_their_order_and_the_growing_memory_do_not_count() -> None:
    one = machine_key(**{**BASE, "gpus": CARDS})
    assert one == machine_key(**{**BASE, "gpus": CARDS[::-1], "memory_bytes": 31 * 2**30})
    assert one != machine_key(**{**BASE, "gpus": CARDS[:1]})


def test_the_machine_key_does_not_depend_on_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    before = this_machine_key()
    this_machine_key.cache_clear()
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert this_machine_key() == before
    finally:
        os.sched_setaffinity(0, allowed)


def test_secrets_are_left_out_and_the_tokenizer_switch_is_not_one() -> None:
    given_variables = {
        "CUDA_VISIBLE_DEVICES": "GPU-a",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_SECRET": "x",
        "TORCH_API_KEY": "x",
        "CUDA_TOKEN": "x",
        "TORCH_MIRROR": "https://user:password@host",
        "HF_TOKEN": "x",
        "HOME": "/root",
    }
    assert set(public_variables(given_variables)) == {
        "CUDA_VISIBLE_DEVICES",
        "PYTORCH_ALLOC_CONF",
        "TOKENIZERS_PARALLELISM",
    }


def test_the_revision_may_be_given_to_a_node_without_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    git_revision.cache_clear()
    monkeypatch.setenv(environment.REVISION_VARIABLE, "abc+dirty")
    assert git_revision() == "abc+dirty"
    git_revision.cache_clear()


def test_the_revision_of_a_copy_without_a_repository_is_not_a_neighbours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(environment.REVISION_VARIABLE, raising=False)
    monkeypatch.setattr(environment, "_PROJECT", tmp_path)
    git_revision.cache_clear()
    revision = git_revision()
    git_revision.cache_clear()
    assert revision is None or "+" not in revision


def test_the_hash_of_packages_is_stable() -> None:
    first = packages_hash()
    packages_hash.cache_clear()
    assert packages_hash() == first


@given(st.sets(st.integers(0, 300)))
def test_ranges_can_be_read_back(cpus: set[int]) -> None:
    parts = [part.split("-") for part in host.ranges(cpus).split(",") if part]
    assert {cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)} == cpus
    assert host.ranges({0, 1, 2, 3, 8}) == "0-3,8"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MEMINFO = "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    900 kB\n"


@pytest.mark.parametrize(
    ("files", "limit", "free", "quota"),
    [
        ({}, 1000 * 1024, 900 * 1024, None),
        (
            {
                "proc/self/cgroup": "0::/slice/job\n",
                "sys/fs/cgroup/slice/memory.max": "500000\n",
                "sys/fs/cgroup/slice/memory.current": "100000\n",
                "sys/fs/cgroup/slice/job/memory.max": "max\n",
                "sys/fs/cgroup/slice/job/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/slice/cpu.max": "max 100000\n",
            },
            500_000,
            400_000,
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "600000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            600_000,
            599_999,
            None,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            1000 * 1024,
            900 * 1024,
            None,
        ),
    ],
    ids=["none", "version 2", "version 1", "version 1 unlimited"],
)
def test_memory_and_quota_are_the_tightest_of_machine_and_cgroups(
    tmp_path: Path, files: dict[str, str], limit: int, free: int, quota: float | None
) -> None:
    root = tree(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert (host.memory_bytes(root), host.free_memory_bytes(root), host.cpu_quota(root)) == (limit, free, quota)


def test_cores_are_physical_and_within_the_quota(tmp_path: Path) -> None:
    topology = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}" for n in range(4)
    }
    assert host.physical_cores({0, 1, 2, 3}, tree(tmp_path, topology)) == 2
    assert host.physical_cores({0, 2}, tmp_path) == 1
    assert host.physical_cores({7, 8, 9}, tmp_path) == 3  # nothing known: every CPU is a core
    tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert host.physical_cores({0, 1, 2, 3}, tmp_path) == 1


CPUINFO = "\n\n".join(
    f"processor\t: {n}\nmodel name\t: EPYC\nphysical id\t: {n // 4}\ncore id\t: {n % 2}\nflags\t: avx2 amx"
    for n in range(8)
)
ARM = "\n\n".join(
    f"processor\t: {n}\nFeatures\t: asimd sve2\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f" for n in range(4)
)


@pytest.mark.parametrize(
    ("content", "check"),
    [
        (CPUINFO, lambda cpu: (cpu["model"], cpu["sockets"], cpu["physical_cores"]) == ("EPYC", 2, 4)),
        (CPUINFO, lambda cpu: cpu["logical_cpus"] == 8 and cpu["flags"] == ("avx2", "amx")),
        (ARM, lambda cpu: cpu["physical_cores"] == 4 and "0x41 0xd4f" in cpu["model"] and "sve2" in cpu["flags"]),
        ("", lambda cpu: cpu["physical_cores"] == os.cpu_count() and cpu["flags"] == ()),
    ],
)
def test_cpu_facts(tmp_path: Path, content: str, check: Callable[[dict[str, Any]], bool]) -> None:
    cpu = host.cpu_info(tree(tmp_path, {"proc/cpuinfo": content}))
    assert check(cpu), cpu

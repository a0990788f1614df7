"""The machine under the process, from /proc, /sys and cgroups; None where the kernel or a container does not tell."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path("/")
_CPU = "sys/devices/system/cpu"
_UNLIMITED = 2**60  # version 1 of cgroups writes "no limit" as a number near 2**63


@cache
def cpu_info(root: Path = ROOT) -> dict[str, Any]:
    """`model`, `microcode`, `flags`, `sockets`, `physical_cores`, `logical_cpus` of the whole machine."""
    blocks = [
        dict(_pairs(block)) for block in (text(root / "proc/cpuinfo") or "").split("\n\n") if "processor" in block
    ]
    first = blocks[0] if blocks else {}
    part = f"{first.get('CPU implementer', '')} {first.get('CPU part', '')}".strip()
    cores = {(block.get("physical id", "0"), block.get("core id", block.get("processor"))) for block in blocks}
    return {
        "model": first.get("model name") or (f"{platform.machine()} {part}".strip() or "unknown CPU"),
        "microcode": first.get("microcode"),
        "flags": tuple((first.get("flags") or first.get("Features") or "").split()),
        "sockets": len({block.get("physical id", "0") for block in blocks}) or 1,
        "physical_cores": len(cores) or os.cpu_count() or 1,
        "logical_cpus": len(blocks) or os.cpu_count() or 1,
    }


def physical_cores(cpus: Collection[int], root: Path = ROOT) -> int:
    """Physical cores among the logical `cpus`, at most what a cgroup's CPU quota allows, at least one."""
    siblings = {text(root / _CPU / f"cpu{cpu}/topology/thread_siblings_list") or f"alone {cpu}" for cpu in cpus}
    quota = cpu_quota(root)
    return max(1, len(siblings) if quota is None else min(len(siblings), int(quota)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that the tightest cgroup allows, None without a limit."""
    limits: list[float] = []
    for folder in _cgroups("cpu", root):
        quota, _, period = (text(folder / "cpu.max") or "").partition(" ")
        if not quota:
            quota, period = text(folder / "cpu.cfs_quota_us") or "", text(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit():
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_bytes(root: Path = ROOT) -> int:
    """What this process may use: the tightest cgroup limit or MemTotal."""
    return min([meminfo(root).get("MemTotal", 0), *(limit for limit, _ in _memory_limits(root))])


def free_memory_bytes(root: Path = ROOT) -> int:
    """What it could allocate now: MemAvailable, or what a cgroup leaves."""
    return min([meminfo(root).get("MemAvailable", 0), *(max(limit - used, 0) for limit, used in _memory_limits(root))])


def meminfo(root: Path = ROOT) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    rows = [line.split() for line in (text(root / "proc/meminfo") or "").splitlines()]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) >= 2}


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    for folder in _cgroups("memory", root):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            value = text(folder / limit) or ""
            if value.isdigit() and int(value) < _UNLIMITED:
                yield int(value), int(text(folder / used) or 0)


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """This process's cgroup for `controller` and its parents, in either version; a container sees only its own."""
    base = root / "sys/fs/cgroup"
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for mount in (base / controller, base / "unified", base) if controllers == "" else (base / controller,):
            folder = mount / path.lstrip("/")
            while folder.is_relative_to(mount):
                if folder.is_dir():
                    yield folder
                folder = folder.parent


def ranges(cpus: Iterable[int]) -> str:
    """`{0, 1, 2, 3, 8}` as `0-3,8`."""
    groups: list[list[int]] = []
    for cpu in sorted(cpus):
        if groups and cpu == groups[-1][-1] + 1:
            groups[-1].append(cpu)
        else:
            groups.append([cpu])
    return ",".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)


@cache
def static_facts(root: Path = ROOT) -> dict[str, Any]:
    """What holds while the process lives."""
    cpu = {key: value for key, value in cpu_info(root).items() if key != "flags"}
    flags = cpu_info(root)["flags"]
    release = platform.release()
    return {
        **{f"cpu_{key}": value for key, value in cpu.items()},
        "smt": text(root / _CPU / "smt/active"),
        "numa_nodes": text(root / "sys/devices/system/node/online"),
        "hypervisor": text(root / "sys/class/dmi/id/sys_vendor") if "hypervisor" in flags else None,
        "virtual": "hypervisor" in flags,
        "wsl": "microsoft" in release.lower(),
        "container": any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv")),
        "kernel": release,
        "clocksource": text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "memory_total_bytes": meminfo(root).get("MemTotal"),
        "memory_limit_bytes": min((limit for limit, _ in _memory_limits(root)), default=None),
        "cpu_quota": cpu_quota(root),
        "hostname": socket.gethostname(),
    }


def changing_facts(root: Path = ROOT) -> dict[str, Any]:
    """What an administrator or another process may change between two cells."""
    no_turbo, boost = text(root / _CPU / "intel_pstate/no_turbo"), text(root / _CPU / "cpufreq/boost")
    turbo = None if no_turbo is None and boost is None else (no_turbo == "0" if no_turbo is not None else boost == "1")
    return {
        "governor": text(root / _CPU / "cpu0/cpufreq/scaling_governor"),
        "turbo": turbo,
        "transparent_hugepages": _chosen(text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        "load_average_1min": os.getloadavg()[0],
        "cpu_pressure": (text(root / "proc/pressure/cpu") or "").partition("\n")[0] or None,
        "memory_available_bytes": meminfo(root).get("MemAvailable"),
    }


def text(path: Path) -> str | None:
    """A small file's text without the blanks around it, or None."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _pairs(block: str) -> Iterator[tuple[str, str]]:
    for line in block.splitlines():
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _chosen(setting: str | None) -> str | None:
    """`always [madvise] never` -> `madvise`."""
    return setting.partition("[")[2].partition("]")[0] or setting if setting else None

"""Gates that a row must pass before it may be compared: pure functions of what the row says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.device import DeviceInfo, hardware_tag, tag_matches

CEILING_TOLERANCE = 1.02  # ceilings are medians themselves


def invalid_reasons(row: Mapping[str, Any] | Any, device: DeviceInfo) -> list[str]:
    """What makes this row invalid, beyond what the step, the evidence and the compiler already found."""
    found = []
    # a kernel may skip what a causal mask throws away, and only what must be executed can be too fast
    executed = row["flops_least"] / row["flops"] if row["flops"] and row["flops_least"] else 1.0
    if row["mfu"] is not None and exceeds(row["mfu"] * executed):
        found.append("above_compute_ceiling")
    if exceeds(row["mbu"]):
        found.append("above_bandwidth_ceiling")
    if device.kind == "cuda" and not device.simulated:
        actual = hardware_tag(device.name, device.memory_bytes)
        if not tag_matches(row["hardware"], actual):
            found.append(f"tag_disagrees:{actual}")
    return found


def exceeds(utilisation: float | None) -> bool:
    """Whether a share of a measured ceiling cannot be."""
    return utilisation is not None and utilisation > CEILING_TOLERANCE

"""What a device is, as plain data that placement and techniques can ask without torch, and its hardware tag."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

DeviceKind = Literal["cuda", "cpu"]
HEAD_TAG = "head"  # declared by nodes that only coordinate: nothing is measured there


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """One bench slot: an accelerator, or the CPU of a node.

    `memory_bytes` is the device's memory (host memory for a CPU). `compute_capability` is `(major, minor)` on CUDA.
    `packages` maps installed distribution names to versions; `cpu_flags` holds what matters for dtypes
    (`avx512_bf16`, `amx_bf16`). `simulated` marks an accelerator that Ray was told of but the node does not have.
    """

    kind: DeviceKind
    name: str
    tag: str
    memory_bytes: int
    index: int = 0
    uuid: str | None = None
    compute_capability: tuple[int, int] | None = None
    driver: str | None = None
    cores: int = 1
    cpu_flags: tuple[str, ...] = ()
    packages: dict[str, str] = field(default_factory=dict)
    simulated: bool = False

    @cached_property
    def kind_key(self) -> tuple[Any, ...]:
        """Equal for devices that can run the same cells."""
        packages = tuple(sorted(self.packages.items()))
        return self.kind, self.tag, self.memory_bytes, self.compute_capability, self.cpu_flags, self.simulated, packages

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"packages": dict(self.packages)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DeviceInfo:
        capability = data.get("compute_capability")
        return cls(
            **{
                **data,
                "compute_capability": tuple(capability) if capability else None,
                "cpu_flags": tuple(data.get("cpu_flags", ())),
            }
        )


_TWO_SIZES = {"a100": (40, 80), "h100": (80, 94), "v100": (16, 32), "rtx3080": (10, 12), "rtx4060ti": (8, 16)}


def hardware_tag(name: str, memory_bytes: int) -> str:
    """Tag of a CUDA device from NVML's name: `NVIDIA GeForce RTX 4060 Laptop GPU` -> `rtx4060-laptop`.

    Cards sold with two memory sizes carry it: `a100-40gb`, `a100-80gb`. MIG slices end in `-mig`.
    """
    text = name.lower().replace("nvidia", " ").replace("geforce", " ").replace("tesla", " ")
    mig = " mig " in f" {text} "
    laptop = "laptop" in text or "max-q" in text
    workstation = re.search(r"\brtx[ -]?(a?\d{4})\s*(ada)?", text)
    family = re.search(r"\b([abghlvpt]\d{1,3}[a-z]?)\b", text)
    if workstation:
        suffix = re.search(r"\d{4}\s*(ti super|ti|super)\b", text)
        base = f"rtx{workstation.group(1)}{(suffix.group(1) if suffix else '').replace(' ', '')}"
        base += "-ada" if workstation.group(2) else ""
    elif family:
        base = family.group(1)
    else:
        base = re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "gpu"
    if base in _TWO_SIZES:
        gigabytes = memory_bytes / 2**30
        base += f"-{min(_TWO_SIZES[base], key=lambda size: abs(size - gigabytes))}gb"
    return base + ("-laptop" if laptop else "") + ("-mig" if mig else "")


def tag_matches(requested: str, actual: str) -> bool:
    """Whether a device tagged `actual` serves a request for `requested`: equal, or without the memory size."""
    return requested == actual or re.fullmatch(re.escape(requested) + r"-\d+gb", actual) is not None

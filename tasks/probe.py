"""What a node has, without torch and in well under a second: its devices with their tags, packages, versions."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tasks import host
from tasks.device import HEAD_TAG, DeviceInfo, hardware_tag, tag_matches
from tasks.environment import git_revision, this_machine_key, version
from tasks.gpu import Gpu
from tasks.nvml import gpus
from tasks.registry import optimizations

# Distributions that rows, keys or reasons name; whatever a technique needs is added.
PACKAGES = (
    "accelerate",
    "benchmatrix",
    "bitsandbytes",
    "flash-attn",
    "flash_attn_3",
    "gptqmodel",
    "llama-cpp-python",
    "lm-eval",
    "numpy",
    "nvidia-ml-py",
    "onnxruntime",
    "onnxruntime-gpu",
    "peft",
    "ray",
    "safetensors",
    "torch",
    "torchao",
    "torchvision",
    "transformers",
    "triton",
)


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """A node as it is. `devices`: its GPUs in NVML's order, then always its CPU; `disagreements` are sentences.

    `free_bytes` is the memory that is free now on each of `devices`, the host's for a CPU; None where it is not known.
    """

    hostname: str
    devices: tuple[DeviceInfo, ...]
    python: str
    machine_key: str
    memory_bytes: int
    free_memory_bytes: int
    packages: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    driver: str | None = None
    free_bytes: tuple[int | None, ...] = ()
    disagreements: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "devices": [device.to_dict() for device in self.devices],
            "free_bytes": list(self.free_bytes),
            "disagreements": list(self.disagreements),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NodeReport:
        return cls(
            **{
                **data,
                "devices": tuple(DeviceInfo.from_dict(device) for device in data["devices"]),
                "free_bytes": tuple(data["free_bytes"]),
                "disagreements": tuple(data["disagreements"]),
            }
        )


def probe(
    declared_tag: str | None = None, declared_gpus: int | None = None, *, cards: Sequence[Gpu] | None = None
) -> NodeReport:
    """Look at this node. `declared_tag` and `declared_gpus` are what Ray was told; `cards` replaces NVML in tests.

    GPUs that were declared with a tag but that nobody finds become simulated devices, which run on the CPU.
    """
    seen = [(_cuda(card), card) for card in (gpus() if cards is None else cards)]
    found = [device for device, _ in seen if device]
    free = host.free_memory_bytes()
    cpu = host_cpu()
    packages = cpu.packages
    simulated: list[DeviceInfo] = []
    if declared_tag and declared_gpus and not found:
        simulated = [_simulated(declared_tag, index, cpu) for index in range(declared_gpus)]
    return NodeReport(
        hostname=socket.gethostname(),
        devices=(*found, *simulated, cpu),
        python=platform.python_version(),
        machine_key=this_machine_key(),
        memory_bytes=cpu.memory_bytes,
        free_memory_bytes=free,
        free_bytes=(*(_free(card) for device, card in seen if device), *(free for _ in (*simulated, cpu))),
        packages=packages,
        git_revision=git_revision(),
        driver=next((device.driver for device in found if device.driver), None),
        disagreements=tuple(_disagreements(declared_tag, declared_gpus, found)),
    )


def installed_packages() -> dict[str, str]:
    """Versions of the distributions of interest that are installed, under the names that techniques use."""
    needs = [technique.needs for technique in optimizations().values()]
    names = {*PACKAGES, *(name for need in needs for name in (*need.packages, *need.optional_packages))}
    versions = {name: version(name) for name in sorted(names)}
    return {name: found for name, found in versions.items() if found is not None}


def _cuda(card: Gpu) -> DeviceInfo | None:
    facts = card.facts()
    if facts.name is None or facts.memory_bytes is None:
        return None  # a card that fell off the bus still counts in NVML
    return DeviceInfo(
        kind="cuda",
        name=facts.name,
        tag=hardware_tag(facts.name, facts.memory_bytes),
        memory_bytes=facts.memory_bytes,
        index=facts.index or 0,
        uuid=facts.uuid,
        compute_capability=facts.compute_capability,
        driver=facts.driver,
        cores=host.physical_cores(os.sched_getaffinity(0)),
        cpu_flags=_dtype_flags(),
        packages=installed_packages(),
    )


def _free(card: Gpu) -> int | None:
    total, used = card.facts().memory_bytes, card.memory_used_bytes()
    return None if total is None or used is None else total - used


def host_cpu() -> DeviceInfo:
    """The CPU of this node as a bench slot."""
    return DeviceInfo(
        kind="cpu",
        name=host.cpu_info()["model"],
        tag="cpu",
        memory_bytes=host.memory_bytes(),
        cores=host.physical_cores(os.sched_getaffinity(0)),
        cpu_flags=_dtype_flags(),
        packages=installed_packages(),
    )


def _dtype_flags() -> tuple[str, ...]:
    """The vector and matrix extensions: what decides which dtypes are fast."""
    prefixes = ("avx", "amx", "fma", "f16c", "asimd", "bf16", "i8mm", "sve", "sme")
    return tuple(flag for flag in host.cpu_info()["flags"] if flag.startswith(prefixes))


def _simulated(tag: str, index: int, cpu: DeviceInfo) -> DeviceInfo:
    return DeviceInfo(
        kind="cpu",
        name=f"simulated {tag}",
        tag=tag,
        memory_bytes=cpu.memory_bytes,
        index=index,
        cores=cpu.cores,
        cpu_flags=cpu.cpu_flags,
        packages=cpu.packages,
        simulated=True,
    )


def _disagreements(tag: str | None, declared: int | None, found: Sequence[DeviceInfo]) -> list[str]:
    sentences: list[str] = []
    if tag == HEAD_TAG:
        return sentences
    others = sorted({device.tag for device in found if tag not in (None, "cpu") and not tag_matches(tag, device.tag)})
    if others:
        sentences.append(f"it was declared as {tag} but NVML finds {', '.join(others)}: correct its label")
    if declared and not found:
        fate = f"they are simulated on the CPU as {tag}" if tag else "they are not used, since no tag was declared"
        sentences.append(f"Ray was told of {declared} GPU(s) but NVML finds none: {fate}")
    elif declared is not None and declared > len(found):
        sentences.append(f"Ray was told of {declared} GPUs but NVML finds {len(found)}: start it with the right number")
    if tag not in (None, "cpu") and not declared and not found:
        sentences.append(f"it was declared as {tag} but has no GPU, neither declared to Ray nor seen by NVML")
    return sentences

"""Hardware tags of the names that NVML gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks.device import DeviceInfo, hardware_tag, tag_matches


@pytest.mark.parametrize(
    ("name", "gib", "tag"),
    [
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.5, "a100-40gb"),
        ("NVIDIA A10", 22.5, "a10"),
        ("NVIDIA A10G", 22.5, "a10g"),
        ("NVIDIA A30", 24, "a30"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-80gb"),
        ("NVIDIA H100 NVL", 93.6, "h100-94gb"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA B200", 179, "b200"),
        ("NVIDIA L4", 22.5, "l4"),
        ("NVIDIA L40S", 45, "l40s"),
        ("Tesla T4", 15, "t4"),
        ("Tesla V100-SXM2-16GB", 16, "v100-16gb"),
        ("Tesla V100-SXM2-32GB", 32, "v100-32gb"),
        ("Tesla P100-PCIE-16GB", 16, "p100"),
        ("NVIDIA GeForce RTX 3090", 24, "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", 24, "rtx3090ti"),
        ("NVIDIA GeForce RTX 3080", 10, "rtx3080-10gb"),
        ("NVIDIA GeForce RTX 3080", 12, "rtx3080-12gb"),
        ("NVIDIA GeForce RTX 4060", 8, "rtx4060"),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "rtx4060ti-16gb"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8, "rtx4060-laptop"),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", 8, "rtx2080-laptop"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, "rtx4070tisuper"),
        ("NVIDIA GeForce RTX 4080 SUPER", 16, "rtx4080super"),
        ("NVIDIA GeForce RTX 5090", 32, "rtx5090"),
        ("NVIDIA RTX A6000", 48, "rtxa6000"),
        ("NVIDIA RTX 6000 Ada Generation", 48, "rtx6000-ada"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9.75, "a100-40gb-mig"),
        ("NVIDIA GeForce GTX 1080 Ti", 11, "gtx-1080-ti"),
        ("NVIDIA TITAN RTX", 24, "titan-rtx"),
        ("", 1, "gpu"),
    ],
)
def test_tag(name: str, gib: float, tag: str) -> None:
    assert hardware_tag(name, round(gib * 2**30)) == tag


@pytest.mark.parametrize(
    ("requested", "actual", "serves"),
    [
        ("a100", "a100-80gb", True),
        ("a100", "a100-40gb", True),
        ("a100-80gb", "a100-80gb", True),
        ("a100-80gb", "a100-40gb", False),
        ("a100-80gb", "a100", False),
        ("a10", "a100-40gb", False),
        ("rtx4060", "rtx4060-laptop", False),
        ("rtx4060", "rtx4060ti-16gb", False),
        ("a100", "a100-80gb-mig", False),
        ("cpu", "cpu", True),
        ("a.00", "a100-80gb", False),
    ],
)
def test_which_device_serves_a_request(requested: str, actual: str, serves: bool) -> None:
    assert tag_matches(requested, actual) is serves


def test_round_trip(bench: Any) -> None:
    for kind in ("cpu", "cuda"):
        device = bench.device(kind, cpu_flags=("amx_bf16",))
        assert DeviceInfo.from_dict(json.loads(json.dumps(device.to_dict()))) == device

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tasks.nvml import FakeGpu, Gpu, GpuFacts, ManualClock, NoGpu
from tasks.probe import NodeReport, probe


def card(name: str = "NVIDIA H200", gigabytes: int = 141, index: int = 0) -> Gpu:
    facts = GpuFacts(
        name=name,
        uuid=f"GPU-{index}",
        index=index,
        memory_bytes=gigabytes * 2**30,
        compute_capability=(9, 0),
        driver="580.1",
    )
    return FakeGpu(ManualClock(), facts=facts)


def test_a_node_without_a_gpu_has_one_device_its_cpu() -> None:
    report = probe(cards=[])
    (cpu,) = report.devices
    assert (cpu.kind, cpu.tag, cpu.simulated) == ("cpu", "cpu", False)
    assert cpu.cores >= 1
    assert report.free_memory_bytes > 0
    assert cpu.memory_bytes == report.memory_bytes > 2**28
    assert report.packages["torch"] and cpu.packages == report.packages
    assert report.disagreements == ()
    assert len(report.machine_key) == 16


def test_every_gpu_is_a_device_before_the_cpu() -> None:
    report = probe("h200", 2, cards=[card(index=0), card("NVIDIA H200", 141, 1)])
    assert [(device.kind, device.tag, device.index) for device in report.devices] == [
        ("cuda", "h200", 0),
        ("cuda", "h200", 1),
        ("cpu", "cpu", 0),
    ]
    assert report.devices[1].uuid == "GPU-1"
    assert report.driver == "580.1"
    assert report.disagreements == ()


def test_a_declared_gpu_that_nobody_finds_is_simulated_on_the_cpu() -> None:
    report = probe(declared_tag="rtx4060", declared_gpus=2, cards=[])
    pretended = report.devices[:2]
    assert [(device.kind, device.tag, device.simulated) for device in pretended] == [("cpu", "rtx4060", True)] * 2
    assert [device.index for device in pretended] == [0, 1]
    assert pretended[0].name == "simulated rtx4060"
    assert report.devices[2].tag == "cpu"
    assert report.disagreements == (
        "Ray was told of 2 GPU(s) but NVML finds none: they are simulated on the CPU as rtx4060",
    )


@pytest.mark.parametrize(
    ("tag", "count", "cards", "words"),
    [
        ("a100", 1, [card("NVIDIA A100-SXM4-80GB", 80)], None),
        ("rtx3090", 1, [card()], "declared as rtx3090 but NVML finds h200"),
        ("h200", 2, [card()], "told of 2 GPUs but NVML finds 1"),
        (None, 1, [], "no tag was declared"),
        ("a100", 0, [], "declared as a100 but has no GPU"),
        ("cpu", 0, [], None),
        ("cpu", 0, [card()], None),
        (None, None, [card()], None),
    ],
)
def test_what_was_declared_is_compared_with_what_is_there(
    tag: str | None, count: int | None, cards: list[Gpu], words: str | None
) -> None:
    sentences = probe(tag, count, cards=cards).disagreements
    assert (words is None) == (sentences == ())
    assert words is None or words in sentences[0]


def test_a_lost_card_is_no_device() -> None:
    assert [device.tag for device in probe(cards=[NoGpu("not_supported")]).devices] == ["cpu"]


def test_the_report_survives_json() -> None:
    report = probe("rtx4060", 1, cards=[card()])
    assert NodeReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_second_probe_is_quick() -> None:
    probe(cards=[])
    begun = time.perf_counter()
    probe(cards=[])
    assert time.perf_counter() - begun < 3


def test_probing_imports_no_torch() -> None:
    code = "import sys; from tasks.probe import probe; probe(cards=[]); print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"

"""ONNX Runtime beside a card: its CUDA provider where it has one, else its CPU and a refusal that says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.device import DeviceInfo
from tasks.metrics.memory import HIDDEN
from tasks.optimization import Evidence
from tasks.registry import optimizations
from tasks.stacks import parse_stack, unsupported
from tasks.supervisor import Supervisor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(900)]


def proof(name: str, session: Any) -> Evidence:
    (chosen,) = parse_stack(name).techniques
    return optimizations()[chosen.name].evidence(chosen, session)


def runs_on(bench: Any, device: DeviceInfo, stack: str, kind: str = "decode") -> Any:
    """A cell on the device, or a skip with the reason why it cannot be."""
    model = None if kind == "forward" else bench.POCKET
    cell = replace(bench.cell(kind, stack, model), hardware=device.tag)
    refusal = unsupported(cell, device)
    if refusal:
        pytest.skip(refusal)
    return cell


@pytest.mark.parametrize("name", ["onnx", "onnx-int8", "onnx-int4"])
def test_on_the_cpu_of_this_machine(bench: Any, card: DeviceInfo, name: str) -> None:
    """With the versions of torch, transformers and ONNX Runtime that it has."""
    cpu = bench.device(packages=card.packages)
    cell = runs_on(bench, cpu, name)
    with bench.live(bench.job(cell, device=cpu)) as session:
        tokens = session.step.tokens.clone()
        found = proof(name, session)
    assert found.ok, found.facts
    if name == "onnx":
        with bench.live(bench.job(bench.cell("decode", "fp32", bench.POCKET))) as session:
            assert session.step.tokens.equal(tokens)


@pytest.mark.parametrize("name", ["onnx", "onnx-int4"])
def test_on_the_card(bench: Any, card: DeviceInfo, name: str) -> None:
    cell = runs_on(bench, card, name)
    logits = {}
    for stack in ("fp32", name):
        with bench.live(bench.job(replace(cell, stack=parse_stack(stack)), device=card)) as session:
            ids = session.step._prompts[0]
            logits[stack] = session.model(input_ids=ids, use_cache=False).logits.float().clone()
            if stack == name:
                found = proof(name, session)
                assert found.ok, found.facts
                assert found.facts["providers"][0] == "CUDAExecutionProvider"
                assert session.step.problems() == []
                # token by token through its own buffers: the same as the whole sequence at once
                state = session.model.new_state(*ids.shape)
                for column in range(ids.shape[1]):
                    one = session.model(input_ids=ids[:, column : column + 1], past_key_values=state)
                last = one.logits[:, -1]
                whole = logits[stack][:, -1]
                assert float((last - whole).norm() / whole.norm()) < 1e-3
    apart = float((logits[name] - logits["fp32"]).norm() / logits["fp32"].norm())
    assert apart < (1e-4 if name == "onnx" else 0.2)


@pytest.mark.parametrize("name", ["onnx", "onnx-int4"])
def test_memory_on_the_card(bench: Any, card: DeviceInfo, name: str, tmp_path: Path) -> None:
    """What the runtime has taken beside PyTorch's allocator is the row's, not the few bytes that pass through torch."""
    cell = runs_on(bench, card, name)
    slot = Supervisor(card, cpus=bench.CPUS, log_path=tmp_path / "slot.log", work_dir=tmp_path / "work")
    slot.start()
    try:
        row = slot.measure(bench.job(cell, device=card, timeout_s=600.0)).row
    finally:
        slot.close()
    assert row["outcome"] == "ok", (row.get("reason"), row.get("evidence"))
    reasons = json.loads(row["null_reasons"])
    assert "onnxruntime allocates for itself" in reasons["peak_allocated_bytes"]
    if row.get("runtime_bytes") is None:
        assert reasons["runtime_bytes"] == HIDDEN
    else:
        assert row["model_bytes"] < row["runtime_bytes"] < row["peak_process_bytes"]
        assert row["flags"].count("memory_of_process") == 1


def test_images_on_the_card(bench: Any, card: DeviceInfo) -> None:
    cell = runs_on(bench, card, "onnx", "forward")
    logits = []
    for stack in ("fp32", "onnx"):
        with bench.live(bench.job(replace(cell, stack=parse_stack(stack)), device=card)) as session:
            logits.append(session.step.output.logits.clone())
            if stack == "onnx":
                found = proof(stack, session)
                assert found.ok, found.facts
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 1e-4

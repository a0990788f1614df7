"""Identity: one cell, one id, whatever the spelling, the order or the way it travelled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.cell import NO_MODEL, Cell, ModelSpec, Stack, Technique, WorkloadPoint, canonical_json, digest
from tasks.job import CellJob
from tasks.optimization import FAMILIES
from tasks.registry import optimizations
from tasks.run_cell import run_cell
from tasks.stacks import parse_stack

LLAMA = Cell(
    model=ModelSpec(id="llama", source="random", reference="llama-3.2-1b", kind="language"),
    workload=WorkloadPoint(kind="decode", parameters=(("batch_size", 1), ("new_tokens", 128), ("prompt_tokens", 512))),
    stack=parse_stack("bf16+static-cache+compile:mode=reduce-overhead"),
    hardware="a100-80gb",
    baseline=parse_stack("bf16"),
)
KERNEL = Cell(
    model=NO_MODEL,
    workload=WorkloadPoint(kind="attention", parameters=(("batch_size", 4), ("causal", False), ("heads", 12))),
    stack=Stack(),
    hardware="cpu",
)


def test_ids_are_golden() -> None:
    """Results on disk are found by these: a change here orphans every result folder there is."""
    assert LLAMA.cell_id == "9ac56d8380d18cfd"
    assert LLAMA.baseline_id == "61c61b3f8dfa27ce"
    assert LLAMA.group_id == "a14056ce0670d29c"
    assert KERNEL.cell_id == "0298ea244aa31fd7"


def test_baseline_is_the_cell_with_the_baseline_stack() -> None:
    assert replace(LLAMA, stack=LLAMA.baseline).cell_id == LLAMA.baseline_id
    assert KERNEL.cell_id == KERNEL.baseline_id


def test_group_is_all_but_the_stack() -> None:
    assert replace(LLAMA, stack=parse_stack("nf4")).group_id == LLAMA.group_id
    assert replace(LLAMA, hardware="h100-80gb").group_id != LLAMA.group_id


@pytest.mark.parametrize(
    "change",
    [
        {"hardware": "a100-40gb"},
        {"stack": parse_stack("bf16")},
        {"model": replace(LLAMA.model, reference="llama-3.1-8b")},
        {"model": replace(LLAMA.model, revision="main")},
        {"model": replace(LLAMA.model, trust_remote_code=True)},
        {"workload": WorkloadPoint(kind="decode", parameters=(("batch_size", 2),))},
        {"workload": replace(LLAMA.workload, kind="prefill")},
    ],
)
def test_every_part_changes_the_id(change: dict[str, Any]) -> None:
    assert replace(LLAMA, **change).cell_id != LLAMA.cell_id


def test_what_does_not_belong_to_identity() -> None:
    """The kind of a model is derived, and the baseline is what a cell is compared with, not what it is."""
    assert replace(LLAMA, model=replace(LLAMA.model, kind="unknown")).cell_id == LLAMA.cell_id
    assert replace(LLAMA, baseline=Stack()).cell_id == LLAMA.cell_id


def test_numbers_and_booleans_are_different() -> None:
    points = [WorkloadPoint(kind="x", parameters=(("a", value),)) for value in (1, True, "1")]
    assert len({replace(KERNEL, workload=point).cell_id for point in points}) == 3


@st.composite
def stacks(draw: st.DrawFn) -> tuple[str, str]:
    """Two spellings of one stack: techniques of different families, shuffled, options too."""
    known = optimizations()
    families = draw(st.lists(st.sampled_from(sorted({t.family for t in known.values()})), unique=True, min_size=1))
    parts = []
    for family in families:
        name = draw(st.sampled_from(sorted(n for n, t in known.items() if t.family == family)))
        options = [f"{key}={draw(st.sampled_from(choices))}" for key, choices in known[name].choices.items()]
        parts.append(name + (":" + ",".join(options) if options else ""))
    return "+".join(parts), " + ".join(draw(st.permutations(parts)))


@given(stacks())
def test_any_spelling_is_one_stack(spellings: tuple[str, str]) -> None:
    one, other = map(parse_stack, spellings)
    assert one == other
    assert replace(LLAMA, stack=one).cell_id == replace(LLAMA, stack=other).cell_id
    assert parse_stack(str(one)) == one
    places = [FAMILIES.index(optimizations()[name].family) for name in one.names()]
    assert places == sorted(places)


scalars = st.one_of(
    st.integers(-(2**53), 2**53), st.booleans(), st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False)
)


@given(parameters=st.dictionaries(st.text(min_size=1, max_size=8), scalars, max_size=5), stack=stacks(), text=st.text())
def test_round_trip_through_json(parameters: dict[str, Any], stack: tuple[str, str], text: str) -> None:
    cell = Cell(
        model=ModelSpec(id=text, source="hub", reference="org/name", revision=None, kind="language"),
        workload=WorkloadPoint(kind="prefill", parameters=tuple(sorted(parameters.items()))),
        stack=parse_stack(stack[0]),
        hardware="cpu",
        baseline=parse_stack(stack[1]),
    )
    again = Cell.from_dict(json.loads(json.dumps(cell.to_dict())))
    assert again == cell
    assert again.cell_id == cell.cell_id


@given(st.dictionaries(st.text(), scalars))
def test_digest_does_not_depend_on_order(value: dict[str, Any]) -> None:
    assert digest(value) == digest(dict(reversed(list(value.items()))))
    assert json.loads(canonical_json(value)) == value


def test_nan_has_no_identity() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"a": float("nan")})


def test_text_of_a_technique_and_a_point() -> None:
    assert str(Technique(name="a", options=(("flag", True), ("mode", "x")))) == "a:flag=true,mode=x"
    assert str(KERNEL.workload) == "attention[batch_size=4,causal=false,heads=12]"
    assert str(Stack()) == "baseline"


def test_job_round_trip(bench: Any) -> None:
    job = bench.job(
        bench.cell("decode", "fp32+static-cache"), device=bench.device("cuda"), ceilings={"a": 1.5},
        search_path=("/a", "/b"), memory_budget_bytes=5, temperature_c=40.0,
    )  # fmt: skip
    assert CellJob.from_dict(json.loads(json.dumps(job.to_dict()))) == job


@pytest.mark.usefixtures("torch_settings")
def test_judge_that_fails_takes_nothing_from_what_was_measured(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a large model the judge may run out of memory: the cell fitted, and was measured."""

    def fail(_session: Any) -> Any:
        raise MemoryError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("tasks.quality.judge", fail)
    monkeypatch.setattr("tasks.conditions._limit_host_memory", lambda _budget: None)
    payload = bench.job(bench.cell("prefill", "fp32"), profile=bench.INSTANT, quality=True).to_dict()
    row = run_cell(payload, tmp_path / "phase", "fork")["row"]
    assert row["outcome"] == "ok"
    assert "quality_failed" in row["flags"]
    assert row["latency_ms_p50"] > 0
    assert "can't allocate memory" in json.loads(row["null_reasons"])["perplexity"]
    assert json.loads(row["environment"])["torch"]


@pytest.mark.usefixtures("torch_settings")
def test_settings_are_read_while_the_stack_is_applied(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A choice of attention kernels ends with the session: it is to be read back before."""
    monkeypatch.setattr("tasks.conditions._limit_host_memory", lambda _budget: None)
    payload = bench.job(bench.cell("prefill", "fp32+sdpa-math"), profile=bench.INSTANT).to_dict()
    settings = json.loads(run_cell(payload, tmp_path / "phase", "fork")["row"]["environment"])["torch"]
    enabled = {name for name, value in settings.items() if name.startswith("sdpa_") and value}
    assert enabled == {"sdpa_math"}

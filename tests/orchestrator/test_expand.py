"""Expansion: each cell once, each with its baseline, and identities that do not depend on how a sweep is written."""

import itertools
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.expand import PlannedCell, expand
from orchestrator.sweep import SweepError, make_sweep, parse_only
from tasks.cell import NO_MODEL

STACKS = ["baseline", "fp32", "bf16", "bf16+sdpa-flash", "fp16+eager+compile", "nf4", "static-cache"]
MODELS = ["pocket", "random:gpt2", "random:llama-3.2-1b"]


def cells(only: str | None = None, **fields: Any) -> list[PlannedCell]:
    document = {
        "models": ["pocket"],
        "workloads": [{"kind": "decode"}],
        "optimizations": ["baseline", "bf16"],
        **fields,
    }
    return expand(make_sweep(document), "h200", None if only is None else parse_only(only))


def texts(planned: list[PlannedCell]) -> list[str]:
    return [f"{item.cell.model.id} {item.cell.workload.kind} {item.cell.stack}" for item in planned]


@pytest.mark.parametrize(
    ("baseline", "rungs"),
    [
        ("bf16", {"bf16": 1, "fp32": 0, "nf4": 2}),
        ("fp32", {"fp32": 0, "bf16": 1, "nf4": 2}),
        ("baseline", {"baseline": 0, "fp32": 1, "bf16": 2, "nf4": 3}),
    ],
)
def test_the_baseline_comes_first_and_keeps_its_rung(baseline: str, rungs: dict[str, int]) -> None:
    planned = cells(optimizations=["fp32", "bf16", "nf4"], baseline=baseline)
    assert str(planned[0].cell.stack) == baseline
    assert {str(item.cell.stack): item.rung for item in planned} == rungs


def sublists(values: list[Any], least: int = 1) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=least, max_size=len(values), unique=True)


@st.composite
def sweeps(draw: st.DrawFn) -> dict[str, Any]:
    sizes = draw(sublists([1, 2, 4, 8]))
    lengths = draw(st.lists(st.integers(1, 512), min_size=len(sizes), max_size=len(sizes)))
    zipped = {"kind": "prefill", "zip": {"batch_size": sizes, "sequence_length": lengths}}
    product = {"kind": "decode", "batch_size": draw(sublists([1, 2])), "new_tokens": draw(sublists([8, 16, 32]))}
    kernel = {
        "kind": "attention",
        "sequence_length": draw(sublists([64, 128])),
        "causal": draw(sublists([True, False])),
    }
    return {
        "models": draw(sublists(MODELS)),
        "workloads": [[zipped, product, kernel][index] for index in draw(sublists([0, 1, 2]))],
        "optimizations": draw(sublists(STACKS)),
        "hardware": draw(sublists(["local", "h200", "cpu", "a100"])),
        "baseline": draw(st.sampled_from(STACKS)),
    }


def count_points(workload: dict[str, Any]) -> int:
    zipped = len(workload["zip"]["batch_size"]) if "zip" in workload else 1
    lists = [value for key, value in workload.items() if key not in ("kind", "zip")]
    result = zipped
    for values in lists:
        result *= len(values)
    return result


@settings(max_examples=60, deadline=None)
@given(sweeps())
def test_counts_baselines_and_identity(document: dict[str, Any]) -> None:
    planned = expand(make_sweep(document), "h200")
    stacks = len({*document["optimizations"], document["baseline"]})
    tags = len({"h200" if word == "local" else word for word in document["hardware"]})
    points = sum(
        count_points(workload) * (1 if workload["kind"] == "attention" else len(document["models"]))
        for workload in document["workloads"]
    )
    ids = [item.cell.cell_id for item in planned]
    assert len(ids) == len(set(ids)) == stacks * tags * points
    assert {item.cell.baseline_id for item in planned} <= set(ids)
    for _, group in itertools.groupby(planned, lambda item: item.cell.group_id):
        members = list(group)
        assert len(members) == stacks, "the cells of a group lie together"
        assert members[0].cell.cell_id == members[0].cell.baseline_id, "the baseline comes first"


@settings(max_examples=40, deadline=None)
@given(sweeps(), st.randoms(use_true_random=False))
def test_ids_do_not_depend_on_the_order_in_which_a_sweep_is_written(document: dict[str, Any], random: Any) -> None:
    shuffled = {
        key: random.sample(value, len(value)) if isinstance(value, list) else value for key, value in document.items()
    }
    shuffled["optimizations"] = ["+".join(reversed(stack.split("+"))) for stack in shuffled["optimizations"]]
    shuffled["workloads"] = [dict(random.sample(list(entry.items()), len(entry))) for entry in shuffled["workloads"]]
    first, second = (expand(make_sweep(item), "h200") for item in (document, shuffled))
    assert {item.cell.cell_id: item.cell for item in first} == {item.cell.cell_id: item.cell for item in second}


@settings(max_examples=60, deadline=None)
@given(sweeps(), st.sampled_from(STACKS), st.sampled_from(MODELS))
def test_exclude_and_include(document: dict[str, Any], stack: str, model: str) -> None:
    everything = {item.cell.cell_id: item.cell for item in expand(make_sweep(document), "h200")}
    selection = {"model": model, "optimization": stack}
    matching = {key for key, cell in everything.items() if cell.model.id == model and str(cell.stack) == stack}
    if stack == document["baseline"]:
        return
    try:
        left = {item.cell.cell_id for item in expand(make_sweep({**document, "exclude": [selection]}), "h200")}
    except SweepError as error:
        if "matches no cell" in str(error):
            assert not matching
        else:
            assert "empty" in str(error)
        return
    assert matching
    # a baseline that the sweep does not list stays only where something is left to compare
    gone = {everything[key].group_id for key in matching} if document["optimizations"] == [stack] else set()
    assert left == {key for key, cell in everything.items() if key not in matching and cell.group_id not in gone}
    restored = make_sweep({**document, "exclude": [selection], "include": [selection]})
    assert {item.cell.cell_id for item in expand(restored, "h200")} == set(everything)


def test_order_is_by_group_with_the_baseline_first() -> None:
    planned = cells(
        models=["pocket", "random:gpt2"],
        workloads=[{"kind": "prefill"}, {"kind": "decode"}],
        optimizations=["nf4", "bf16"],
        baseline="bf16",
    )
    assert texts(planned) == [
        f"{model} {kind} {stack}"
        for model in ("pocket", "random:gpt2")
        for kind in ("prefill", "decode")
        for stack in ("bf16", "nf4")
    ]


def test_baseline_is_added_where_the_list_lacks_it() -> None:
    assert texts(cells(optimizations=["bf16"])) == ["pocket decode baseline", "pocket decode bf16"]


def test_local_becomes_the_tag_and_merges_with_it() -> None:
    planned = cells(hardware=["local", "h200", "cpu"])
    assert [(item.cell.hardware, item.hardware_requested) for item in planned] == [
        ("h200", "local"),
        ("h200", "local"),
        ("cpu", "cpu"),
        ("cpu", "cpu"),
    ]


def test_kernels_are_not_multiplied_by_models() -> None:
    planned = cells(models=["pocket", "random:gpt2"], workloads=[{"kind": "attention"}])
    assert [item.cell.model for item in planned] == [NO_MODEL, NO_MODEL]
    assert len(cells(models=[], workloads=[{"kind": "attention"}])) == 2


def test_defaults_and_spelt_out_values_are_one_point() -> None:
    spelt = [{"kind": "decode", "new_tokens": [128], "prompt_tokens": 512, "batch_size": 1}]
    assert [item.cell.cell_id for item in cells()] == [item.cell.cell_id for item in cells(workloads=spelt)]


def test_product_of_stacks() -> None:
    planned = cells(optimizations=[{"product": [["baseline", "bf16"], ["baseline", "sdpa-flash", "eager"]]}, "nf4"])
    assert [str(item.cell.stack) for item in planned] == [
        "baseline", "sdpa-flash", "eager", "bf16", "bf16+sdpa-flash", "bf16+eager", "nf4",
    ]  # fmt: skip


def test_include_brings_its_baseline_and_a_model_of_its_own() -> None:
    planned = cells(include=[{"model": "random:gpt2", "optimization": "nf4"}])
    assert texts(planned)[2:] == ["random:gpt2 decode baseline", "random:gpt2 decode nf4"]
    planned = cells(include=[{"workload": {"kind": "prefill", "batch_size": [1, 2]}, "optimization": "nf4"}])
    assert texts(planned)[2:] == ["pocket prefill baseline", "pocket prefill nf4"] * 2


def test_exclude_on_the_tag_behind_local() -> None:
    exclude = [{"hardware": "h200", "optimization": "bf16"}]
    assert texts(cells(exclude=exclude, optimizations=["baseline", "bf16", "nf4"])) == [
        "pocket decode baseline",
        "pocket decode nf4",
    ]


def test_exclude_by_axes_and_pattern() -> None:
    planned = cells(
        workloads=[{"kind": "decode", "batch_size": [1, 8], "new_tokens": [8, 16]}],
        exclude=[{"workload": {"batch_size": 8, "new_tokens": [16]}, "optimization": "bf*"}],
    )
    pairs = [(item.cell.workload["batch_size"], item.cell.workload["new_tokens"]) for item in planned]
    assert pairs == [(1, 8), (1, 8), (1, 16), (1, 16), (8, 8), (8, 8), (8, 16)]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("optimization=bf16*", ["baseline", "bf16", "bf16+sdpa-flash"]),
        ("optimization=sdpa-flash+bf16", ["baseline", "bf16+sdpa-flash"]),
        ("optimization=bf16|nf4", ["baseline", "bf16", "nf4"]),
        ("optimization!=bf16*", ["baseline", "nf4"]),
        ("model=pock*,workload=decode,batch_size=1,optimization=nf4", ["baseline", "nf4"]),
        ("hardware=h200,sequence_length!=4,optimization=baseline", ["baseline"]),
    ],
)
def test_only_keeps_the_baseline(only: str, expected: list[str]) -> None:
    planned = cells(only, optimizations=["baseline", "bf16", "bf16+sdpa-flash", "nf4"])
    assert [str(item.cell.stack) for item in planned] == expected


def test_only_knows_this_machine_by_its_word() -> None:
    both = {"hardware": ["local", "cpu"], "optimizations": ["baseline"]}
    for only, expected in (("hardware=local", {"h200"}), ("hardware!=local", {"cpu"}), ("hardware=local|cpu", None)):
        found = {planned.cell.hardware for planned in cells(only, **both)}
        assert found == (expected or {"h200", "cpu"})


def test_only_by_parameters() -> None:
    workloads = [{"kind": "attention", "causal": [True, False]}, {"kind": "decode", "batch_size": [1, 8]}]
    assert len(cells(workloads=workloads)) == 8
    assert {item.cell.workload["causal"] for item in cells("causal=true", workloads=workloads)} == {True}
    assert texts(cells("batch_size=8", workloads=workloads)) == ["pocket decode baseline", "pocket decode bf16"]


def test_only_that_matches_nothing() -> None:
    workloads = [{"kind": "attention", "causal": [True, False]}, {"kind": "decode"}]
    with pytest.raises(SweepError, match="--only workload=decode,causal=true: matches none of the 6 cells"):
        cells("workload=decode,causal=true", workloads=workloads)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("model=poket", "no cell of the sweep has model 'poket'; did you mean 'pocket'"),
        ("model=pocket|other optimization=bf16", "has model 'other optimization=bf16'; known: pocket"),
        ("optimization=bf16|nf4", "has optimization 'nf4'; known: baseline, bf16"),
        ("optimization=bf16|fp*", r"has optimization 'fp\*'"),
        ("batch_size=99,model!=other", "has batch_size '99'; known: "),
        ("causal=true", "has causal 'true'$"),
    ],
)
def test_only_that_names_what_no_cell_has(only: str, message: str) -> None:
    with pytest.raises(SweepError, match=message) as caught:
        cells(only)
    assert str(caught.value).startswith(f"--only {only}: ")


def test_rounds() -> None:
    assert {item.rounds for item in cells(profile="standard")} == {5}
    assert {item.rounds for item in cells(profile="standard", rounds=2)} == {2}


def test_a_hundred_thousand_cells() -> None:
    start = time.process_time()
    numbers = list(range(1, 101))
    attention = ["baseline", "eager", "sdpa-math", "sdpa-flash", "sdpa-efficient"]
    planned = cells(
        workloads=[{"kind": "decode", "batch_size": numbers, "prompt_tokens": numbers}],
        optimizations=[{"product": [["baseline", "bf16"], attention]}],
        exclude=[{"workload": {"batch_size": 3}, "optimization": "bf16*"}],
    )
    assert len(planned) == 99_500
    assert time.process_time() - start < 20  # catches quadratic growth

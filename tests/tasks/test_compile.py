"""The compile technique's options reach the compiler and are proven from its records; breaks are counted."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.compilation import compilation, generated_code
from tasks.metrics.compilation import CompilationCounts
from tasks.optimization import Evidence
from tasks.optimizations.compile import arguments
from tasks.registry import optimizations
from tasks.session import Settings
from tasks.stacks import parse_stack, unsupported
from tasks.timing import Timings

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

BREAKING = """
import torch
class Net(torch.nn.Linear):
    scale = 1.0
    def forward(self, x):
        y = super().forward(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return y * self.scale
def make():
    net = Net(4, 4)
    net.breaks = {breaks}
    return net, lambda batch, device, seed: torch.ones(batch, 4, device=device)
"""


def technique(text: str) -> Any:
    (found,) = parse_stack(text).techniques
    return found


def proof(text: str, session: Any) -> Evidence:
    return optimizations()["compile"].evidence(technique(text), session)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("compile", {"mode": None, "fullgraph": False, "dynamic": None}),
        ("compile:mode=reduce-overhead", {"mode": "reduce-overhead", "fullgraph": False, "dynamic": None}),
        ("compile:fullgraph=true,dynamic=true", {"mode": None, "fullgraph": True, "dynamic": True}),
        ("compile:dynamic=false", {"mode": None, "fullgraph": False, "dynamic": False}),
        (
            "compile:mode=reduce-overhead,coordinate_descent=true",
            {
                "fullgraph": False,
                "dynamic": None,
                "options": {"triton.cudagraphs": True, "coordinate_descent_tuning": True},
            },
        ),
        (
            "compile:coordinate_descent=true",
            {"fullgraph": False, "dynamic": None, "options": {"coordinate_descent_tuning": True}},
        ),
        (
            "compile:coordinate_descent=true,realize_opcount_threshold=10",
            {
                "fullgraph": False,
                "dynamic": None,
                "options": {"coordinate_descent_tuning": True, "realize_opcount_threshold": 10},
            },
        ),
        (
            "compile:mode=max-autotune-no-cudagraphs,realize_opcount_threshold=10",
            {
                "fullgraph": False,
                "dynamic": None,
                "options": {"max_autotune": True, "coordinate_descent_tuning": True, "realize_opcount_threshold": 10},
            },
        ),
    ],
)
def test_arguments_of_torch_compile(text: str, expected: dict[str, Any]) -> None:
    assert arguments(technique(text)) == expected


@pytest.mark.parametrize(("text", "replays"), [("compile", False), ("compile:mode=reduce-overhead", True)])
@pytest.mark.parametrize("on_cuda", [False, True])
def test_who_replays_graphs(text: str, replays: bool, on_cuda: bool) -> None:
    session: Any = SimpleNamespace(settings=Settings(), on_cuda=on_cuda)
    optimizations()["compile"].apply(technique(text), session)
    assert session.settings.replays == (replays and on_cuda)


def test_coordinate_descent_is_refused_on_a_cpu(bench: Any) -> None:
    cell = bench.cell("attention", "compile:coordinate_descent=true")
    assert "tunes Triton kernels" in str(unsupported(cell, bench.device()))
    assert unsupported(cell, bench.device("cuda")) is None
    assert unsupported(bench.cell("attention", "compile"), bench.device()) is None


ONE_ROW = {"kind": "decode", "batch_size": 1}


@pytest.mark.parametrize(
    ("options", "workload", "device", "reason"),
    [
        ("coordinate_descent=true,realize_opcount_threshold=10", ONE_ROW, "cuda", None),
        ("mode=max-autotune-no-cudagraphs,realize_opcount_threshold=10", ONE_ROW, "cuda", None),
        ("mode=max-autotune-no-cudagraphs,realize_opcount_threshold=10", ONE_ROW, "cpu", "a cpu has none"),
        ("realize_opcount_threshold=10", ONE_ROW, "cuda", "coordinate_descent=true"),
        ("coordinate_descent=true,realize_opcount_threshold=-1", ONE_ROW, "cuda", "from 2 to 29"),
        ("coordinate_descent=true,realize_opcount_threshold=30", ONE_ROW, "cuda", "got 30"),
        (
            "coordinate_descent=true,realize_opcount_threshold=10",
            {"kind": "decode", "batch_size": 2},
            "cuda",
            "batch_size 1",
        ),
        (
            "coordinate_descent=true,realize_opcount_threshold=10",
            {"kind": "prefill", "batch_size": 1},
            "cuda",
            "one row",
        ),
    ],
)
def test_thresholds_that_have_no_effect_are_refused(
    bench: Any, options: str, workload: dict[str, Any], device: str, reason: str | None
) -> None:
    axes = {name: value for name, value in workload.items() if name != "kind"}
    cell = bench.cell(workload["kind"], f"compile:{options}", **axes)
    found = unsupported(cell, bench.device(device))
    assert found is None if reason is None else reason in str(found)


def test_torch_knows_the_threshold() -> None:
    """`torch.compile` refuses options that it does not know, before anything is compiled."""
    import torch

    options = arguments(technique("compile:coordinate_descent=true,realize_opcount_threshold=10"))
    torch.compile(torch.nn.Identity(), **options)


def test_a_threshold_is_proven_by_the_kernels(bench: Any) -> None:
    asked = "compile:coordinate_descent=true,realize_opcount_threshold=10"
    with bench.live(net(bench, "compile", breaks=False), calls=1) as session:
        evidence = proof(asked, session)
    assert not evidence.ok
    assert evidence.facts["products"] == 0, "a CPU has no Triton kernels"


@pytest.fixture
def records() -> Any:
    """Dynamo's records, empty, with its default limit, and so again afterwards."""
    from torch._dynamo import utils

    utils.set_compilation_metrics_limit(utils.DEFAULT_COMPILATION_METRICS_LIMIT)
    utils.clear_compilation_metrics()
    yield utils
    utils.clear_compilation_metrics()


def test_time_spent_when_generated_code_first_runs_counts_and_is_no_graph(records: Any) -> None:
    """Kernels are tuned and CUDA graphs recorded at run time: seconds of compilation, in records of their own."""
    kept = records.CompilationMetrics
    records._compilation_metrics.append(kept(duration_us=2_000_000, triton_compile_time_us=1_000_000))
    records._compilation_metrics.append(
        kept(duration_us=3_000_000, runtime_triton_autotune_time_us=3_000_000, is_runtime=True)
    )
    seen = compilation()
    assert seen.seconds == pytest.approx(5.0), "the outermost timers only"
    assert seen.graphs == 1


def test_more_graphs_than_dynamo_remembers_by_default(records: Any) -> None:
    """Whoever compiles: from the first look on nothing is forgotten."""
    assert compilation().graphs == 0
    for number in range(100):
        records._compilation_metrics.append(records.CompilationMetrics(duration_us=10_000))
        assert compilation().graphs == number + 1
    assert compilation().seconds == pytest.approx(1.0)


def test_a_session_that_compiles_keeps_every_record(bench: Any, records: Any) -> None:
    from tasks.compilation import RECORDS

    with bench.live(net(bench, "compile", breaks=False), calls=0):
        assert records._compilation_metrics.maxlen == RECORDS


def test_looking_does_not_import_dynamo() -> None:
    """It takes seconds, which processes that never compile should not spend."""
    code = "import sys; from tasks.compilation import compilation; compilation(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def net(bench: Any, stack: str, breaks: bool) -> Any:
    model, path = bench.factory(BREAKING.format(breaks=breaks))
    return bench.job(bench.cell("forward", stack, model), search_path=path)


def test_breaks_and_recompilations_are_counted(bench: Any) -> None:
    with bench.live(net(bench, "compile", breaks=True), calls=1) as session:
        # the step's frame breaks in the module's, which is then traced by itself and breaks again
        breaks = compilation().graph_breaks
        assert breaks == 2
        assert compilation().recompile_reasons == ()
        session.model.scale = 2.0
        session.step.run(0, lambda _: None)
        again = len(compilation().recompile_reasons)
        assert again >= 1
        session.timings = Timings(before=compilation(), warmup_calls=1)
        assert CompilationCounts().collect(session) == {"graph_breaks": breaks, "recompilations": again}
        assert proof("compile", session).ok
        assert not proof("compile:fullgraph=true", session).ok, "there was a break"


def test_fullgraph_refuses_a_break(bench: Any) -> None:
    import torch

    job = net(bench, "compile:fullgraph=true", breaks=True)
    with pytest.raises(torch._dynamo.exc.Unsupported), bench.live(job, calls=1):
        pass
    with bench.live(net(bench, "compile:fullgraph=true", breaks=False), calls=1) as session:
        assert proof("compile:fullgraph=true", session).ok


def test_dynamic_is_proven_by_the_compilers_record(bench: Any) -> None:
    with bench.live(net(bench, "compile:dynamic=true", breaks=False), calls=1) as session:
        evidence = proof("compile:dynamic=true", session)
        assert evidence.ok, evidence.facts
        assert evidence.facts["graphs_of_any_shape"] == 1
        assert generated_code()
    with bench.live(net(bench, "compile:dynamic=true", breaks=False), applied="compile", calls=1) as session:
        assert not proof("compile:dynamic=true", session).ok


def test_coordinate_descent_is_proven_by_the_kernels(bench: Any) -> None:
    """Generated kernels carry the setting: a stack that did not ask for it has none that do."""
    asked = "compile:coordinate_descent=true"
    with bench.live(net(bench, "compile", breaks=False), calls=1) as session:
        evidence = proof(asked, session)
    assert not evidence.ok
    assert evidence.facts["kernels_tuned"] == 0


def test_steps_that_fall_back_to_eager_are_no_evidence(bench: Any) -> None:
    """A growing cache has another shape at every step: without symbolic shapes the compiler soon gives up."""
    import torch

    stack = "fp32+compile:dynamic=false"
    job = bench.job(bench.cell("decode", stack, prompt_tokens=4, new_tokens=4))
    with torch._dynamo.config.patch(recompile_limit=1), bench.live(job, calls=1) as session:
        evidence = proof("compile:dynamic=false", session)
    assert not evidence.ok
    assert evidence.facts["graphs"] > 0
    assert (evidence.facts["segments"], evidence.facts["segments_compiled"]) == (3, 1)


def test_graphs_that_a_library_compiles_are_not_the_steps(bench: Any) -> None:
    """As flex attention does, whether the stack compiles the step or not."""
    (bench.folder / "flex_attention.py").write_text(
        "import torch\ndef double(x):\n    return x * 2\nattend = torch.compile(double)\n"
    )
    model, path = bench.factory(
        "import torch, flex_attention\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return flex_attention.attend(super().forward(x))\n"
        "def make():\n"
        "    return Net(4, 4), lambda batch, device, seed: torch.ones(batch, 4, device=device)\n"
    )
    job = bench.job(bench.cell("forward", "compile", model), search_path=path)
    with bench.live(job, applied="baseline", calls=1) as session:
        evidence = proof("compile", session)
    assert not evidence.ok
    assert evidence.facts["graphs"] == 1
    assert (evidence.facts["segments"], evidence.facts["segments_compiled"]) == (1, 0)
    with bench.live(job, calls=1) as session:
        assert proof("compile", session).ok

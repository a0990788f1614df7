"""torch.compile of the step: fused kernels, and CUDA graphs in the modes that use them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tasks.compilation import compilation, generated_code
from tasks.optimization import Evidence, Optimization
from tasks.optimizations._triton import repeated_operations
from tasks.registry import optimizations
from tasks.stacks import option
from tasks.trace import traced

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session
    from tasks.trace import Event

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
COMPILED_BY_LIBRARIES = "/flex_attention.py"  # file whose frames libraries compile, whatever the stack says
REGION = "Torch-Compiled Region:"
SEGMENTS = 32  # of a call that are looked at: four times the shapes for which the compiler tries a frame, by default
SEGMENT = "benchmatrix segment "
THRESHOLD = "realize_opcount_threshold"
TUNED = ("max-autotune", "max-autotune-no-cudagraphs")  # modes with coordinate descent
LEAST, INDUCTORS = 2, 30  # loading and casting; what Inductor takes by itself
DYNAMIC = {"auto": None, "true": True, "false": False}


class Compile(Optimization):
    """`dynamic` auto is torch's default: static at first, symbolic where a shape has changed.

    `coordinate_descent` tunes the block sizes of generated kernels one step at a time, in any mode (the max-autotune
    ones include it). With it products with a single row become generated kernels too, which come nearer to the memory
    bandwidth than a library's: what decoding one sequence is made of.

    `realize_opcount_threshold` is Inductor's setting of that name (0: its own, 30). A value that takes more operations
    is stored before it is read again and again; what takes fewer is worked out anew at each use. The kernel of a
    product with one row reads its vector once for every block of the matrix's rows, and repeats what was inlined there:
    norms, activations. The setting holds for the whole step, attention included.
    """

    name = "compile"
    family = "compile"
    summary = "torch.compile of the measured step"
    options = {
        "mode": "default",
        "fullgraph": False,
        "dynamic": "auto",
        "coordinate_descent": False,
        "realize_opcount_threshold": 0,
    }
    choices = {
        "mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        "dynamic": tuple(DYNAMIC),
    }

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        chosen = next((item for item in cell.stack.techniques if item.name == self.name), None)
        if chosen is not None and option(chosen, "coordinate_descent") and device.kind == "cpu":
            return f"coordinate_descent of {self.name} tunes Triton kernels, a cpu has none"
        if chosen is not None and (reason := _threshold_refused(cell, chosen, device)):
            return reason
        refusal = super().unsupported(cell, device)
        if refusal is None and chosen is not None and device.kind == "cuda" and option(chosen, "mode") in CUDA_GRAPHS:
            return _overwritten(cell, chosen)
        return refusal

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.compile = arguments(technique)
        session.settings.replays = session.on_cuda and option(technique, "mode") in CUDA_GRAPHS

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Every timed segment of a call runs compiled code of the step, and the options had their effects.

        Graphs that exist are not enough: where shapes change and `dynamic` forbids symbolic ones, the compiler gives up
        after a few and the rest runs eagerly. A threshold holds where no product repeats more than it allows: a high
        one also where torch by itself would not have inlined more.
        """
        seen, mode = compilation(), str(option(technique, "mode"))
        compiled = graphs_of_segments(session)
        facts: dict[str, Any] = {
            "graphs": seen.graphs, "graph_breaks": seen.graph_breaks, "mode": mode,
            "segments": len(compiled), "segments_compiled": sum(count > 0 for count in compiled),
        }  # fmt: skip
        ok = seen.graphs > 0 and len(compiled) > 0 and all(compiled)
        if option(technique, "fullgraph"):
            ok = ok and seen.graph_breaks == 0
        if option(technique, "dynamic") == "true":
            facts["graphs_of_any_shape"] = seen.dynamic_graphs
            ok = ok and seen.dynamic_graphs > 0
        if session.on_cuda and mode in CUDA_GRAPHS:
            facts["cuda_graph_launches"] = graph_launches(session)
            ok = ok and facts["cuda_graph_launches"] > 0
        if option(technique, "coordinate_descent"):
            # every generated kernel carries the settings of its tuning
            facts["kernels_tuned"] = sum(
                "coordinate_descent_tuning': True" in text for text in generated_code().values()
            )
            ok = ok and facts["kernels_tuned"] > 0
        if most := threshold(technique):
            repeated = repeated_operations(generated_code().values())
            facts["products"], facts["operations_repeated"] = len(repeated), max(repeated, default=0)
            ok = ok and len(repeated) > 0 and facts["operations_repeated"] <= most
        return Evidence(ok=ok, facts=facts)


def threshold(technique: Technique) -> int:
    return int(str(option(technique, THRESHOLD)))


def _threshold_refused(cell: Cell, chosen: Technique, device: DeviceInfo) -> str | None:
    """Why a threshold has no effect, or none that could be shown."""
    asked = threshold(chosen)
    if asked == 0:
        return None
    if not LEAST <= asked < INDUCTORS:
        return f"{THRESHOLD} must be 0 or from {LEAST} to {INDUCTORS - 1}, fewer than the compiler takes, got {asked}"
    if device.kind == "cpu":
        return f"{THRESHOLD} is about products in Triton kernels, a cpu has none"
    if not (option(chosen, "coordinate_descent") or option(chosen, "mode") in TUNED):
        return f"{THRESHOLD} is about products that are generated, which coordinate_descent=true makes them"
    if cell.workload.kind != "decode" or cell.workload.get("batch_size") != 1:
        return f"{THRESHOLD} is about products with one row: decode with batch_size 1"
    return None


def _overwritten(cell: Cell, chosen: Technique) -> str | None:
    """Why the CUDA graphs of a compiled step cannot be right: keys and values of a growing cache are their outputs."""
    known = optimizations()
    caches = [known[item.name] for item in cell.stack.techniques if known[item.name].family == "kv-cache"]
    if cell.workload.kind != "decode" or any(not getattr(cache, "keeps_outputs", True) for cache in caches):
        return None
    return (
        f"{chosen} replays CUDA graphs, which overwrite the keys and values that a growing cache keeps of the steps "
        "before: the stack needs static-cache"
    )


def arguments(technique: Technique) -> dict[str, Any]:
    """Keyword arguments of `torch.compile`, which takes a mode or single options, not both."""
    mode = str(option(technique, "mode"))
    found: dict[str, Any] = {
        "fullgraph": bool(option(technique, "fullgraph")),
        "dynamic": DYNAMIC[str(option(technique, "dynamic"))],
    }
    options: dict[str, Any] = {}
    if option(technique, "coordinate_descent"):
        options["coordinate_descent_tuning"] = True
    if asked := threshold(technique):
        options[THRESHOLD] = asked
    if not options:
        return {**found, "mode": None if mode == "default" else mode}
    from torch._inductor import list_mode_options

    return {**found, "options": {**list_mode_options(mode), **options}}


def graphs_of_segments(session: Session) -> list[int]:
    """Compiled graphs of the step that ran in each primary segment of one call, launched from the host.

    Those that an attention kernel compiled for itself are not the step's; inside a compiled step there are none.
    """
    import torch
    from torch.profiler import record_function

    step: Any = session.step
    primary = f"{SEGMENT}{step.primary}"

    def mark(label: str) -> None:
        with record_function(f"{SEGMENT}{label}"):
            pass

    def call() -> None:
        step.run_short(mark, SEGMENTS)
        session.synchronize()

    # nothing of a captured graph's inside is seen from the host
    with getattr(step, "uncaptured", nullcontext)():
        events = traced(call, device=False)
    theirs, graphs = _compiled_by_libraries(torch), 0
    found: list[int] = []
    for event in events:
        if event.name.startswith(SEGMENT):
            if event.name == primary:
                found.append(graphs)
            graphs = 0
        elif "CompiledFxGraph" in event.name and _region(event) not in theirs:
            graphs += 1
    return found


def _region(event: Event | None) -> str | None:
    """Identifier of the compilation that the code around an event comes from: `frame/compilation`."""
    while event is not None and not event.name.startswith(REGION):
        event = event.parent
    return event.name.removeprefix(REGION).strip() if event is not None else None


def _compiled_by_libraries(torch: Any) -> set[str]:
    """Identifiers of what was compiled from torch's or transformers' own calls of `torch.compile`: flex attention."""
    return {
        str(record.compile_id)
        for record in torch._dynamo.utils.get_compilation_metrics()
        if str(record.co_filename).endswith(COMPILED_BY_LIBRARIES)
    }


def graph_launches(session: Session) -> int:
    """CUDA graphs that one call of the step launches, its own and those of `torch.compile`.

    Counted where Python replays them: the first start of the device's profiler takes a second.
    """
    import torch

    graphs: Any = torch.cuda.CUDAGraph
    replay, launches = graphs.replay, 0

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        nonlocal launches
        launches += 1
        replay(graph)

    assert session.step is not None
    graphs.replay = counted
    try:
        session.step.run_short()
        session.synchronize()
    finally:
        graphs.replay = replay
    return launches

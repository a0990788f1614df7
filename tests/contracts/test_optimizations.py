"""What every technique promises: sane metadata, refusals with a reason, effect, and evidence that cannot lie."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tasks.cell import Cell, ModelSpec
from tasks.optimization import FAMILIES, Evidence, Optimization, Unsupported
from tasks.registry import optimizations, workloads
from tasks.stacks import parse_stack, unsupported

# Inductor imports torch's own TorchScript helpers, which warn since Python 3.11 has a newer way.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

TECHNIQUES = sorted(optimizations())
MODEL_KINDS = ("language", "vision", "module")

# Relative distance of the outputs from the fp32 reference (fp32, attention written out), by family. Rounding of bf16
# is 0.4 % per number and of a 4-bit weight about 10 %; everything else computes the same thing in another order.
TOLERANCE = {
    "precision": 0.03, "compression": 0.10, "attention": 1e-5, "kv-cache": 1e-5, "decode-loop": 1e-5, "control": 1e-5,
    # other models, which are near only as they are trained on the same text
    "pruning": 0.40, "distillation": 0.80,
}  # fmt: skip
SAME_ARITHMETIC = 1e-4
# Compression that rounds more: two-bit exponents, or a range of 128 weights in 16 steps.
COARSE = {"fp4": 0.20, "ao-int4": 0.20}
# Techniques that change nothing, on purpose: there is nothing to pretend.
CONTROLS = {name for name, technique in optimizations().items() if technique.family == "control"}
# Techniques that the model has as published and the library by default, on a CPU: no evidence can tell them from none.
DEFAULTS = {"fp32", "dynamic-cache", "sdpa-flash"}
# Families that need trained weights to be near anything.
ON_POCKET = {"compression", "pruning", "distillation"}
# What a technique cannot do without, and options that make what has to be made quickly.
COMPANIONS = {
    "cuda-graph": "static-cache+cuda-graph", "distill": "distill:layers=0.2,steps=12",
    "gptq": "gptq:samples=8", "awq": "awq:samples=4",
}  # fmt: skip
# What only a CUDA device can prove; tests/gpu does.
PROVEN_ON_CUDA = {"tf32"}
# Compilation of a model with it takes minutes on a CPU; the attention kernel alone takes seconds.
COMPILES_LONG = {"flex"}


def usual_workload(technique: Optimization) -> str:
    return technique.needs.workloads[0] if technique.needs.workloads else "prefill"


def cell_for(bench: Any, name: str, workload: str | None = None, precision: str = "") -> Cell:
    """A cell with the technique, on pocket where trained weights are needed."""
    technique = optimizations()[name]
    kind = workload or usual_workload(technique)
    model = bench.POCKET if technique.family in ON_POCKET and kind != "forward" else None
    stack = COMPANIONS.get(name, name)
    return bench.cell(kind, f"{precision}+{stack}" if precision else stack, model)


def keeps_tokens(technique: Optimization) -> bool:
    return technique.family in ("kv-cache", "attention", "decode-loop") and not technique.lossy_cache


def runs_here(bench: Any, cell: Cell) -> bool:
    return unsupported(cell, bench.device()) is None


def proof(name: str, session: Any) -> Evidence:
    stack = parse_stack(COMPANIONS.get(name, name))
    chosen = next(technique for technique in stack.techniques if technique.name == name.partition(":")[0])
    return optimizations()[chosen.name].evidence(chosen, session)


def output(session: Any) -> Any:
    """What the step of any workload leaves, as one fp32 tensor."""
    found = next(
        value
        for key in ("logits", "output", "first_loss", "tokens")
        if (value := getattr(session.step, key, None)) is not None
    )
    return getattr(found, "logits", found).float().clone()


def distance(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", TECHNIQUES)
class TestMetadata:
    def test_is_complete(self, name: str) -> None:
        technique = optimizations()[name]
        assert technique.name == name
        assert technique.family in FAMILIES
        assert technique.summary
        assert "\n" not in technique.summary
        assert len(technique.summary) <= 100
        assert inspect.getdoc(inspect.getmodule(technique)), "its file says what it is"
        assert not set(name) & set("+:,= "), "the name stands in stacks"

    def test_options_have_types_and_choices(self, name: str) -> None:
        technique = optimizations()[name]
        for key, default in technique.options.items():
            assert isinstance(default, str | int | float | bool), key
            if key in technique.choices:
                assert default in technique.choices[key]
                assert {type(choice) for choice in technique.choices[key]} == {type(default)}
        assert set(technique.choices) <= set(technique.options)

    def test_needs_name_what_exists(self, name: str) -> None:
        needs = optimizations()[name].needs
        assert set(needs.workloads) <= set(workloads())
        assert set(needs.model_kinds) <= {*MODEL_KINDS, "none"}
        assert set(needs.devices) <= {"cuda", "cpu"}

    def test_every_spelling_is_one_stack(self, name: str) -> None:
        technique = optimizations()[name]
        spelled = name + "".join(f":{key}={default}" for key, default in list(technique.options.items())[:1])
        assert str(parse_stack(spelled)) == name, "defaults are dropped"
        for key, choices in technique.choices.items():
            for choice in choices:
                assert str(parse_stack(str(parse_stack(f"{name}:{key}={choice}")))) == str(
                    parse_stack(f"{name}:{key}={choice}")
                )

    def test_environment_is_text(self, name: str) -> None:
        (chosen,) = parse_stack(name).techniques
        variables = optimizations()[name].environment(chosen)
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in variables.items())


def one_sentence(reason: str | None) -> str:
    assert reason
    assert "\n" not in reason
    assert len(reason) < 200
    return reason


@pytest.mark.parametrize("name", TECHNIQUES)
class TestRefusal:
    def test_wrong_device(self, bench: Any, name: str) -> None:
        technique = optimizations()[name]
        for kind in {"cuda", "cpu"} - set(technique.needs.devices or ("cuda", "cpu")):
            reason = one_sentence(technique.unsupported(cell_for(bench, name), bench.device(kind)))
            assert name in reason
            assert kind in reason

    def test_old_card(self, bench: Any, name: str) -> None:
        technique = optimizations()[name]
        if technique.needs.compute_capability is None:
            pytest.skip("any card will do")
        old = bench.device("cuda", name="Tesla P4", tag="p4", compute_capability=(6, 1))
        reason = one_sentence(technique.unsupported(cell_for(bench, name), old))
        assert "6.1" in reason
        assert "Tesla P4" in reason

    def test_wrong_workload(self, bench: Any, name: str) -> None:
        technique = optimizations()[name]
        for kind in set(workloads()) - set(technique.needs.workloads or workloads()):
            reason = one_sentence(technique.unsupported(bench.cell(kind, name), bench.device("cuda")))
            assert name in reason
            assert kind in reason

    def test_wrong_model_kind(self, bench: Any, name: str) -> None:
        technique = optimizations()[name]
        for kind in set(MODEL_KINDS) - set(technique.needs.model_kinds or MODEL_KINDS):
            model = ModelSpec(id="odd-one", source="hub", reference="a/b", kind=kind)  # type: ignore[arg-type]
            cell = bench.cell(usual_workload(technique), name, model)
            reason = one_sentence(technique.unsupported(cell, bench.device("cuda")))
            assert "odd-one" in reason
            assert kind in reason

    def test_missing_package(self, bench: Any, name: str) -> None:
        technique = optimizations()[name]
        device = technique.needs.devices[0] if technique.needs.devices else "cuda"
        for package in technique.needs.packages:
            rest = {key: "1" for key in technique.needs.packages if key != package}
            bare = bench.device(device, packages=rest, compute_capability=(10, 0))
            reason = one_sentence(technique.unsupported(cell_for(bench, name), bare))
            assert package in reason
            assert "pip install" in reason

    def test_artifacts_and_rows_have_one_version(self, bench: Any, name: str) -> None:
        """A version that `artifact_spec` alone is given makes artifacts again and leaves the rows of the old ones."""
        technique, cell = optimizations()[name], cell_for(bench, name)
        (chosen,) = [item for item in cell.stack.techniques if item.name == name]
        spec = technique.artifact(chosen, bench.job(cell, checkpoint="c" * 16))
        if spec is not None:
            assert spec.inputs["version"] == technique.artifact_version, "set artifact_version on the class"

    def test_has_some_device(self, bench: Any, name: str) -> None:
        technique = optimizations()[name]
        cell = cell_for(bench, name, precision="bf16" if technique.family == "attention" else "")
        needed = (*technique.needs.packages, *technique.needs.optional_packages)
        installed = {**bench.device().packages, **dict.fromkeys(needed, "1")}
        card = bench.device("cuda", compute_capability=(10, 0), packages=installed)
        devices = (bench.device(packages=installed), card)
        assert any(unsupported(cell, device) is None for device in devices)


def test_attention_without_attention_is_refused(bench: Any) -> None:
    for name in [name for name in TECHNIQUES if optimizations()[name].family == "attention"]:
        cell = bench.cell("forward", f"bf16+{name}")
        for kind in ("cpu", "cuda"):
            assert name in one_sentence(unsupported(cell, bench.device(kind)))


PLAIN = "torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Softmax(-1))"
MADE = """
import torch
class Attending(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    return LlamaForCausalLM(LlamaConfig(**sizes))
def make():
    return MODEL, lambda batch, device, seed: INPUTS
"""


class TestFactories:
    """Attention of what a factory made: chosen where it can be, else refused with the reason."""

    def cell(self, bench: Any, stack: str, model: str, inputs: str) -> Any:
        made, path = bench.factory(MADE.replace("MODEL", model).replace("INPUTS", inputs))
        return bench.job(bench.cell("forward", stack, made), search_path=path)

    @pytest.mark.parametrize("name", sorted(n for n, t in optimizations().items() if t.family == "attention"))
    def test_without_attention(self, bench: Any, name: str) -> None:
        technique = optimizations()[name]
        job = self.cell(bench, name, PLAIN, "torch.ones(batch, 8, device=device)")
        with (
            pytest.raises(Unsupported, match=r"attn_implementation|scaled_dot_product_attention"),
            bench.live(job, applied="baseline") as session,
        ):
            technique.apply(session.job.cell.stack.techniques[0], session)
            technique.evidence(session.job.cell.stack.techniques[0], session)

    @pytest.mark.parametrize("stack", ["sdpa-math", "sdpa-flash"])
    def test_with_attention_of_its_own(self, bench: Any, stack: str) -> None:
        with bench.live(self.cell(bench, stack, "Attending()", "torch.ones(batch, 2, 8, 4)")) as session:
            ((technique, chosen),) = session.techniques
            assert technique.evidence(chosen, session).ok

    @pytest.mark.parametrize("stack", ["eager", "sdpa-math"])
    def test_of_a_transformers_model(self, bench: Any, stack: str) -> None:
        with bench.live(self.cell(bench, stack, "llama()", "torch.ones(batch, 4, dtype=torch.long)")) as session:
            ((technique, chosen),) = session.techniques
            assert technique.evidence(chosen, session).ok


def applicable(workload: str) -> list[str]:
    """Techniques whose effect on this workload is checked here; compilation on the smallest only, it takes seconds."""
    known = optimizations()
    return [
        name
        for name in TECHNIQUES
        if workload in (known[name].needs.workloads or workloads())
        and (known[name].family != "compile" or workload == "attention")
        and (known[name].family != "attention" or workload != "forward")
        # greedy tokens of a rounded model or cache may part for good: prefill shows the logits of the one, test_decode
        # what is in the other
        and (known[name].family not in ("precision", *ON_POCKET) or workload != "decode")
        and not known[name].lossy_cache
    ]


def slow_if(condition: bool, *values: str) -> Any:
    return pytest.param(*values, marks=[pytest.mark.slow] if condition else marks_of(*values))


def marks_of(*names: str) -> list[Any]:
    """Techniques that run on a CPU, and whose package an extra installs, are for make test-backends."""
    needs = [optimizations()[name].needs for name in names if name in TECHNIQUES]
    here = [item for item in needs if not item.devices or "cpu" in item.devices]
    return (
        [pytest.mark.backends] if any(item.extra and (item.packages or item.optional_packages) for item in here) else []
    )


@pytest.mark.usefixtures("torch_settings")
class TestEffect:
    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, bench: Any) -> Any:
        known: dict[tuple[str, str], Any] = {}

        def of(cell: Cell) -> Any:
            key = (cell.workload.kind, cell.model.id)
            if key not in known:
                stack = "fp32" if cell.model.kind == "vision" else "fp32+eager"
                with bench.live(bench.job(bench.cell(cell.workload.kind, stack, cell.model))) as session:
                    known[key] = output(session)
            return known[key]

        return of

    @pytest.mark.parametrize(
        ("workload", "name"),
        [
            slow_if((name in COMPILES_LONG and workload != "attention") or name == "distill", workload, name)
            for workload in sorted(workloads())
            for name in applicable(workload)
        ],
    )
    def test_took_effect_and_is_near_the_reference(self, bench: Any, reference: Any, workload: str, name: str) -> None:
        cell = cell_for(bench, name, workload)
        if not runs_here(bench, cell):
            pytest.skip(str(unsupported(cell, bench.device())))
        family = optimizations()[name].family
        expected = reference(cell)  # a session of its own, which forgets what was compiled: before the other begins
        with bench.live(bench.job(cell)) as session:
            # before the evidence, whose own calls are shorter
            assert session.step.problems() == []
            assert distance(output(session), expected) < COARSE.get(name, TOLERANCE.get(family, SAME_ARITHMETIC))
            evidence = proof(name, session)
            assert evidence.ok, evidence.facts

    @pytest.mark.parametrize(
        "name",
        [slow_if(name in COMPILES_LONG, name) for name in TECHNIQUES if keeps_tokens(optimizations()[name])],
    )
    def test_same_tokens_in_fp32(self, bench: Any, reference: Any, name: str) -> None:
        cell = cell_for(bench, name, "decode", precision="fp32")
        if not runs_here(bench, cell):
            pytest.skip(str(unsupported(cell, bench.device())))
        with bench.live(bench.job(cell)) as session:
            same = output(session).equal(reference(cell))
            assert same, "greedy tokens in fp32 do not depend on cache, kernel or loop"


def impostors(name: str) -> list[str]:
    """Stacks of the same family, the empty one among them, that could pass for `name` on a CPU and are not it."""
    known = optimizations()
    others = [other for other in TECHNIQUES if known[other].family == known[name].family and other != name]
    # tf32 on a CPU is fp32: no card, no TF32
    others = [
        other
        for other in others
        if not known[other].needs.devices and not known[other].needs.optional_packages and other not in PROVEN_ON_CUDA
    ]
    return others + ([] if name in DEFAULTS else ["baseline"])


@pytest.mark.usefixtures("torch_settings")
class TestPretenders:
    """The cell says one thing and another was loaded: evidence must not be fooled."""

    @pytest.mark.parametrize(
        ("name", "applied"),
        [
            slow_if(applied in COMPILES_LONG, name, applied)
            for name in TECHNIQUES
            if name not in PROVEN_ON_CUDA | CONTROLS
            for applied in impostors(name)
        ],
    )
    def test_is_caught(self, bench: Any, name: str, applied: str) -> None:
        cell = cell_for(bench, name)
        with bench.live(bench.job(cell), applied=applied) as session:
            evidence = proof(name, session)
        assert not evidence.ok, f"{applied} passes for {name}: {evidence.facts}"
        assert evidence.facts, "what was seen instead is said"

    @pytest.mark.parametrize("name", [n for n in TECHNIQUES if optimizations()[n].family == "precision"])
    def test_is_caught_in_training(self, bench: Any, name: str) -> None:
        if name in PROVEN_ON_CUDA:
            pytest.skip("tests/gpu proves it")
        applied = "bf16" if name != "bf16" else "fp32"
        with bench.live(bench.job(bench.cell("train_step", name)), applied=applied) as session:
            assert not proof(name, session).ok

    @pytest.mark.parametrize("name", [n for n in TECHNIQUES if optimizations()[n].family in ("attention", "precision")])
    def test_is_caught_in_the_kernel(self, bench: Any, name: str) -> None:
        if name in PROVEN_ON_CUDA:
            pytest.skip("tests/gpu proves it")
        applied = {"attention": "eager", "precision": "bf16"}[optimizations()[name].family]
        applied = {"eager": "sdpa-flash", "bf16": "fp32"}[applied] if applied == name else applied
        with bench.live(bench.job(bench.cell("attention", name)), applied=applied) as session:
            assert not proof(name, session).ok

    def test_precision_of_one_weight(self, bench: Any) -> None:
        """A single layer left in fp32 is no bf16 model."""
        import torch

        with bench.live(bench.job(bench.cell("prefill", "bf16"))) as session:
            assert proof("bf16", session).ok
            session.model.model.norm.to(torch.float32)
            assert not proof("bf16", session).ok

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(n, marks=marks_of(n))
            for n in TECHNIQUES
            # what another runtime holds cannot be changed from here: their own tests have files that pretend
            if optimizations()[n].family == "compression" and not optimizations()[n].runtime
        ],
    )
    def test_compression_of_all_but_one_layer(self, bench: Any, name: str) -> None:
        import torch

        cell = cell_for(bench, name)
        if not runs_here(bench, cell):
            pytest.skip("tests/gpu proves it")
        with bench.live(bench.job(cell), calls=0) as session:
            assert proof(name, session).ok
            block = session.model.model.layers[0].mlp
            block.up_proj = torch.nn.Linear(block.up_proj.in_features, block.up_proj.out_features)
            assert not proof(name, session).ok

"""What every workload promises: typed axes, a step that marks what it says, and findings on planted faults only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tasks.cell import ModelSpec
from tasks.registry import optimizations, workloads
from tasks.row import IDENTITY
from tasks.stacks import parse_stack, unsupported
from tasks.workload import END, SETUP

# Inductor imports torch's own TorchScript helpers, which warn since Python 3.11 has a newer way.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

KINDS = sorted(workloads())
UNITS = {"token", "image", "sample", "step"}


def marks_of(session: Any) -> list[str]:
    labels: list[str] = []
    session.step.run(1, labels.append)
    return labels


@pytest.mark.parametrize("kind", KINDS)
class TestDeclaration:
    def test_metadata(self, kind: str) -> None:
        workload = workloads()[kind]
        assert workload.kind == kind
        assert workload.summary
        assert "\n" not in workload.summary
        assert workload.axes["batch_size"] >= 1  # type: ignore[operator]

    def test_axes_have_typed_defaults(self, kind: str) -> None:
        workload = workloads()[kind]
        for name, default in workload.axes.items():
            assert type(default) in (int, float, str, bool), name
            if type(default) is int:
                assert default > 0, "integers of axes must be positive"
            if name in workload.choices:
                assert default in workload.choices[name]
        assert set(workload.modifiers) <= set(workload.axes) - {"batch_size"}

    def test_defaults_of_modifiers_stay_out_of_the_point(self, kind: str) -> None:
        workload = workloads()[kind]
        plain = workload.point({})
        assert dict(plain.parameters).keys() == set(workload.axes) - set(workload.modifiers)
        assert workload.point(dict(workload.axes)) == plain
        assert workload.values(plain) == workload.axes
        for name in workload.modifiers:
            other = next((c for c in workload.choices.get(name, ()) if c != workload.axes[name]), None)
            changed = workload.axes[name] / 2 if other is None else other  # type: ignore[operator]
            point = workload.point({name: changed})
            assert point[name] == workload.values(point)[name] == changed
            assert point != plain

    def test_columns(self, bench: Any, kind: str) -> None:
        columns = workloads()[kind].columns(bench.point(kind))
        assert columns.keys() == {"batch_size", "sequence_length", "new_tokens"}
        assert columns.keys() <= {column.name for column in IDENTITY}
        assert all(value is None or (type(value) is int and value > 0) for value in columns.values())

    def test_refuses_models_of_another_kind(self, bench: Any, kind: str) -> None:
        workload = workloads()[kind]
        for other in {"language", "vision", "module"} - set(workload.model_kinds or ("language", "vision", "module")):
            model = ModelSpec(id="odd-one", source="hub", reference="a/b", kind=other)  # type: ignore[arg-type]
            reason = workload.unsupported(bench.cell(kind, model=model), bench.device())
            assert reason
            assert kind in reason
            assert "odd-one" in reason
            assert other in reason


@pytest.mark.parametrize("kind", KINDS)
class TestStep:
    def test_marks_what_it_declares(self, bench: Any, kind: str) -> None:
        with bench.live(bench.job(bench.cell(kind))) as session:
            step = session.step
            labels = marks_of(session)
            assert step.primary in labels
            assert set(labels) - {step.primary, SETUP, END} <= {"first_token"}
            assert step.unit in UNITS
            assert type(step.units_per_call) is int
            assert step.units_per_call > 0
            assert step.problems() == []

    def test_boundaries_cover_the_primary_segments_and_nothing_else(self, bench: Any, kind: str) -> None:
        """The throughput pass counts the time up to a boundary: all primary segments must lie there, and only they."""
        with bench.live(bench.job(bench.cell(kind))) as session:
            labels, boundaries = marks_of(session), session.step.boundaries
            primary = session.step.primary
        assert set(boundaries) <= set(labels)
        if not boundaries:
            assert set(labels) == {primary}, "without boundaries all time counts"
            return
        opened: list[str] = []
        for label in labels:
            opened.append(label)
            if label in boundaries:
                counted = {item for item in opened if item not in (SETUP, END)}
                assert counted <= {primary} if boundaries[label] else primary not in counted
                opened.clear()
        assert not opened, "nothing follows the last boundary"

    def test_calls_are_alike_and_inputs_rotate(self, bench: Any, kind: str) -> None:
        with bench.live(bench.job(bench.cell(kind))) as session:
            assert marks_of(session) == marks_of(session)
            stored = next(
                getattr(session.step, name)
                for name in ("_inputs", "_prompts", "_batches")
                if hasattr(session.step, name)
            )
        assert len(stored) >= 4
        tensors = [_first_tensor(item) for item in stored]
        assert all(not tensors[0].equal(other) for other in tensors[1:])
        assert all(bool((tensor != 0).any()) for tensor in tensors), "zeros are measured too fast"

    def test_inputs_are_seeded(self, bench: Any, kind: str) -> None:
        found = []
        for seed in (0, 0, 1):
            with bench.live(bench.job(bench.cell(kind), seed=seed), calls=0) as session:
                found.append(_first_tensor(inputs_of(session)[0]))
        assert found[0].equal(found[1])
        assert not found[0].equal(found[2])


def inputs_of(session: Any) -> list[Any]:
    names = ("_inputs", "_prompts", "_batches")
    return next(getattr(session.step, name) for name in names if hasattr(session.step, name))


def _first_tensor(item: Any) -> Any:
    return item[0] if isinstance(item, tuple) else item


class TestUnits:
    """Units per call, computed by hand."""

    @pytest.mark.parametrize(
        ("kind", "axes", "units", "unit"),
        [
            ("prefill", {"batch_size": 3, "sequence_length": 7}, 21, "token"),
            ("decode", {"batch_size": 3, "prompt_tokens": 5, "new_tokens": 4}, 9, "token"),
            ("forward", {"batch_size": 3, "image_size": 32}, 3, "image"),
            ("train_step", {"batch_size": 3, "sequence_length": 7}, 21, "token"),
            ("attention", {"batch_size": 3, "sequence_length": 7}, 21, "token"),
        ],
    )
    def test_per_call(self, bench: Any, kind: str, axes: dict[str, int], units: int, unit: str) -> None:
        with bench.live(bench.job(bench.cell(kind, **axes)), calls=0) as session:
            assert (session.step.units_per_call, session.step.unit) == (units, unit)

    def test_training_of_a_vision_model_counts_images(self, bench: Any) -> None:
        job = bench.job(bench.cell("train_step", model=bench.vision, batch_size=3, image_size=32))
        with bench.live(job) as session:
            assert (session.step.units_per_call, session.step.unit) == (3, "image")
            assert session.step.problems() == []

    def test_factory_counts_samples(self, bench: Any) -> None:
        model, path = bench.factory(LINEAR_FACTORY)
        with bench.live(bench.job(bench.cell("train_step", model=model, batch_size=5), search_path=path)) as session:
            assert (session.step.units_per_call, session.step.unit) == (5, "sample")
            assert session.step.problems() == []


LINEAR_FACTORY = """
import torch
def make():
    def inputs(batch, device, seed):
        return torch.randn(batch, 4, generator=torch.Generator(device).manual_seed(seed), device=device)
    model = torch.nn.Linear(4, 2)
    return model, inputs, lambda model, x: model(x).square().mean()
"""


EMBEDDING_FACTORY = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.linear = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2)
    def forward(self, parts, ids):
        return self.linear(parts["x"] + self.rows(ids))
def make():
    def inputs(batch, device, seed):
        generator = torch.Generator(device).manual_seed(seed)
        ids = torch.randint(0, 10, (batch,), generator=generator, device=device)
        return {"x": torch.randn(batch, 4, generator=generator, device=device)}, ids
    return Net(), inputs
"""


class TestFactoryInputs:
    @pytest.mark.parametrize(("stack", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
    def test_are_cast_as_the_weights(self, bench: Any, stack: str, dtype: str) -> None:
        import torch

        model, path = bench.factory(EMBEDDING_FACTORY)
        job = bench.job(bench.cell("forward", stack, model, batch_size=3), search_path=path)
        with bench.live(job) as session:
            assert session.step.output.dtype == getattr(torch, dtype)
            assert session.step.problems() == []
            ((technique, chosen),) = session.techniques
            assert technique.evidence(chosen, session).ok

    def test_stay_as_made_where_nothing_casts_the_weights(self, bench: Any) -> None:
        import torch

        wide = "return Net().double(), lambda *a: (lambda made: ({'x': made[0]['x'].double()}, made[1]))(inputs(*a))"
        model, path = bench.factory(EMBEDDING_FACTORY.replace("return Net(), inputs", wide))
        with bench.live(bench.job(bench.cell("forward", "baseline", model), search_path=path)) as session:
            assert session.step.output.dtype == torch.float64


class TestDecode:
    def test_segments(self, bench: Any) -> None:
        for stack in ("dynamic-cache", "static-cache", "no-cache"):
            with bench.live(bench.job(bench.cell("decode", stack, new_tokens=4))) as session:
                assert marks_of(session) == [SETUP, "first_token", "token", "token", "token", END]

    def test_missing_tokens_are_found(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("decode"))) as session:
            assert session.step.problems() == []
            session.step.tokens[1, -1] = -1
            assert session.step.problems() == ["wrong_token_count"]

    def test_loop_that_stops_early_is_found(self, bench: Any) -> None:
        """As a loop that honours an end-of-text token would."""
        with bench.live(bench.job(bench.cell("decode", new_tokens=8)), calls=0) as session:
            session.step._new = 5
            session.step.run(0, lambda _: None)
            assert session.step.problems() == ["wrong_token_count"]

    def test_one_new_token_is_refused(self, bench: Any) -> None:
        reason = workloads()["decode"].unsupported(bench.cell("decode", new_tokens=1), bench.device())
        assert reason
        assert "at least 2 new tokens" in reason

    def test_same_tokens_as_transformers(self, bench: Any) -> None:
        """Our own loop against `generate`, greedy, on the trained model."""
        import torch

        job = bench.job(bench.cell("decode", "fp32", bench.POCKET, batch_size=2, prompt_tokens=16, new_tokens=12))
        with bench.live(job, calls=1) as session:
            ours, prompt = session.step.tokens.clone(), session.step._prompts[0]
            theirs = session.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        assert ours.equal(theirs[:, 16:])


class TestTraining:
    def test_loss_falls_and_weights_change(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("train_step")), calls=20) as session:
            assert session.step.problems() == []
            assert float(session.step.loss) < float(session.step.first_loss)
            assert session.step.optimizer_steps() == session.step.calls == 20

    def test_unchanged_weights_are_found(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("train_step")), calls=0) as session:
            for group in session.step.optimizer.param_groups:
                group["lr"] = 0.0
            session.step.run(0, lambda _: None)
            assert session.step.problems() == ["weights_unchanged"]

    def test_frozen_model_is_found(self, bench: Any) -> None:
        """Steps that never reach the optimizer."""
        with bench.live(bench.job(bench.cell("train_step")), calls=0) as session:
            session.step.optimizer.step = lambda *_: None
            session.step.run(0, lambda _: None)
            assert {"every_step_skipped", "weights_unchanged"} <= set(session.step.problems())

    def test_scaler_made_anew_each_step_is_found(self, bench: Any) -> None:
        """The mistake of the closest existing tool: its scale overflows, each new one skips its first step."""
        import torch

        with bench.live(bench.job(bench.cell("train_step", "fp16")), calls=0) as session:
            for _ in range(3):
                session.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True)
                session.step.run(0, lambda _: None)
            assert {"every_step_skipped", "weights_unchanged"} <= set(session.step.problems())

    def test_some_skipped_steps_are_flagged(self, bench: Any) -> None:
        import torch

        with bench.live(bench.job(bench.cell("train_step", "fp16")), calls=0) as session:
            session.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True)
            for _ in range(200):
                session.step.run(0, lambda _: None)
                if session.step.optimizer_steps():
                    break
            assert session.step.problems() == []
            assert session.row["flags"] == ["steps_skipped"]

    def test_one_persistent_scaler(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("train_step", "fp16")), calls=5) as session:
            assert session.step.scaler is not None
            assert session.step.optimizer_steps() == 5
            assert session.step.problems() == []

    def test_infinite_loss_is_found(self, bench: Any) -> None:
        import torch

        with bench.live(bench.job(bench.cell("train_step"))) as session:
            session.step.loss = torch.tensor(float("nan"))
            assert session.step.problems() == ["loss_not_finite"]

    def test_weights_stay_fp32_under_autocast(self, bench: Any) -> None:
        import torch

        for stack in ("bf16", "fp16"):
            with bench.live(bench.job(bench.cell("train_step", stack))) as session:
                assert {parameter.dtype for parameter in session.model.parameters()} == {torch.float32}


class TestPlantedFaults:
    def test_attention_shape_and_nan(self, bench: Any) -> None:
        import torch

        with bench.live(bench.job(bench.cell("attention"))) as session:
            good = session.step.output
            session.step.output = good[:, :, :-1]
            assert session.step.problems() == ["wrong_output_shape"]
            session.step.output = torch.full_like(good, float("nan"))
            assert session.step.problems() == ["output_not_finite"]

    def test_prefill_and_forward_shape(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("prefill"))) as session:
            session.step.logits = session.step.logits[:1]
            assert session.step.problems() == ["wrong_output_shape"]
        with bench.live(bench.job(bench.cell("forward"))) as session:
            session.step.output.logits = session.step.output.logits[:1]
            assert session.step.problems() == ["wrong_output_shape"]


class TestAttentionKernel:
    @pytest.mark.parametrize("causal", [False, True])
    def test_written_out_is_the_fused_result(self, bench: Any, causal: bool) -> None:
        outputs = []
        for stack in ("eager", "sdpa-flash", "sdpa-math", *(["flex"] if causal else [])):  # it compiles for seconds
            with bench.live(bench.job(bench.cell("attention", stack, causal=causal))) as session:
                outputs.append(session.step.output.clone())
        assert all(outputs[0].allclose(other, atol=1e-5) for other in outputs[1:])

    @pytest.mark.parametrize("causal", [False, True])
    def test_gradients_are_those_of_the_definition(self, bench: Any, causal: bool) -> None:
        """Of queries, keys and values, against fp64 written out here."""
        import torch

        axes = {"causal": causal, "direction": "forward_backward"}
        for stack in ("eager", "sdpa-flash", "sdpa-math"):
            with bench.live(bench.job(bench.cell("attention", stack, **axes)), calls=1) as session:
                step = session.step
                assert step.problems() == []
                inputs = [tensor.detach().double().requires_grad_() for tensor in step._inputs[0]]
                q, k, v = inputs
                scores = q @ k.mT / q.shape[-1] ** 0.5
                if causal:
                    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
                expected = torch.autograd.grad(scores.softmax(-1) @ v, inputs, step._gradients[0].double())
                for found, truth in zip(step.gradients, expected, strict=True):
                    assert found.double().allclose(truth, atol=1e-5), stack

    def test_a_forward_call_has_no_gradients(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("attention"))) as session:
            assert session.step.gradients == ()
            assert session.step.output.is_inference()

    def test_faulty_gradients_are_found(self, bench: Any) -> None:
        job = bench.job(bench.cell("attention", direction="forward_backward"))
        with bench.live(job) as session:
            q, k, v = session.step.gradients
            session.step.gradients = (q, k, v[:, :, :-1])
            assert session.step.problems() == ["wrong_gradient_shape"]
            session.step.gradients = (q, k, v * float("nan"))
            assert session.step.problems() == ["gradient_not_finite"]

    def test_flex_refuses_a_backward_pass_on_a_cpu(self, bench: Any) -> None:
        cell = bench.cell("attention", "flex", direction="forward_backward")
        assert "no backward pass on a cpu" in str(unsupported(cell, bench.device()))
        assert unsupported(cell, bench.device("cuda")) is None


FLASH_PACKAGES = {
    "flash-attn-2": ("flash_attn", "flash_attn"),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_3"),
}


@pytest.mark.parametrize("name", sorted(FLASH_PACKAGES))
class TestFlashPackages:
    """The packages need a card; a stand-in of their layout shows that the call, the mask and the evidence are right."""

    @pytest.fixture
    @staticmethod
    def package(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """The package's function, through an operator of its namespace; `package.honest` off makes it a pretender."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        module_name, namespace = FLASH_PACKAGES[name]
        module: Any = ModuleType(module_name)
        module.honest = True

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
            rows = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return scaled_dot_product_attention(*rows, is_causal=causal).transpose(1, 2).contiguous()

        library = torch.library.Library(namespace, "DEF")
        library.define("fwd(Tensor q, Tensor k, Tensor v, bool causal) -> Tensor")
        library.impl("fwd", attend, "CompositeExplicitAutograd")
        operator = getattr(torch.ops, namespace).fwd
        module.flash_attn_func = lambda q, k, v, causal: (operator if module.honest else attend)(q, k, v, causal)
        monkeypatch.setitem(sys.modules, module_name, module)
        yield module
        library._destroy()

    @pytest.mark.parametrize("causal", [False, True])
    def test_layout_and_mask(self, bench: Any, package: Any, name: str, causal: bool) -> None:
        outputs = []
        for stack in (f"bf16+{name}", "bf16+sdpa-flash"):
            with bench.live(bench.job(bench.cell("attention", stack, causal=causal))) as session:
                outputs.append(session.step.output.clone())
                if name in stack:
                    evidence = optimizations()[name].evidence(parse_stack(name).techniques[0], session)
                    assert evidence.ok, evidence.facts
        assert outputs[0].equal(outputs[1])

    def test_pytorchs_copy_is_no_evidence(self, bench: Any, package: Any, name: str) -> None:
        package.honest = False
        with bench.live(bench.job(bench.cell("attention", f"bf16+{name}"))) as session:
            evidence = optimizations()[name].evidence(parse_stack(name).techniques[0], session)
        assert not evidence.ok
        assert evidence.facts["attention_operators"]

    def test_wants_half_precision(self, bench: Any, package: Any, name: str) -> None:
        needs = optimizations()[name].needs
        card = bench.device("cuda", compute_capability=(9, 0), packages=dict.fromkeys(needs.packages, "1"))
        assert unsupported(bench.cell("attention", f"fp16+{name}"), card) is None
        assert "fp16 or bf16" in str(unsupported(bench.cell("attention", f"fp32+{name}"), card))
        assert "fp16 or bf16" in str(unsupported(bench.cell("attention", name), card))


@pytest.mark.parametrize(
    ("kind", "fits", "too_long"),
    [
        ("decode", {"prompt_tokens": 24, "new_tokens": 8}, {"prompt_tokens": 25, "new_tokens": 8}),
        ("prefill", {"sequence_length": 32}, {"sequence_length": 33}),
        ("train_step", {"sequence_length": 32}, {"sequence_length": 33}),
    ],
)
def test_more_positions_than_a_model_has_learned(
    bench: Any, kind: str, fits: dict[str, int], too_long: dict[str, int]
) -> None:
    """GPT-2 has a table of them; a rotary model has none, and is not refused."""
    learned = bench.random_model("few-positions", {"model_type": "gpt2", "n_positions": 32, "n_embd": 8}, "language")
    for model, points in ((learned, fits), (bench.language, dict.fromkeys(too_long, 600))):
        cell = bench.cell(kind, "baseline", model, **points)
        assert workloads()[kind].unsupported(cell, bench.job(cell).device) is None
    cell = bench.cell(kind, "baseline", learned, **too_long)
    refusal = workloads()[kind].unsupported(cell, bench.job(cell).device)
    assert refusal == f"{kind} asks for 33 positions here, few-positions has learned 32"

"""Quality against independent computations: itself, a known perturbation, plain transformers, single questions."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.artifacts import find
from tasks.cell import ModelSpec
from tasks.isolation import Completed
from tasks.job import CellJob
from tasks.metric import Missing
from tasks.models.identity import POCKET
from tasks.probe import host_cpu
from tasks.quality import (
    REFERENCE_STACK,
    QualityReading,
    judge,
    make_reference,
    reference_serves_all,
    reference_spec,
)
from tasks.quality_text import divergence as divergence_of
from tasks.row import Row
from tasks.session import Session
from tasks.supervisor import Supervisor

TOKENS, CHOICES = 1024, 12


@pytest.fixture(scope="module")
def jobs(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Jobs on pocket with one artifact folder; the reference is made once."""
    from tasks.row import Row
    from tasks.session import Session

    folder = str(tmp_path_factory.mktemp("artifacts"))
    numbers = iter(range(1000))

    def make(stack: str = REFERENCE_STACK, model: Any = bench.POCKET, kind: str = "prefill", **changes: Any) -> Any:
        job = bench.job(
            bench.cell(kind, stack, model), artifact_dir=folder, run_id=f"run{next(numbers)}",
            **{"quality_tokens": TOKENS, "quality_choices": CHOICES, **changes},
        )  # fmt: skip
        made = make_reference(Session(job=job, device=torch.device("cpu"), row=Row()))
        assert made[0].spec == reference_spec(job)
        return job

    return make


@pytest.fixture(scope="module")
def plain() -> Any:
    """Pocket in fp32 through nothing but transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.models.identity import POCKET

    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(POCKET)


@pytest.fixture(scope="module")
def itself(bench: Any, jobs: Any) -> Iterator[QualityReading]:
    with bench.live(jobs(), calls=0) as session:
        reading = judge(session)
    assert isinstance(reading, QualityReading)
    yield reading


class TestReferenceAgainstItself:
    def test_no_divergence(self, itself: QualityReading) -> None:
        assert itself.kl_divergence is not None
        assert 0 <= itself.kl_divergence < 1e-11
        assert itself.kl_divergence_max == pytest.approx(0, abs=1e-6)
        assert itself.top1_agreement == 1.0
        assert itself.perplexity_log_ratio == pytest.approx(0, abs=1e-9)

    def test_floor_is_rounding(self, itself: QualityReading) -> None:
        assert itself.kl_divergence_floor is not None
        assert 0 <= itself.kl_divergence_floor < 1e-9
        assert itself.perplexity_log_ratio_floor is not None
        assert 0 <= itself.perplexity_log_ratio_floor < 1e-6
        assert itself.top1_agreement_floor == pytest.approx(1, abs=1e-3)
        assert itself.accuracy_floor == 0
        assert (itself.accuracy_difference, itself.accuracy_difference_stderr) == (0, 0)

    def test_label_and_counts(self, itself: QualityReading) -> None:
        assert itself.label == "quality"
        assert itself.scored == TOKENS
        assert itself.choices == CHOICES
        assert itself.accuracy_stderr == pytest.approx(
            math.sqrt(itself.accuracy * (1 - itself.accuracy) / CHOICES)  # type: ignore[operator]
        )

    def test_perplexity_by_plain_transformers(self, itself: QualityReading, plain: Any) -> None:
        """Windows of 512 tokens of the held-out text, the second half of each scored."""
        from tasks.models.text import heldout_text

        model, tokenizer = plain
        ids = tokenizer(heldout_text()[:100_000], add_special_tokens=False, verbose=False)["input_ids"]
        losses = []
        for start in range(0, TOKENS // 256 * 512, 512):
            window = torch.tensor([ids[start : start + 512]])
            labels = window.clone()
            labels[:, :256] = -100
            with torch.no_grad():
                losses.append(float(model(window, labels=labels).loss))
        assert itself.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)

    def test_accuracy_question_by_question(self, itself: QualityReading, plain: Any) -> None:
        """Each ending alone, without padding or batching."""
        from tasks.models.text import multiple_choice

        model, tokenizer = plain
        right = right_per_token = 0
        for item in multiple_choice()[:CHOICES]:
            scores, per_token = [], []
            for ending in item.endings:
                context, tail = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (item.context, ending))
                ids = torch.tensor([context + tail])
                with torch.no_grad():
                    log_p = model(ids).logits[0].double().log_softmax(-1)
                picked = [float(log_p[len(context) + i - 1, token]) for i, token in enumerate(tail)]
                scores.append(sum(picked) / len(ending))
                per_token.append(sum(picked) / len(picked))
            right += scores.index(max(scores)) == item.label
            right_per_token += per_token.index(max(per_token)) == item.label
        assert itself.accuracy == right / CHOICES
        assert itself.accuracy_per_token == right_per_token / CHOICES


class TestPerturbation:
    def test_divergence_grows_with_it(self, bench: Any, jobs: Any) -> None:
        readings = []
        for spread in (0.003, 0.03):
            with bench.live(jobs(), calls=0) as session:
                generator = torch.Generator().manual_seed(3)
                for layer in session.model.model.layers:
                    weight = layer.mlp.down_proj.weight
                    weight.copy_(weight + spread * torch.randn(weight.shape, generator=generator))
                readings.append(judge(session))
        small, large = readings
        assert 0 < small.kl_divergence < large.kl_divergence
        assert 1 > small.top1_agreement > large.top1_agreement
        assert 0 < large.kl_divergence_stderr < large.kl_divergence

    @pytest.mark.parametrize("stack", ["bf16", "fp16", "nf4"])
    def test_stacks_are_measurably_near(self, bench: Any, jobs: Any, stack: str) -> None:
        with bench.live(jobs(stack), calls=0) as session:
            reading = judge(session)
        assert isinstance(reading, QualityReading)
        assert reading.kl_divergence_floor < reading.kl_divergence < {"nf4": 0.2}.get(stack, 0.01)
        assert reading.top1_agreement > {"nf4": 0.75}.get(stack, 0.95)

    def test_constant_logits_shift_changes_nothing(self) -> None:
        """KL is of distributions, and of the right direction: KL(reference || ours)."""
        reference = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
        ours = torch.tensor([[[0.25, 0.5, 0.25]]]).log()
        expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
        assert float(divergence_of(ours, reference)) == pytest.approx(expected)
        assert float(divergence_of(reference, reference)) == 0
        lopsided = torch.tensor([[[0.98, 0.01, 0.01]]]).log()
        assert float(divergence_of(lopsided, reference)) != pytest.approx(float(divergence_of(reference, lopsided)))

    def test_divergence_is_never_negative(self) -> None:
        """Also where fp32 log-probabilities do not sum to one, tiny differences, tiny and zero probabilities."""
        generator = torch.Generator().manual_seed(0)
        logits = 8 * torch.randn(4, 96, 300, generator=generator)
        logits[0, :, :40] = -float("inf")  # masked entries of a vocabulary
        logits[1, :, 40:80] -= 900.0
        reference = logits.log_softmax(-1)
        for spread in (0.0, 1e-8, 1e-6, 1e-3, 1.0, 30.0):
            ours = (logits + spread * torch.randn(logits.shape, generator=generator)).log_softmax(-1)
            p, q = (t.double().log_softmax(-1) for t in (reference, ours))
            expected = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
            found = divergence_of(ours, reference)
            assert (found >= 0).all()
            assert found.shape == (4, 96)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)

    def test_overflow_is_null_with_a_reason(self, bench: Any, jobs: Any) -> None:
        """Outputs that are not numbers give no figure, and the row of the cell stays."""
        from tasks.metrics.quality import Quality

        with bench.live(jobs(), calls=0) as session:
            session.model.model.norm.weight.fill_(float("inf"))
            session.quality = judge(session)
            values = Quality().collect(session)
        for name in ("perplexity", "kl_divergence", "accuracy", "accuracy_difference_stderr"):
            assert isinstance(values[name], Missing), name
            assert "overflow" in values[name].reason


class TestRandomWeights:
    def test_fidelity_only(self, bench: Any, jobs: Any) -> None:
        with bench.live(jobs("bf16", bench.language), calls=0) as session:
            reading = judge(session)
        assert isinstance(reading, QualityReading)
        assert reading.label == "fidelity"
        assert reading.perplexity is None
        assert reading.accuracy is None
        assert 0 < reading.kl_divergence < 0.1  # type: ignore[operator]

    def test_compressed_random_weights_are_near_their_reference(self, bench: Any, jobs: Any) -> None:
        """They are the same network: unrelated weights would agree in 1 of 256 tokens."""
        with bench.live(jobs("fp32+int8", bench.language), calls=0) as session:
            reading = judge(session)
        assert isinstance(reading, QualityReading)
        assert reading.top1_agreement > 0.8

    def test_vision(self, bench: Any, jobs: Any) -> None:
        with bench.live(jobs("fp32", bench.vision, "forward"), calls=0) as session:
            reading = judge(session)
        assert isinstance(reading, QualityReading)
        assert (reading.top1_agreement, reading.top5_agreement, reading.perplexity) == (1.0, 1.0, None)
        with bench.live(jobs("bf16", bench.vision, "forward"), calls=0) as session:
            reading = judge(session)
        assert isinstance(reading, QualityReading)
        assert reading.top1_agreement > 0.8
        assert reading.top5_agreement is not None
        assert reading.top5_agreement >= reading.top1_agreement


class TestWhereItCannotBe:
    def test_training(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("train_step")), calls=0) as session:
            assert isinstance(judge(session), Missing)

    def test_kernel(self, bench: Any) -> None:
        with bench.live(bench.job(bench.cell("attention")), calls=0) as session:
            assert isinstance(judge(session), Missing)

    def test_no_reference(self, bench: Any, tmp_path: Path) -> None:
        with bench.live(bench.job(bench.cell("prefill"), artifact_dir=str(tmp_path)), calls=0) as session:
            reading = judge(session)
        assert isinstance(reading, Missing)
        assert "no fp32 reference" in reading.reason


def test_reading_is_reused_within_a_run(bench: Any, jobs: Any) -> None:
    """The same stack at another batch size needs no second judgement in one run."""
    job = jobs("bf16")
    with bench.live(job, calls=0) as session:
        first = judge(session)
        session.model.model.layers[0].mlp.down_proj.weight.zero_()
        assert judge(session) == first


def test_reference_depends_on_what_it_is_made_of(bench: Any, tmp_path: Path) -> None:
    base = bench.job(bench.cell("prefill", model=bench.POCKET))
    import dataclasses

    assert reference_spec(base) == reference_spec(dataclasses.replace(base, run_id="other", round=2))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}')
    changes: list[dict[str, Any]] = [
        {"quality_tokens": 99}, {"quality_choices": 7}, {"seed": 5}, {"cell": bench.cell("prefill")},
        {"quality_choices_file": str(questions)},
    ]  # fmt: skip
    for change in changes:
        assert reference_spec(base) != reference_spec(dataclasses.replace(base, **change)), change
    asked = dataclasses.replace(base, quality_choices_file=str(questions))
    before = reference_spec(asked)
    questions.write_text('{"ctx": "a", "endings": ["b", "d"], "label": 0}')
    assert reference_spec(asked) != before
    assert reference_spec(base) == reference_spec(dataclasses.replace(base, quality_tasks=("some",)))


def test_which_devices_share_a_reference(bench: Any, tmp_path: Path) -> None:
    import shutil

    def shared(model: Any) -> bool:
        cell = bench.cell("prefill", model=model)
        jobs = [bench.job(cell, device=bench.device(kind)) for kind in ("cpu", "cuda")]
        assert reference_serves_all(jobs[0]) == (reference_spec(jobs[0]) == reference_spec(jobs[1]))
        return reference_serves_all(jobs[0])

    assert shared(bench.POCKET)
    assert not shared(bench.language), "random weights are each device's own"
    hub = ModelSpec(id="hub", source="hub", reference="org/name", kind="language")
    assert not shared(hub), "a name without its revision may be other files elsewhere"
    assert not shared(replace(hub, revision="main"))
    assert shared(replace(hub, revision="0123456789abcdef" * 2 + "01234567"))
    shutil.copytree(POCKET, tmp_path / "published")
    config = json.loads((POCKET / "config.json").read_text())
    published = ModelSpec(id="mine", source="path", reference=str(tmp_path / "published"), kind="language")
    assert shared(published)
    for method, expected in (("bitsandbytes", False), ("gptq", True)):
        changed = {**config, "quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}
        (tmp_path / "published" / "config.json").write_text(json.dumps(changed))
        assert shared(published) == expected, method


def test_images_are_the_same_on_every_machine(bench: Any, tmp_path: Path) -> None:
    """A device's own generator draws others, and so does torch.randn with other vector instructions."""
    from tasks.quality_images import drawn_images

    images = drawn_images(32, 0)
    assert abs(float(images.mean())) < 0.01 and float(images.std()) == pytest.approx(1.0, rel=0.01)
    code = "from tasks.quality_images import drawn_images as d; print(d(32, 0).double().pow(3).sum().item())"
    for capability in ("default", "avx2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert float(done.stdout) == pytest.approx(float(images.double().pow(3).sum()), rel=1e-12), capability
    with bench.live(bench.job(bench.cell("forward", "fp32"), artifact_dir=str(tmp_path)), calls=0) as session:
        make_reference(Session(job=session.job, device=session.device, row=Row()))
        assert isinstance(judge(session), QualityReading)
        (reference,) = tmp_path.rglob("outputs.safetensors")
        changed = load_file(reference)
        changed["digest"] = changed["digest"].flip(0)
        save_file(changed, reference)
        session.job = replace(session.job, run_id="later")
        reading = judge(session)
    assert isinstance(reading, Missing) and "other images" in reading.reason


def test_a_reference_of_other_tokens_is_no_reference(bench: Any, tmp_path: Path) -> None:
    """A node without the tokenizer falls back to random ids: what another node judged is of other tokens then."""
    job = bench.job(
        bench.cell("prefill", "fp32", bench.POCKET), artifact_dir=str(tmp_path), quality_tokens=1024, quality_choices=4
    )
    make_reference(Session(job=job, device=torch.device("cpu"), row=Row()))
    with bench.live(job, calls=0) as session:
        session.loaded = replace(session.loaded, tokenizer=None)
        reading = judge(session)
    assert isinstance(reading, Missing) and "other tokens" in reading.reason


class TestWhoMakesTheReference:
    """With a card that is pretended to be too small: `tests/gpu` has one that is full."""

    @pytest.fixture
    def slot(self, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
        slot = Supervisor(bench.device("cuda"), cpus=bench.CPUS, log_path=tmp_path / "log", work_dir=tmp_path)
        real, self.tried = slot._isolation.run, list[str]()

        def run(do: str, payload: dict[str, Any], **options: Any) -> Completed:
            kind = payload["job"]["device"]["kind"] if do == "artifact" else payload["device"]["kind"]
            self.tried.append(f"{do} on {kind}")
            if kind == "cpu":
                return real(do, payload, **options)
            outcome = self.outcome if do == "artifact" else "error"
            failure = {"outcome": outcome, "reason": "there is no such card", "error_type": None}
            result = failure if do == "artifact" else None
            return Completed(result=result, exit_code=1, signal=None, timed_out=False, out_of_memory=False,
                             phase=do, stderr_tail="", wall_s=0.1, kind="fork")  # fmt: skip

        monkeypatch.setattr(slot._isolation, "run", run)
        with closing(slot):
            yield slot

    def job(self, bench: Any, tmp_path: Path, kind: str = "prefill", model: Any = None, device: Any = None) -> CellJob:
        job: CellJob = bench.job(
            bench.cell(kind, "bf16", model or bench.POCKET), device=device or bench.device("cuda"),
            artifact_dir=str(tmp_path / "store"), quality=True, quality_tokens=1024, quality_choices=4,
        )  # fmt: skip
        return job

    @pytest.mark.slow
    def test_the_host_of_a_small_card(
        self, bench: Any, slot: Supervisor, supervisor: Supervisor, tmp_path: Path
    ) -> None:
        self.outcome, job = "oom", self.job(bench, tmp_path)
        slot.measure(job)
        found = find(reference_spec(job), tmp_path / "store")
        assert found is not None and found.manifest.device == host_cpu().name
        assert self.tried[:2] == ["artifact on cuda", "artifact on cpu"]
        (found.folder / "outputs.safetensors").write_bytes(b"broken")
        slot.measure(job)
        assert find(reference_spec(job), tmp_path / "store", content=True) is not None, "what is broken is made again"
        row = supervisor.measure(self.job(bench, tmp_path, device=bench.device())).row
        assert (row["quality_reference"], row["quality_reference_device"]) == (found.spec.key, host_cpu().name)
        assert 0 < row["kl_divergence"] < 0.01

    @pytest.mark.parametrize("outcome", ["error", "unsupported"])
    def test_what_fails_otherwise_is_not_tried_elsewhere_nor_again(
        self, bench: Any, slot: Supervisor, tmp_path: Path, outcome: str
    ) -> None:
        self.outcome = outcome
        for _ in range(2):
            slot.measure(self.job(bench, tmp_path))
        assert self.tried == ["artifact on cuda", "cell on cuda", "cell on cuda"]

    def test_random_weights_of_another_device_are_no_reference(
        self, bench: Any, slot: Supervisor, tmp_path: Path
    ) -> None:
        self.outcome = "oom"
        slot.measure(self.job(bench, tmp_path, model=bench.language))
        assert self.tried == ["artifact on cuda", "cell on cuda"]

    def test_none_is_made_where_nothing_is_judged(self, bench: Any, slot: Supervisor, tmp_path: Path) -> None:
        slot.measure(self.job(bench, tmp_path, "train_step"))
        assert self.tried == ["cell on cuda"]

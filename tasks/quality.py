"""Quality of a stack against the unoptimised fp32 model on the same tokens: perplexity, divergence, agreement, choices.

The reference (fp32, TF32 off, written-out attention) is made once and kept: its log-probabilities over the whole
vocabulary in fp32, since storing logits in bf16 alone fakes 2 % of disagreements. Whichever device made it first
serves all others, also those whose memory could not hold the fp32 model: between devices it differs by the order of
fp32 sums, as it does between batch shapes (the floor). Random weights are drawn on the device, so each kind of device
has a reference of its own. Windows of up to 512 tokens follow each other in the held-out text, and only their second
half is scored, as llama.cpp does. Everything is paired: the same tokens, so that the difference is known far better
than either value. Random weights have no quality: their figures say how faithful a stack is, nothing more.

Here are the reference, the reading and their keeping; what is compared is in `quality_text`, `quality_choices`,
`quality_images` and `quality_tasks` beside it.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import Artifact, ArtifactSpec, find, make
from tasks.cell import digest
from tasks.choices import ChoicesError, content_hash
from tasks.environment import version
from tasks.host import free_memory_bytes
from tasks.metric import Missing
from tasks.models.identity import checkpoint_folder, config_of, job_checkpoint
from tasks.models.packing import packing_of
from tasks.probe import host_cpu
from tasks.quality_choices import answer, answer_floor, compare_answers, questions
from tasks.quality_images import VERSION as IMAGES_VERSION
from tasks.quality_images import compare_images, image_outputs
from tasks.quality_tasks import run_tasks
from tasks.quality_text import compare_text, floors, text_outputs, windows
from tasks.registry import optimizations, workloads
from tasks.stacks import parse_stack

if TYPE_CHECKING:
    import torch

    from tasks.job import CellJob
    from tasks.session import Session

REFERENCE_STACK = "fp32+eager"
MAKER, FILE = "reference", "outputs.safetensors"  # in the artifact store
NOT_JUDGED = frozenset({"kv-cache", "compile", "graphs", "control", "decode-loop", "allocator"})
BATCH = 4  # windows at once; half of it for the floor
HOST_SHARE = 0.8  # of the free memory of a host: at 95 % of all, Ray ends processes
OTHER_TOKENS = "the fp32 reference was made of other tokens: this node's tokenizer differs from its maker's"
OTHER_IMAGES = "the fp32 reference was made of other images: this node's generator differs from its maker's"
LIBRARIES = ("torch", "transformers", "tokenizers", "sentencepiece")
VERSION = 4  # raised when the way of judging changes: older references, readings and rows are not reused


@dataclass(frozen=True, kw_only=True)
class QualityReading:
    """Figures of one stack; None where they mean nothing. Standard errors are over windows, or items for choices.

    A floor is what the reference gives against itself with other batch shapes: less than that is the kernels'
    rounding. `reasons` says why a figure is None.
    """

    label: str  # quality, or fidelity for random weights
    reference: str
    reference_device: str
    scored: int
    top1_agreement: float
    top1_agreement_stderr: float | None
    top1_agreement_floor: float | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    perplexity_log_ratio: float | None = None
    perplexity_log_ratio_stderr: float | None = None
    perplexity_log_ratio_floor: float | None = None
    kl_divergence: float | None = None
    kl_divergence_stderr: float | None = None
    kl_divergence_max: float | None = None
    kl_divergence_floor: float | None = None
    top5_agreement: float | None = None
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    accuracy_per_token: float | None = None
    accuracy_difference: float | None = None
    accuracy_difference_stderr: float | None = None
    accuracy_floor: float | None = None
    choices: int = 0
    lm_eval: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def reference_spec(job: CellJob) -> ArtifactSpec:
    """What this job's reference depends on; found without torch."""
    language = job.cell.model.kind == "language"
    return ArtifactSpec(
        maker=MAKER,
        checkpoint=False,
        inputs={
            "model": job_checkpoint(job),
            "identity": job.cell.model.identity(),
            "vision": "text" if language else job.cell.workload.kind,
            "image_size": None if language else job.cell.workload.get("image_size"),
            "tokens": job.quality_tokens,
            "choices": job.quality_choices,
            "choices_file": content_hash(job.quality_choices_file),
            "seed": job.seed,
            "device": None if reference_serves_all(job) else [job.device.tag, job.device.name],
            # builds for other devices (2.13.0+cpu) are one version
            "versions": {name: (version(name) or "").partition("+")[0] for name in LIBRARIES},
            "version": VERSION if language else [VERSION, IMAGES_VERSION],
        },
    )


def reference_serves_all(job: CellJob) -> bool:
    """Whether the reference of one device is right for all: not where each draws its own weights, where a name may
    mean other files on another node, or where the checkpoint was published for a library's quantized kernels."""
    model = job.cell.model
    if model.source == "hub":
        return re.fullmatch("[0-9a-f]{40}", model.revision or "") is not None  # a branch moves
    if checkpoint_folder(model) is None:
        return False
    config = config_of(model) or {}
    return "quantization_config" not in config or packing_of(config) is not None


def reference_s(job: CellJob) -> float:
    """Seconds that a node may take to make the job's reference: on the device, and where that is too small on its
    host; 0 where none is needed."""
    return job.timeout_s * (1 if job.device.kind == "cpu" else 2) if job.quality and not why_not_judged(job) else 0.0


def on_the_host(job: CellJob) -> CellJob:
    """The job on the CPU of its device's host, in what memory is free there and not needed by others."""
    budget = int(HOST_SHARE * free_memory_bytes())
    return replace(job, device=host_cpu(), threads=None, memory_budget_bytes=budget)


def why_not_judged(job: CellJob) -> str | None:
    """Why a cell has no quality whatever comes out of it, None where it has."""
    workload = workloads()[job.cell.workload.kind]
    if not workload.needs_model or workload.training:
        return "judged on inference cells of models only"
    if job.cell.model.source == "factory":
        return "a factory's module has no reference text"
    lossy = [name for name in job.cell.stack.names() if optimizations()[name].lossy_cache]
    if lossy:
        return f"judged on whole sequences without a KV cache, where {lossy[0]} loses nothing"
    return None


def make_reference(session: Session) -> tuple[Artifact, bool]:
    """Load the reference stack, run it on the tokens, keep its outputs in the store; whether they were made now."""
    from safetensors.torch import save_file

    job = session.job
    cell = replace(job.cell, stack=parse_stack(REFERENCE_STACK if job.cell.model.kind == "language" else "fp32"))

    def fill(folder: Path) -> None:
        session.job = replace(job, cell=cell)
        _load(session)
        outputs = _reference_outputs(session)
        save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, folder / FILE)

    return make(reference_spec(job), session, fill)


def judge(session: Session) -> QualityReading | Missing:
    """Quality of the session's live model. Reuses what this run has found for the same stack on this device."""
    job = session.job
    refusal = why_not_judged(job)
    if refusal is not None:
        return Missing(reason=refusal)
    root = Path(job.artifact_dir)
    found = find(reference_spec(job), root)
    if found is None:
        return Missing(reason="no fp32 reference of this model came to this node: see the log")
    tasks = [job.quality_tasks, job.quality_tasks_path, job.quality_tasks_limit]
    name = digest([job.run_id, judged_stack(job), job.device.name, job.device.uuid, *tasks])
    kept = root / "readings" / f"{found.spec.key}-{name}.json"
    if kept.exists():
        return QualityReading(**json.loads(kept.read_text()))
    reading = _judge(session, found)
    if isinstance(reading, Missing):
        return reading
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(reading)))
    partial.rename(kept)
    return reading


def judged_stack(job: CellJob) -> str:
    """The part of the stack that what is judged depends on: whole sequences are run, not compiled, without a cache."""
    known = optimizations()
    return "+".join(str(item) for item in job.cell.stack.techniques if known[item.name].family not in NOT_JUDGED)


def _judge(session: Session, found: Artifact) -> QualityReading | Missing:
    import torch
    from safetensors.torch import load_file

    reference = load_file(found.folder / FILE)
    label = "quality" if _trained(session) else "fidelity"
    known: dict[str, Any] = {"label": label, "reference": found.spec.key, "reference_device": found.manifest.device}
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        if _vision(session):
            outputs = image_outputs(session)
            if not torch.equal(outputs["digest"], reference["digest"]):
                return Missing(reason=OTHER_IMAGES)
            return QualityReading(**known, **compare_images(outputs["logits"], reference["logits"]))
        outputs = text_outputs(session, windows(session), BATCH)
        if not torch.equal(outputs["targets"], reference["targets"]):
            return Missing(reason=OTHER_TOKENS)
        fields = compare_text(outputs, reference, _trained(session))
        reasons: dict[str, str] = {}
        try:
            if not _trained(session):
                raise ChoicesError("needs trained weights and a tokenizer")
            fields |= compare_answers(answer(session, questions(session.job)), reference)
        except ChoicesError as error:
            reasons |= dict.fromkeys(("accuracy", "accuracy_per_token", "accuracy_difference"), str(error))
        answered = run_tasks(session)
        if isinstance(answered, Missing):
            reasons["lm_eval"] = answered.reason
        else:
            fields["lm_eval"] = answered
    return QualityReading(**known, reasons=reasons, **fields)


def _vision(session: Session) -> bool:
    assert session.loaded is not None
    return session.job.cell.model.kind == "vision" or hasattr(session.loaded.config, "num_channels")


def _trained(session: Session) -> bool:
    """Without a tokenizer the tokens are random, and perplexity on them says nothing about text."""
    loaded = session.loaded
    return loaded is not None and loaded.weights == "trained" and loaded.tokenizer is not None


def _load(session: Session) -> None:
    for technique, chosen in session.techniques:
        technique.load(session.load_options, chosen, session)
    session.load()
    for technique, chosen in session.techniques:
        technique.apply(chosen, session)


def _reference_outputs(session: Session) -> dict[str, torch.Tensor]:
    """What others are compared with, on the host: log-probabilities, answers and floors, or image logits."""
    import torch

    with torch.inference_mode():
        if _vision(session):
            return image_outputs(session)
        ids = windows(session)
        outputs = text_outputs(session, ids, BATCH)
        outputs |= floors(text_outputs(session, ids, BATCH // 2), outputs)
        if _trained(session):
            with suppress(ChoicesError):  # the judged cell meets the same error, and says so
                asked = questions(session.job)
                outputs |= answer(session, asked)
                outputs |= answer_floor(session, asked, outputs["answers"])
        return outputs

"""Quality of a stack against the unoptimised fp32 model on the same tokens: perplexity, divergence, agreement, choices.

The reference (fp32, TF32 off, written-out attention) is made once per node and kept: its log-probabilities over the
whole vocabulary in fp32, since storing logits in bf16 alone fakes 2 % of disagreements. Windows of up to 512 tokens
follow each other in the held-out text, and only their second half is scored, as llama.cpp does. Everything is paired:
the same tokens, so that the difference is known far better than either value. Random weights have no quality: their
figures say how faithful a stack is, nothing more.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.cell import digest
from tasks.metric import Missing
from tasks.models.identity import checkpoint_hash
from tasks.registry import optimizations
from tasks.stacks import parse_stack
from tasks.statistics import mean, standard_deviation

if TYPE_CHECKING:
    import torch

    from tasks.job import CellJob
    from tasks.session import Session

REFERENCE_STACK = "fp32+eager"
WINDOW = 512
LARGE_VOCABULARY = 65_536
LARGE_VOCABULARY_TOKENS = 2_000
IMAGES, IMAGE_BATCH = 64, 16
NOT_JUDGED = frozenset({"kv-cache", "compile", "graphs", "control", "decode-loop", "allocator"})
VERSION = 3  # raised when the way of judging changes: older references and readings are not reused


@dataclass(frozen=True, kw_only=True)
class QualityReading:
    """Figures of one stack; None where they mean nothing. Standard errors are over windows, or items for choices."""

    label: str  # quality, or fidelity for random weights
    reference: str
    scored: int
    top1_agreement: float
    top1_agreement_stderr: float | None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    perplexity_log_ratio: float | None = None
    perplexity_log_ratio_stderr: float | None = None
    kl_divergence: float | None = None
    kl_divergence_stderr: float | None = None
    kl_divergence_max: float | None = None
    kl_divergence_floor: float | None = None
    top5_agreement: float | None = None
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    choices: int = 0


def reference_path(job: CellJob) -> Path:
    """Where this job's reference is kept on the node; its name is the hash of all that it depends on."""
    import torch
    import transformers

    key = digest(
        {
            "model": checkpoint_hash(job.cell.model),
            "identity": job.cell.model.identity(),
            "vision": job.cell.workload.kind if job.cell.model.kind != "language" else "text",
            "image_size": job.cell.workload.get("image_size") if job.cell.model.kind == "vision" else None,
            "tokens": job.quality_tokens,
            "choices": job.quality_choices,
            "seed": job.seed,
            "device": job.device.name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "version": VERSION,
        }
    )
    return Path(job.artifact_dir) / "reference" / f"{key}.safetensors"


def make_reference(session: Session) -> dict[str, Any]:
    """Load the reference stack, run it on the tokens, keep its outputs; `{"path", "floor"}`, plain data."""
    from safetensors.torch import save_file

    job = session.job
    path = reference_path(job)
    if not path.exists():
        cell = replace(job.cell, stack=parse_stack(REFERENCE_STACK if job.cell.model.kind == "language" else "fp32"))
        session.job = replace(job, cell=cell)
        _load(session)
        outputs = _outputs(session)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{job.run_id}.partial")
        save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, partial)
        partial.rename(path)
    return {"path": str(path)}


def judge(session: Session) -> QualityReading | Missing:
    """Quality of the session's live model. Reuses what this run has found for the same stack on this device."""
    job, loaded = session.job, session.loaded
    if loaded is None or session.workload.training:
        return Missing(reason="judged on inference cells of models only")
    if loaded.make_inputs is not None:
        return Missing(reason="a factory's module has no reference text")
    path = reference_path(job)
    if not path.exists():
        return Missing(reason="the fp32 reference could not be made on this node: see the log")
    kept = path.parent / f"{path.stem}-{digest([job.run_id, judged_stack(job), job.device.uuid])}.json"
    if kept.exists():
        return QualityReading(**json.loads(kept.read_text()))
    reading = _judge(session, path)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(reading)))
    partial.rename(kept)
    return reading


def judged_stack(job: CellJob) -> str:
    """The part of the stack that what is judged depends on: whole sequences are run, not compiled, without a cache."""
    known = optimizations()
    return "+".join(str(item) for item in job.cell.stack.techniques if known[item.name].family not in NOT_JUDGED)


def _judge(session: Session, path: Path) -> QualityReading:
    import torch
    from safetensors.torch import load_file

    reference = load_file(path)
    with torch.compiler.set_stance("force_eager"):
        outputs = _outputs(session)
    assert session.loaded is not None
    # without a tokenizer the tokens are random, and perplexity on them says nothing about text
    trained = session.loaded.weights == "trained" and session.loaded.tokenizer is not None
    label, name = ("quality" if trained else "fidelity"), path.stem
    if "logits" in reference:
        return _compare_images(outputs["logits"], reference["logits"], label, name)
    reading = _compare_text(outputs, reference, trained, label, name)
    if "correct" in outputs:
        correct = outputs["correct"].double()
        share = float(correct.mean())
        reading = replace(
            reading, accuracy=share, accuracy_stderr=math.sqrt(share * (1 - share) / len(correct)), choices=len(correct)
        )
    return reading


def _load(session: Session) -> None:
    from tasks.models.load import load

    for technique, chosen in session.techniques:
        technique.load(session.load_options, chosen, session)
    session.loaded = load(session.job.cell.model, session.load_options, session.device, session.job.search_path)
    for technique, chosen in session.techniques:
        technique.apply(chosen, session)


def _outputs(session: Session) -> dict[str, torch.Tensor]:
    """What is compared, on the host: log-probabilities and targets, choices answered, or image logits."""
    import torch

    with torch.inference_mode():
        if session.job.cell.model.kind == "vision" or hasattr(session.loaded.config, "num_channels"):  # type: ignore[union-attr]
            return {"logits": _image_logits(session)}
        windows = _windows(session)
        outputs = _text_outputs(session, windows)
        if session.job.cell.stack == parse_stack(REFERENCE_STACK):
            # the floor: the same model, other batch shapes; what differs is the kernels' rounding
            again = _log_probabilities(session, windows, batch=2)
            outputs["floor"] = _divergence(again, outputs["log_probabilities"]).mean().reshape(1)
        return outputs


def _windows(session: Session) -> torch.Tensor:
    """Consecutive windows of the held-out text, shape (windows, length); random ids for a model without tokenizer."""
    import torch

    from tasks.models.text import heldout_text
    from tasks.workloads._inputs import vocabulary

    assert session.loaded is not None
    config = session.loaded.config.get_text_config()
    wanted = session.job.quality_tokens
    if vocabulary(config) > LARGE_VOCABULARY:
        wanted = min(wanted, LARGE_VOCABULARY_TOKENS)
    length = min(WINDOW, int(config.max_position_embeddings))
    count = max(2, math.ceil(wanted / (length // 2)))
    if session.loaded.tokenizer is None:
        generator = torch.Generator().manual_seed(session.job.seed + 1)
        return torch.randint(0, vocabulary(config), (count, length), generator=generator)
    text = heldout_text()[: 12 * count * length]
    ids = session.loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(count, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def _text_outputs(session: Session, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = {
        "log_probabilities": _log_probabilities(session, windows, batch=4),
        "targets": windows[:, windows.shape[1] // 2 :].contiguous(),
    }
    trained = session.loaded is not None and session.loaded.tokenizer is not None
    if trained and session.job.quality_choices:
        outputs["correct"] = _answer_choices(session)
    return outputs


def _log_probabilities(session: Session, windows: torch.Tensor, batch: int) -> torch.Tensor:
    """fp32 log-probabilities of the scored halves, shape (windows, scored, vocabulary), on the host."""
    import torch

    half = windows.shape[1] // 2
    parts = []
    for chunk in windows.split(batch):
        logits = session.model(input_ids=chunk.to(session.device), use_cache=False).logits[:, half - 1 : -1]
        parts.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    return torch.cat(parts)


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(reference || ours) per token in nats, fp64 sums over the whole vocabulary; `theirs` is the reference."""
    import torch

    parts = [
        (reference.exp().double() * (reference.double() - mine.double())).sum(-1)
        for mine, reference in zip(ours, theirs, strict=True)
    ]
    return torch.stack(parts)


def _compare_text(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], trained: bool, label: str, name: str
) -> QualityReading:
    mine, reference, targets = ours["log_probabilities"], theirs["log_probabilities"], ours["targets"]
    divergence = _divergence(mine, reference)
    nll, reference_nll = (-p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double() for p in (mine, reference))
    agree = (mine.argmax(-1) == reference.argmax(-1)).double()
    per_window = [tensor.mean(1).tolist() for tensor in (nll, nll - reference_nll, divergence, agree)]
    means = [mean(values) for values in per_window]
    errors = [_standard_error(values) for values in per_window]
    return QualityReading(
        label=label,
        reference=name,
        scored=int(targets.numel()),
        top1_agreement=means[3],
        top1_agreement_stderr=errors[3],
        perplexity=math.exp(means[0]) if trained else None,
        perplexity_stderr=math.exp(means[0]) * errors[0] if trained and errors[0] is not None else None,
        perplexity_log_ratio=means[1] if trained else None,
        perplexity_log_ratio_stderr=errors[1] if trained else None,
        kl_divergence=means[2],
        kl_divergence_stderr=errors[2],
        kl_divergence_max=float(divergence.max()),
        kl_divergence_floor=float(theirs["floor"]) if "floor" in theirs else None,
    )


def _standard_error(values: list[float]) -> float | None:
    """Of the mean over windows; None for a single window, which has none."""
    deviation = standard_deviation(values)
    return None if deviation is None else deviation / math.sqrt(len(values))


def _compare_images(mine: torch.Tensor, reference: torch.Tensor, label: str, name: str) -> QualityReading:
    agree = (mine.argmax(-1) == reference.argmax(-1)).double()
    among = (mine.topk(5).indices == reference.argmax(-1, keepdim=True)).any(-1).double()
    share = float(agree.mean())
    return QualityReading(
        label=label,
        reference=name,
        scored=len(agree),
        top1_agreement=share,
        top1_agreement_stderr=math.sqrt(share * (1 - share) / len(agree)),
        top5_agreement=float(among.mean()),
    )


def _image_logits(session: Session) -> torch.Tensor:
    import torch

    from tasks.workloads._inputs import images

    size = session.job.cell.workload.get("image_size", 224)
    batches = images(session, IMAGE_BATCH, size, count=IMAGES // IMAGE_BATCH)
    return torch.cat([session.model(batch).logits.float().cpu() for batch in batches])


def _answer_choices(session: Session) -> torch.Tensor:
    """Whether the right ending has the highest mean log-likelihood per token, for each question; bool on the host."""
    import torch

    from tasks.models.text import multiple_choice

    assert session.loaded is not None
    tokenizer, device = session.loaded.tokenizer, session.device
    correct = []
    for item in multiple_choice()[: session.job.quality_choices]:
        context = tokenizer(item.context, add_special_tokens=False)["input_ids"]
        endings = [tokenizer(ending, add_special_tokens=False)["input_ids"] for ending in item.endings]
        width = len(context) + max(map(len, endings))
        # padding on the right: with causal attention nothing that is scored can see it
        rows = [context + ending + [0] * (width - len(context) - len(ending)) for ending in endings]
        logits = session.model(input_ids=torch.tensor(rows, device=device), use_cache=False).logits
        log_probabilities = torch.log_softmax(logits[:, len(context) - 1 :].float(), dim=-1)
        scores = []
        for row, ending in enumerate(endings):
            ids = torch.tensor(ending, device=device).unsqueeze(-1)
            scores.append(float(log_probabilities[row, : len(ending)].gather(-1, ids).double().mean()))
        correct.append(max(range(len(scores)), key=scores.__getitem__) == item.label)
    return torch.tensor(correct)

"""Language models on the same held-out tokens: log-probabilities of two stacks, and how far they are apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.statistics import mean, standard_deviation

if TYPE_CHECKING:
    import torch

    from tasks.session import Session

Outputs = dict[str, "torch.Tensor"]
WINDOW = 512
LARGE_VOCABULARY = 65_536
LARGE_VOCABULARY_TOKENS = 2_000
LARGEST_EXPONENT = 700.0  # of e in a float
TOKENS_AT_ONCE = 64  # whose whole distributions are held in fp64


def windows(session: Session) -> torch.Tensor:
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


def text_outputs(session: Session, ids: torch.Tensor, batch: int) -> Outputs:
    """Of the scored halves, on the host: `log_probabilities` in fp32, (windows, scored, vocabulary), and `targets`."""
    import torch

    half = ids.shape[1] // 2
    parts = []
    for chunk in ids.split(batch):
        logits = session.model(input_ids=chunk.to(session.device), use_cache=False).logits[:, half - 1 : -1]
        parts.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    return {"log_probabilities": torch.cat(parts), "targets": ids[:, half:].contiguous()}


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(reference || ours) of each token in nats, fp64; `theirs` is the reference, both (windows, scored, vocabulary).

    Summed as p * (log p - log q) - p + q over the whole vocabulary: the same where both sum to one, and no term is
    negative. Log-probabilities in fp32 sum to one only within 1e-7, which the plain form shows as a divergence of
    either sign.
    """
    import torch

    parts = [
        torch.cat([_terms(*pair).sum(-1) for pair in zip(*(w.split(TOKENS_AT_ONCE) for w in window), strict=True)])
        for window in zip(ours, theirs, strict=True)
    ]
    return torch.stack(parts)


def _terms(mine: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """p * (d - 1 + exp(-d)) with d = log p - log q, without cancellation where d is small."""
    import torch

    log_p, log_q = reference.double(), mine.double()
    p, q = log_p.exp(), log_q.exp()
    d = log_p - log_q
    near = p * (torch.expm1(-d) + d)
    far = p * d - p + q
    return torch.where(p > 0, torch.where(d.abs() < 1, near, far), q)


def floors(again: Outputs, outputs: Outputs) -> Outputs:
    """What the reference makes of the same tokens in other batch shapes: differences that are rounding alone."""
    nll, agree, apart = _per_token(again, outputs)
    return {
        "floor_kl_divergence": apart.mean().reshape(1),
        "floor_perplexity_log_ratio": (nll[0] - nll[1]).mean().abs().reshape(1),
        "floor_top1_agreement": agree.mean().reshape(1),
    }


def compare_text(ours: Outputs, theirs: Outputs, trained: bool) -> dict[str, Any]:
    """Fields of a reading: means over tokens, errors over windows; perplexities only of trained weights."""
    (nll, reference_nll), agree, apart = _per_token(ours, theirs)
    per_window = [tensor.mean(1).tolist() for tensor in (nll, nll - reference_nll, apart, agree)]
    means = [mean(values) for values in per_window]
    errors = [_standard_error(values) for values in per_window]
    fields: dict[str, Any] = {
        "scored": int(ours["targets"].numel()),
        "top1_agreement": means[3],
        "top1_agreement_stderr": errors[3],
        "top1_agreement_floor": _floor(theirs, "top1_agreement"),
        "kl_divergence": means[2],
        "kl_divergence_stderr": errors[2],
        "kl_divergence_max": float(apart.max()),
        "kl_divergence_floor": _floor(theirs, "kl_divergence"),
    }
    if trained:
        perplexity = math.exp(means[0]) if means[0] < LARGEST_EXPONENT else math.inf
        fields |= {
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * errors[0] if errors[0] is not None else None,
            "perplexity_log_ratio": means[1],
            "perplexity_log_ratio_stderr": errors[1],
            "perplexity_log_ratio_floor": _floor(theirs, "perplexity_log_ratio"),
        }
    return fields


def _per_token(ours: Outputs, theirs: Outputs) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Both losses of the targets, whether the first choices agree, and the divergence; each (windows, scored), fp64."""
    mine, reference, targets = ours["log_probabilities"], theirs["log_probabilities"], ours["targets"]
    nll = [-p.gather(-1, targets.unsqueeze(-1)).squeeze(-1).double() for p in (mine, reference)]
    return nll, (mine.argmax(-1) == reference.argmax(-1)).double(), divergence(mine, reference)


def _floor(reference: Outputs, name: str) -> float | None:
    found = reference.get(f"floor_{name}")
    return None if found is None else float(found)


def _standard_error(values: list[float]) -> float | None:
    """Of the mean over windows; None for a single window, which has none."""
    deviation = standard_deviation(values)
    return None if deviation is None else deviation / math.sqrt(len(values))

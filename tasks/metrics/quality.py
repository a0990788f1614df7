"""Quality against the unoptimised fp32 reference, once per cell, after everything timed (see `tasks/quality.py`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tasks.metric import Column, Metric, Missing
from tasks.quality import QualityReading

if TYPE_CHECKING:
    from tasks.session import Session

_FLOATS = {
    "perplexity": "of the held-out text; null for random weights",
    "perplexity_stderr": "standard error over windows, unpaired",
    "perplexity_log_ratio": "mean log-ratio to the reference on the same tokens, paired",
    "perplexity_log_ratio_stderr": "its standard error over windows",
    "perplexity_log_ratio_floor": "its size for the reference against itself with other batch shapes",
    "kl_divergence": "KL(reference || this) per token, nats",
    "kl_divergence_stderr": "its standard error over windows",
    "kl_divergence_max": "greatest of one token",
    "kl_divergence_floor": "reference against itself with other batch shapes, on its device: less than this is noise",
    "top1_agreement": "share of tokens or images with the reference's first choice",
    "top1_agreement_stderr": "its standard error",
    "top1_agreement_floor": "of the reference with itself with other batch shapes",
    "top5_agreement": "share of images whose reference choice is among the first five",
    "accuracy": "multiple choice by log-likelihood per character of the ending (acc_norm of lm-evaluation-harness); "
    "chance is 1 / endings, 0.25 for the shipped questions",
    "accuracy_stderr": "binomial standard error",
    "accuracy_per_token": "the same answers by log-likelihood per token",
    "accuracy_difference": "accuracy minus that of the reference on the same questions",
    "accuracy_difference_stderr": "its standard error, paired by question",
    "accuracy_floor": "share of answers that the reference changes with other batch shapes",
}
_WHY = {
    "top5_agreement": "for image classifiers only",
    "perplexity": "needs trained weights and a tokenizer",
    "accuracy_difference": "the reference gave no answers",
}


class Quality(Metric):
    name = "quality"
    columns = (
        *(Column(name=name, type="float", doc=doc) for name, doc in _FLOATS.items()),
        Column(name="quality_tokens", type="int", doc="tokens or images compared"),
        Column(name="quality_choices", type="int", doc="multiple-choice questions answered"),
        Column(
            name="lm_eval",
            type="string",
            doc="JSON: task of lm-evaluation-harness -> metric -> value, stderr, n; null where it gives none",
        ),
        Column(name="quality_label", type="string", doc="quality, or fidelity where weights are random"),
        Column(name="quality_reference", type="string", doc="hash of what it was compared with"),
        Column(name="quality_reference_device", type="string", doc="device that made what it was compared with"),
        Column(
            name="quality_path",
            type="string",
            doc="what was judged: compiled steps and KV caches are not, only weights",
        ),
    )

    def collect(self, session: Session) -> dict[str, Any]:
        reading = session.quality
        if not isinstance(reading, QualityReading):
            reason = reading or Missing(reason="judged once per cell, in its first round, if the sweep wants it")
            return {column.name: reason for column in self.columns}
        return {
            **{name: self._figure(reading, name) for name in (*_FLOATS, "lm_eval")},
            "quality_tokens": reading.scored,
            "quality_choices": reading.choices,
            "quality_label": reading.label,
            "quality_reference": reading.reference,
            "quality_reference_device": reading.reference_device,
            "quality_path": "whole sequences, not compiled, without KV cache",
        }

    def _figure(self, reading: QualityReading, name: str) -> Any:
        value = getattr(reading, name)
        if value is None:
            group = name.removesuffix("_stderr").removesuffix("_floor")
            why = reading.reasons.get(group) or _WHY.get(group) or f"has no meaning here ({reading.label})"
            if name.endswith("_stderr") and getattr(reading, group) is not None:
                why = "one window or question has no spread"
            return Missing(reason=why)
        if isinstance(value, float) and not math.isfinite(value):
            return Missing(reason="not a finite number: the model's outputs overflow")
        return value

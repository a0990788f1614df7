"""Quality against the unoptimised fp32 reference, once per cell, after everything timed (see `tasks/quality.py`)."""

from __future__ import annotations

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
    "kl_divergence": "KL(reference || this) per token, nats",
    "kl_divergence_stderr": "its standard error over windows",
    "kl_divergence_max": "greatest of one token",
    "kl_divergence_floor": "reference against itself with other batch shapes: less than this is noise",
    "top1_agreement": "share of tokens or images with the reference's first choice",
    "top1_agreement_stderr": "its standard error",
    "top5_agreement": "share of images whose reference choice is among the first five",
    "accuracy": "multiple choice, length-normalised log-likelihood, chance 0.25",
    "accuracy_stderr": "binomial standard error",
}


class Quality(Metric):
    name = "quality"
    columns = (
        *(Column(name=name, type="float", doc=doc) for name, doc in _FLOATS.items()),
        Column(name="quality_tokens", type="int", doc="tokens or images compared"),
        Column(name="quality_choices", type="int", doc="multiple-choice questions answered"),
        Column(name="quality_label", type="string", doc="quality, or fidelity where weights are random"),
        Column(name="quality_reference", type="string", doc="hash of what it was compared with"),
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
        values: dict[str, Any] = {name: getattr(reading, name) for name in _FLOATS}
        why = Missing(reason=f"has no meaning here ({reading.label})")
        return {
            **{name: why if value is None else value for name, value in values.items()},
            "quality_tokens": reading.scored,
            "quality_choices": reading.choices,
            "quality_label": reading.label,
            "quality_reference": reading.reference,
            "quality_path": "whole sequences, not compiled, without KV cache",
        }

"""FLOPs of the model and how much of the device's measured ceilings they use (MFU, MBU).

The numerator is counted on the unoptimised reference on the meta device, so it is the same for every stack: counting
an optimised path would make int8, int4 and fused attention look like less work. Convention: a multiply-add is two
FLOPs, causal attention counts as full. MFU after PaLM (appendix B), MBU after Databricks: weight and cache bytes that
one token must read, over time and the measured read bandwidth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.ceilings import READ, product_key
from tasks.cell import digest
from tasks.metric import Column, Metric, Missing, Phase
from tasks.models.identity import job_checkpoint
from tasks.models.runtime import RuntimeModel
from tasks.stacks import freezes_weights, precision_of

if TYPE_CHECKING:
    from tasks.session import Session

_PUBLISHED = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Compute(Metric):
    name = "compute"
    columns = (
        Column(name="flops", type="float", doc="model FLOPs of one primary segment: a call, or one token of a batch"),
        Column(
            name="flops_least",
            type="float",
            doc="what a kernel that skips the masked half of causal attention executes",
        ),
        Column(name="mfu", type="float", doc="flops over time and the measured matrix-product ceiling"),
        Column(name="mbu", type="float", doc="bytes that a token must read, over time and measured read bandwidth"),
    )

    def __init__(self) -> None:
        self._read_bytes: float | None = None

    def end(self, phase: Phase, session: Session) -> None:
        if phase is Phase.THROUGHPUT and session.job.cell.workload.kind == "decode":
            self._read_bytes = bytes_read_per_token(session)

    def collect(self, session: Session) -> dict[str, Any]:
        counted = _flops(session)
        flops, least = (counted, counted) if isinstance(counted, Missing) else counted
        seconds = seconds_per_segment(session)
        return {
            "flops": flops,
            "flops_least": least,
            "mfu": _mfu(session, flops, seconds),
            "mbu": self._mbu(session, seconds),
        }

    def _mbu(self, session: Session, seconds: float | None) -> float | Missing:
        ceiling = session.job.ceilings.get(READ)
        if session.job.cell.workload.kind != "decode":
            return Missing(reason="not bandwidth-bound by construction: decode only")
        if seconds is None or self._read_bytes is None:
            return Missing(reason="the throughput pass was not reached")
        if ceiling is None:
            return Missing(reason="the read bandwidth of this device was not measured")
        return self._read_bytes / seconds / ceiling


def seconds_per_segment(session: Session) -> float | None:
    """Seconds of one primary segment in the throughput pass."""
    timings, step = session.timings, session.step
    if timings is None or step is None or timings.throughput.seconds <= 0:
        return None
    return timings.throughput.seconds / (timings.throughput.calls * step.steps_per_call)


def _mfu(session: Session, flops: float | Missing, seconds: float | None) -> float | Missing:
    if isinstance(flops, Missing):
        return Missing(reason=f"no FLOPs: {flops.reason}")
    if seconds is None:
        return Missing(reason="the throughput pass was not reached")
    products = (technique.multiplies for technique, _ in session.techniques)
    precision = next(filter(None, products), None) or precision_of(session.job.cell)
    precision = precision or _PUBLISHED.get(_dtype(session), "fp32")
    ceiling = session.job.ceilings.get(product_key(precision))
    if ceiling is None:
        return Missing(reason=f"the {precision} matrix product of this device was not measured")
    return flops / seconds / ceiling


def _dtype(session: Session) -> str:
    if session.model is None:
        return session.load_options.dtype or "float32"
    if isinstance(session.model, RuntimeModel):
        return str(session.model.dtype).removeprefix("torch.")
    floating = (p.dtype for p in session.model.parameters() if p.is_floating_point())
    return str(next(floating, "torch.float32")).removeprefix("torch.")


def bytes_read_per_token(session: Session) -> float:
    """Stored weights, an untied embedding only by its rows, and the cache at its mean length over a request."""
    import torch

    from tasks.metrics.parameters import stored_bytes

    total = float(stored_bytes(session.model))
    if isinstance(session.model, RuntimeModel):
        total -= session.model.weights.embedding_bytes
    else:
        embedding, head = session.model.get_input_embeddings(), session.model.get_output_embeddings()
        tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
        if isinstance(embedding, torch.nn.Embedding) and not tied:
            total -= embedding.weight.nbytes
    point = session.job.cell.workload
    cache = session.step.cache_bytes()  # type: ignore[union-attr]
    prompt, new = int(point["prompt_tokens"]), int(point["new_tokens"])
    return total + float(cache) * (prompt + new / 2) / (prompt + new)


def _flops(session: Session) -> tuple[float, float] | Missing:
    """Count, or read what an earlier round of this model and workload point has counted on this node."""
    cell, loaded = session.job.cell, session.loaded
    if session.workload.needs_model and loaded is None:
        return Missing(reason="not loaded")
    if cell.model.source == "factory":
        return Missing(reason="a factory's module has no reference to count on the meta device")
    import transformers

    content = job_checkpoint(session.job) if cell.model.source != "none" else None
    what = {"model": cell.model.identity(), "content": content, "transformers": transformers.__version__}
    # a pruned or distilled model is another one, whose arithmetic is its own
    made = [artifact.spec.key for artifact in session.artifacts.values() if artifact.spec.checkpoint]
    apart = ({"artifacts": made} if made else {}) | ({"frozen": True} if freezes_weights(cell) else {})
    key = digest({**what, **apart, "workload": str(cell.workload), "convention": 3})
    kept = Path(session.job.artifact_dir) / "flops" / f"{key}.json"
    if session.job.artifact_dir and kept.exists():
        flops, least = json.loads(kept.read_text())
        return float(flops), float(least)
    counted = count_flops(session)
    if session.job.artifact_dir and not isinstance(counted, Missing):
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{session.job.run_id}.partial")
        partial.write_text(json.dumps(counted))
        partial.rename(kept)
    return counted


def count_flops(session: Session) -> tuple[float, float] | Missing:
    """FLOPs of one primary segment of the reference, on the meta device: with causal attention as full, and as half."""
    point = session.job.cell.workload
    if point.kind == "attention":
        # two products forward; their backward pass is four, and a fused kernel's recomputation is no work of the model
        products = 2 if point["direction"] == "forward" else 6
        scores = point["batch_size"] * point["heads"] * point["sequence_length"] ** 2
        flops = float(2 * products * scores * point["head_size"])
        length = point["sequence_length"]
        return flops, flops * (length + 1) / (2 * length) if point["causal"] else flops
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tasks.models.load import from_config

    assert session.loaded is not None
    with torch.device("meta"):
        # written-out attention is two products, which the counter knows; the CPU's fused kernel counts as nothing
        model = from_config(
            session.loaded.config, session.job.cell.model, dtype=torch.float32, attn_implementation="eager"
        )
        counter = FlopCounterMode(display=False)
        if point.kind == "decode":
            middle = point["prompt_tokens"] + point["new_tokens"] // 2
            # no cache on meta: the work of one token is the last row of a sequence, counted as a difference
            longer, shorter = (
                _language_flops(model, point["batch_size"], length, logits=0) for length in (middle, middle - 1)
            )
            head = 2.0 * int(point["batch_size"]) * int(model.get_output_embeddings().weight.numel())
            quadratic, linear = _by_length(longer, shorter, middle)
            flops = linear + quadratic * middle + head
            return flops, flops
        if point.kind == "forward":
            size = point["image_size"]
            with counter:
                model(torch.empty(point["batch_size"], 3, size, size))
            flops = float(counter.get_total_flops())
            return flops, flops
        if point.kind == "prefill":
            flops = _language_flops(model, point["batch_size"], point["sequence_length"], logits=1)
            return flops, flops - _masked(model, point)
        if point.kind == "train_step":
            if freezes_weights(session.job.cell):
                # gradients of frozen weights are not computed; those of what lies between adapters are
                model.requires_grad_(False)
                model.get_input_embeddings().register_forward_hook(_requires_gradient)
            with counter:
                _loss(model, point).backward()
            flops = float(counter.get_total_flops())
            # each product has two in the backward pass, whatever is frozen: attention has no weights
            return flops, flops - (0.0 if hasattr(session.loaded.config, "num_channels") else 3 * _masked(model, point))
    return Missing(reason=f"nobody has said how to count {point.kind}")


def _language_flops(model: Any, batch: int, length: int, logits: int) -> float:
    """FLOPs of a forward pass; with `logits` 0 without the head."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    inputs = _token_inputs(batch, length)
    with counter, torch.no_grad():
        if logits:
            model(**inputs, logits_to_keep=logits)
        else:
            model.base_model(**inputs)
    return float(counter.get_total_flops())


def _token_inputs(batch: int, length: int) -> dict[str, Any]:
    """Inputs without data; the ready mask keeps transformers from looking into the tokens for packed sequences."""
    import torch

    return {
        "input_ids": torch.zeros(batch, length, dtype=torch.long, device="meta"),
        "attention_mask": torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta"),
        "use_cache": False,
    }


def _by_length(longer: float, shorter: float, length: int) -> tuple[float, float]:
    """`(c, d)` of a full pass that costs c n^2 (attention) + d n, from its FLOPs at `length` and one token less.

    longer - shorter = d + c (2 n - 1) and longer = c n^2 + d n.
    """
    n = float(length)
    quadratic = (longer - n * (longer - shorter)) / (n**2 - n * (2 * n - 1))
    return quadratic, (longer - quadratic * n**2) / n


def _masked(model: Any, point: Any) -> float:
    """FLOPs of a forward pass over a sequence that a causal mask throws away."""
    length = int(point["sequence_length"])
    if length < 2:
        return 0.0
    longer, shorter = (_language_flops(model, point["batch_size"], n, logits=0) for n in (length, length - 1))
    quadratic, _ = _by_length(longer, shorter, length)
    return quadratic * length * (length - 1) / 2


def _requires_gradient(_module: Any, _inputs: Any, output: Any) -> None:
    output.requires_grad_()


def _loss(model: Any, point: Any) -> Any:
    import torch

    batch = point["batch_size"]
    if hasattr(model.config, "num_channels"):
        logits = model(torch.empty(batch, 3, point["image_size"], point["image_size"])).logits
        return torch.nn.functional.cross_entropy(logits, torch.zeros(batch, dtype=torch.long))
    inputs = _token_inputs(batch, point["sequence_length"])
    return model(**inputs, labels=inputs["input_ids"]).loss

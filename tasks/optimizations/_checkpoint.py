"""What techniques that make another checkpoint ask about the one that they start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tasks.cell import ModelSpec
    from tasks.session import Session


def original_config(session: Session, maker: str) -> Any:
    """The configuration of what `maker` starts from: the model's own, or of the checkpoint made before it."""
    from transformers import AutoConfig

    from tasks.models.identity import checkpoint_folder, random_config
    from tasks.models.load import hf_config

    model, made = session.job.cell.model, session.artifacts.get(maker)
    earlier = [artifact for artifact in session.artifacts.values() if made and artifact.spec.key == made.spec.base]
    if earlier:
        return AutoConfig.from_pretrained(earlier[0].folder, trust_remote_code=model.trust_remote_code)
    if model.source == "random":
        return hf_config(random_config(model.reference))
    extra = {"revision": model.revision} if model.revision else {}
    where = checkpoint_folder(model) or model.reference
    return AutoConfig.from_pretrained(where, trust_remote_code=model.trust_remote_code, **extra)


def published_dtype(session: Session, maker: str) -> torch.dtype:
    """What the weights were published in, random ones too."""
    from tasks.models.identity import random_config
    from tasks.models.load import torch_dtype

    model = session.job.cell.model
    data = random_config(model.reference) if model.source == "random" else {}
    named = data.get("dtype") or data.get("torch_dtype") or original_config(session, maker).dtype or "float32"
    return torch_dtype(str(named).removeprefix("torch."))


def parameters_of(config: Any, spec: ModelSpec) -> int:
    """Parameters of a model as its configuration, one of `spec` or made from it, builds it; without data."""
    import torch

    from tasks.models.load import from_config

    with torch.device("meta"):
        model = from_config(config, spec)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())

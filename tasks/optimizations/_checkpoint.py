"""What techniques that make another checkpoint ask about the one that they start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.models.runtime import RuntimeModel

if TYPE_CHECKING:
    from pathlib import Path

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


NORM = "model.norm.weight"  # compression leaves it alone


def holds(session: Session, folder: Path, *more: str) -> bool | str:
    """Whether weights of the live model are those of the checkpoint in `folder`: the last norm's, and those in `more`.

    Only what is a plain tensor there and here is compared; in words why, where nothing is.
    """
    if isinstance(session.model, RuntimeModel):
        return f"not compared: held by {session.model.runtime}"
    live = dict(session.model.named_parameters())
    found = [same for name in (NORM, *more) if (same := same_as_kept(folder, name, live.get(name))) is not None]
    return all(found) if found else "not compared: this architecture names its weights otherwise"


def same_as_kept(folder: Path, name: str, live: torch.Tensor | None) -> bool | None:
    """Whether `live` is the checkpoint's tensor of that name, in its own dtype; None where either is no plain one."""
    from safetensors import safe_open

    if live is None or live.is_meta or not live.is_floating_point() or type(live.data).__name__ != "Tensor":
        return None  # an offloaded layer's weights come to the device only for its call
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as kept:
            if name in kept.keys():  # noqa: SIM118 - no mapping
                return bool(kept.get_tensor(name).to(live.dtype).equal(live.detach().cpu()))
    return None

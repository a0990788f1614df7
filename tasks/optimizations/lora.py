"""LoRA (peft): two small matrices beside every linear layer are trained, the model's own weights stay as they are.

The weights are held in the stack's precision, or compressed; on compressed ones (`nf4+lora` is QLoRA) the
normalisations are fp32. The adapters are always fp32.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.optimization import Evidence, Needs, Optimization
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session

_COMPRESSED = {"Linear4bit": "is_loaded_in_4bit", "Linear8bitLt": "is_loaded_in_8bit"}


class Lora(Optimization):
    name = "lora"
    family = "adapter"
    summary = "LoRA on every linear layer: weights frozen, two matrices of low rank trained beside each"
    needs = Needs(packages=("peft",), extra="train", workloads=("train_step",), model_kinds=("language",))
    options = {"rank": 16, "alpha": 32}
    freezes_weights = True

    def apply(self, technique: Technique, session: Session) -> None:
        import torch

        compressed = _say_how_it_is_compressed(session.model)
        torch.manual_seed(session.job.seed)
        with _without_gptqmodel():
            from peft import LoraConfig, inject_adapter_in_model

            config = LoraConfig(
                r=int(option(technique, "rank")),
                lora_alpha=int(option(technique, "alpha")),
                lora_dropout=0.0,
                target_modules="all-linear",
            )
            inject_adapter_in_model(config, session.model)
        for parameter in session.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if compressed:
            _prepare_compressed(session)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        rank = int(option(technique, "rank"))
        trained = {name: p for name, p in session.model.named_parameters() if p.requires_grad}
        down = {name: p for name, p in trained.items() if ".lora_A." in name}
        up = {name: p for name, p in trained.items() if ".lora_B." in name}
        layers = [m for m in session.model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        roles = dtypes_by_role(session.model)
        # B starts at zero: what is not zero was trained
        moved = sum(bool(parameter.detach().any()) for parameter in up.values())
        facts = {
            "adapted_layers": len(layers),
            "adapted_classes": dict(Counter(type(layer.base_layer).__name__ for layer in layers)),
            "ranks": sorted({parameter.shape[0] for parameter in down.values()}),
            "trained_elements": sum(parameter.numel() for parameter in trained.values()),
            "adapters_moved": moved,
            "dtypes": roles,
            "autocast": session.settings.autocast,
        }
        missed = [m for name, m in session.model.named_modules() if _is_plain_linear(name, m)]
        ok = bool(down) and len(down) == len(up) == len(layers) and len(trained) == 2 * len(layers) and not missed
        ok = ok and facts["ranks"] == [rank] and moved == len(up)
        # what must not be rounded: adapters ever, normalisations between compressed layers
        precise = ("adapters", "norms") if _compressed_kinds(session.model) else ("adapters",)
        ok = ok and all(roles.get(role, ["float32"]) == ["float32"] for role in precise)
        ok = ok and {id(p) for p in trained.values()} == {id(p) for p in session.step.trained}  # type: ignore[union-attr]
        return Evidence(ok=ok, facts=facts)


def _say_how_it_is_compressed(model: Any) -> bool:
    """peft asks the model whether its linear layers are compressed; those with random weights do not know yet."""
    kinds = _compressed_kinds(model)
    for kind in kinds:
        setattr(model, _COMPRESSED[kind], True)
    return bool(kinds)


def _compressed_kinds(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules()} & _COMPRESSED.keys()


def _prepare_compressed(session: Session) -> None:
    """Normalisations in fp32, everything between them under autocast in what the other weights are held in.

    peft's own preparation also makes embeddings and head fp32; QLoRA left them in half precision, as we do.
    """
    dtypes = {p.dtype for p in session.model.parameters() if p.is_floating_point() and not p.requires_grad}
    for name, module in session.model.named_modules():
        if "norm" in name.rpartition(".")[2].lower() or "Norm" in type(module).__name__:
            module.float()
    half = sorted(name for name in (str(dtype).removeprefix("torch.") for dtype in dtypes) if name.endswith("16"))
    if half and session.settings.autocast is None:
        session.settings.autocast = half[0]


def dtypes_by_role(model: Any) -> dict[str, list[str]]:
    """Dtypes of adapters, normalisations, embeddings and head, and of the linear layers' stored weights."""
    found: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = "adapters"
        elif "norm" in name:
            role = "norms"
        else:
            role = "linear" if "base_layer" in name else "embeddings_and_head"
        found.setdefault(role, set()).add(str(parameter.dtype).removeprefix("torch."))
    return {role: sorted(names) for role, names in found.items()}


def _is_plain_linear(name: str, module: Any) -> bool:
    """A linear layer without an adapter, that is none of an adapter's own and not the head."""
    inside = "base_layer" in name or "lora_" in name or hasattr(module, "base_layer")
    kind = type(module).__name__
    return kind in ("Linear", "Conv1D", *_COMPRESSED) and not inside and "lm_head" not in name


@contextmanager
def _without_gptqmodel() -> Iterator[None]:
    """peft imports gptqmodel where it is installed, which sets up allocator, logging and folders for all that follows.

    Unless the stack has loaded it already, it looks absent while adapters are made.
    """
    if "gptqmodel" in sys.modules:
        yield
        return
    sys.modules["gptqmodel"] = None  # type: ignore[assignment] # importlib's own way to say "not there"
    try:
        yield
    finally:
        del sys.modules["gptqmodel"]

"""One product where a block has several of one input: queries, keys and values; gate and up.

The arithmetic is the same. Decoding one sequence reads every weight once per token, and few large reads come nearer to
the memory bandwidth than many small ones: a kernel's start and end cost microseconds in which memory idles.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from tasks.models.identity import model_type
from tasks.optimization import Evidence, Needs, Optimization, Unsupported
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session

GROUPS = {"attention": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
FUSED_AS_PUBLISHED = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt", "phi3")


class FusedProjections(Optimization):
    name = "fused-projections"
    family = "structure"
    summary = "queries, keys and values as one product, gate and up as one (Llama-type models)"
    needs = Needs(model_kinds=("language",), workloads=("prefill", "decode"))
    options = {"of": "all"}
    choices = {"of": ("all", *GROUPS)}

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if model_type(cell.model) in FUSED_AS_PUBLISHED:
            return f"{self.name} joins separate projections, {cell.model.id} has them joined as published"
        return super().unsupported(cell, device)

    def apply(self, technique: Technique, session: Session) -> None:
        import torch

        groups = _groups(technique)
        found: Counter[str] = Counter()
        for parent in list(session.model.modules()):
            for group, names in groups.items():
                layers = [getattr(parent, name, None) for name in names]
                if not all(_is_plain(layer) for layer in layers):
                    continue
                _fuse(parent, names)
                found[group] += 1
                if session.on_cuda:
                    # the joined weight fits into none of the blocks just freed: without this they pile up
                    del layers
                    torch.cuda.empty_cache()
        missing = [group for group in groups if not found[group]]
        if missing:
            raise Unsupported(
                f"{self.name} found no plain {' or '.join(missing)} projections in {session.job.cell.model.id}"
            )

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Every block has its joined products, one call uses each of them, and no parameter came or went."""
        import torch

        groups, model = _groups(technique), session.model
        joined = {name: module for name, module in model.named_modules() if type(module).__name__ == "JoinedLinear"}
        parts = {name for group in groups.values() for name in group}
        apart = [name for name, module in model.named_modules()
                 if name.rpartition(".")[2] in parts and isinstance(module, torch.nn.Linear)]  # fmt: skip
        total, expected = sum(p.numel() for p in model.parameters()), _published_parameters(session)
        used = _products(session, list(joined.values()))
        blocks = model.config.get_text_config().num_hidden_layers
        facts = {
            "blocks": blocks, "joined": len(joined), "apart": len(apart), "joined_used": used,
            "parameters": total, "parameters_published": expected,
        }  # fmt: skip
        ok = len(joined) == used == blocks * len(groups) and not apart and total == expected
        return Evidence(ok=ok, facts=facts)


def _is_plain(layer: Any) -> bool:
    """A linear layer with weights as published: compressed ones may differ in the weight's class only."""
    import torch

    return type(layer) is torch.nn.Linear and type(layer.weight.data) is torch.Tensor


def _groups(technique: Technique) -> dict[str, tuple[str, ...]]:
    wanted = option(technique, "of")
    return {group: names for group, names in GROUPS.items() if wanted in ("all", group)}


def _fuse(parent: Any, names: tuple[str, ...]) -> None:
    """Put one joined layer and its parts into the places of `names`; at most this block's weights exist twice."""
    from tasks.optimizations._joined import JoinedLinear, Part

    layers = [getattr(parent, name) for name in names]
    joined = JoinedLinear(layers)
    parent.add_module("_".join(name.removesuffix("_proj") for name in names) + "_joined", joined)
    start = 0
    for name, layer in zip(names, layers, strict=True):
        stop = start + layer.out_features
        setattr(parent, name, Part(joined, start, stop, last=name == names[-1]))
        start = stop


def _products(session: Session, joined: list[Any]) -> int:
    """How many of the joined layers one call uses: 0 unless each computes once in every pass of the model."""
    import torch

    calls: Counter[int] = Counter()

    def count(module: Any, _inputs: Any, _output: Any) -> None:
        calls[id(module)] += 1

    hooks = [module.register_forward_hook(count) for module in (session.model, *joined)]
    try:
        assert session.step is not None
        with torch.compiler.set_stance("force_eager"):
            session.step.run_short()
    finally:
        for hook in hooks:
            hook.remove()
    passes = calls.pop(id(session.model), 0)
    return len(calls) if all(count == passes for count in calls.values()) else 0


def _published_parameters(session: Session) -> int:
    """Parameters of the model as its configuration builds it, without data."""
    import torch

    from tasks.models.load import from_config

    assert session.loaded is not None
    with torch.device("meta"):
        model = from_config(session.loaded.config, session.job.cell.model)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())

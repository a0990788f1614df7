"""Activation checkpointing: blocks keep their inputs only and are computed again in the backward pass.

A block that is computed again costs one more forward pass (a third of a step), and its activations exist for one block
at a time. The selective mode keeps the results of matrix products and fused attention, which take most of the time,
and computes only the cheap operators again.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.optimization import Evidence, Needs, Optimization, Unsupported, out_of_memory
from tasks.stacks import option

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session

# ATen operators whose results the selective mode keeps, where this torch has them. Batched products are not among
# them: written out, attention's scores are as large as everything else.
PRODUCTS = ("mm", "addmm", "_scaled_mm")
FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


class Checkpointing(Optimization):
    name = "checkpointing"
    family = "checkpointing"
    summary = "activations of each block recomputed in the backward pass, wholly or but for products"
    needs = Needs(workloads=("train_step",))
    options = {"mode": "block"}
    choices = {"mode": ("block", "selective")}

    def apply(self, technique: Technique, session: Session) -> None:
        keywords: dict[str, Any] = {"use_reentrant": False}
        if option(technique, "mode") == "selective":
            keywords["context_fn"] = selective_contexts()
        switch(session.model, keywords)

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """The operators of a forward and a backward pass over one sample, with checkpointing and without it."""
        live = operators(session)
        switch(session.model, None)
        try:
            without = operators(session)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # the measured step fitted, and without checkpointing a single sample does not: that is the proof
            return Evidence(ok=True, facts={"operators": sum(live.values()), "without": "out of memory"})
        finally:
            self.apply(technique, session)
        again = Counter(live)
        again.subtract(without)
        products = sum(count for name, count in again.items() if name in (*PRODUCTS, "bmm", *FUSED_ATTENTION))
        kept = sum(count for name, count in again.items() if name in (*PRODUCTS, *FUSED_ATTENTION))
        total = sum(again.values())
        ok = total > 0 and (products > 0 if option(technique, "mode") == "block" else kept == 0)
        facts = {"operators": sum(live.values()), "recomputed": total, "products_recomputed": products}
        return Evidence(ok=ok, facts=facts)


def switch(model: Any, keywords: dict[str, Any] | None) -> None:
    """Turn the model's own checkpointing on with keyword arguments of `torch.utils.checkpoint`, or off with None.

    Raises `Unsupported` where it has none. transformers calls it activation checkpointing since 5.20.
    """
    for kind in ("activation", "gradient"):
        if hasattr(model, f"{kind}_checkpointing_enable"):
            if keywords is None:
                getattr(model, f"{kind}_checkpointing_disable")()
                return
            try:
                getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": keywords})
            except ValueError as error:
                raise Unsupported(f"checkpointing: {error}") from error
            return
    raise Unsupported(f"checkpointing: {type(model).__name__} has no switch for it (activation_checkpointing_enable)")


def selective_contexts() -> Any:
    """The context function of `torch.utils.checkpoint` that keeps results of products and fused attention."""
    import torch
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    names = [name for name in (*PRODUCTS, *FUSED_ATTENTION) if hasattr(torch.ops.aten, name)]
    return partial(create_selective_checkpoint_contexts, [getattr(torch.ops.aten, name).default for name in names])


def operators(session: Session) -> Counter[str]:
    """ATen operators that are run by the forward and backward pass of one sample, by name without namespace."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    called: Counter[str] = Counter()

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called[func._schema.name.split("::")[-1]] += 1
            return func(*args, **(kwargs or {}))

    step: Any = session.step
    sample = step.one_sample()
    with torch.compiler.set_stance("force_eager"), Listener():  # type: ignore[no-untyped-call]
        step.gradients([sample])
    return called

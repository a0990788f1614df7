"""What the attention techniques share: how one is chosen, and which kernel was really called."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.models.identity import model_type
from tasks.optimization import Evidence, LoadOptions, Optimization

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session


MATH = "_scaled_dot_product_attention_math"


CONVOLUTIONAL = ("convnext", "convnextv2", "efficientnet", "mobilenet_v1", "mobilenet_v2", "regnet", "resnet")


class AttentionKind(Optimization):
    """One way to compute attention; networks that have none are refused."""

    family = "attention"

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if model_type(cell.model) in CONVOLUTIONAL:
            return f"{self.name} chooses a way to compute attention, {cell.model.id} has no attention"
        return super().unsupported(cell, device)


class SdpaBackend(AttentionKind):
    """One backend of `scaled_dot_product_attention`; `operators` are the ATen operators that it calls."""

    backend: ClassVar[str]
    operators: ClassVar[tuple[str, ...]]

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        options.attention = "sdpa"

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.attention = self.name

    def context(self, technique: Technique, session: Session) -> AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self.backend))

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        called = attention_operators(session)
        others = [name for name in called if name not in self.operators]
        ok = any(name in called for name in self.operators) and not others
        return Evidence(ok=ok, facts={"attention_operators": dict(called)})


def attention_operators(session: Session) -> Counter[str]:
    """Attention operators of one call, run eagerly: name without namespace -> times called, backward ones included.

    The math path decomposes into products and a softmax: without a fused operator it is listed under its own name when
    `scaled_dot_product_attention` was asked for, and as `_softmax` when attention was written out.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    called: Counter[str] = Counter()
    softmax: Counter[str] = Counter()
    asked: Counter[str] = Counter()

    class Questions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                asked[MATH] += 1
            return func(*args, **(kwargs or {}))

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.split("::")[-1].removesuffix("_backward")
            if name in ("_softmax", "_safe_softmax"):
                softmax["_softmax"] += 1
            elif name.startswith("_scaled_dot_product") or "flash_attention" in name:
                called[name] += 1
            else:
                # inference mode hands composite operators over whole: look inside them
                with self:
                    result = func.decompose(*args, **(kwargs or {}))
                if result is not NotImplemented:
                    return result
            return func(*args, **(kwargs or {}))

    assert session.step is not None
    with torch.compiler.set_stance("force_eager"), Questions(), Listener():  # type: ignore[no-untyped-call]
        session.step.run_short()
    return called or asked or softmax

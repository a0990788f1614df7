"""What the attention techniques share: how one is chosen, and which kernel was really called."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.optimization import Evidence, LoadOptions, Optimization

if TYPE_CHECKING:
    from tasks.cell import Technique
    from tasks.session import Session


class SdpaBackend(Optimization):
    """One backend of `scaled_dot_product_attention`; `operators` are the ATen operators that it calls."""

    family = "attention"
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
    """Fused attention operators of one call, run eagerly: name without namespace -> times called.

    The math path decomposes into products and a softmax and is listed as `_softmax` when nothing fused was called.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    called: Counter[str] = Counter()
    softmax: Counter[str] = Counter()

    class Listener(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.split("::")[-1]
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
    with torch.compiler.set_stance("force_eager"), Listener():
        session.step.run(0, lambda _label: None)
    return called or softmax

"""What the attention techniques share: how one is chosen, and which kernel was really called."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from tasks.models.identity import model_type
from tasks.optimization import Evidence, LoadOptions, Needs, Optimization, Unsupported
from tasks.registry import workloads
from tasks.stacks import precision_of
from tasks.workloads.attention import fused

if TYPE_CHECKING:
    from tasks.cell import Cell, Technique
    from tasks.device import DeviceInfo
    from tasks.session import Session
    from tasks.workloads.attention import AttentionShape, Kernel


ASKED = "_scaled_dot_product"  # how all operators of scaled_dot_product_attention begin
MATH = f"{ASKED}_attention_math"
FLEX = "flex_attention"


CONVOLUTIONAL = ("convnext", "convnextv2", "efficientnet", "mobilenet_v1", "mobilenet_v2", "regnet", "resnet")


class AttentionKind(Optimization):
    """One way to compute attention; networks that have none are refused.

    `implementation` is its name in transformers (`attn_implementation`), for models; `kernel` is what the attention
    workload runs. What a factory made takes it where it is, or holds, a model of transformers.
    """

    family = "attention"
    implementation: ClassVar[str]

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        if model_type(cell.model) in CONVOLUTIONAL:
            return f"{self.name} chooses a way to compute attention, {cell.model.id} has no attention"
        return super().unsupported(cell, device)

    def load(self, options: LoadOptions, technique: Technique, session: Session) -> None:
        options.attention = self.implementation

    def apply(self, technique: Technique, session: Session) -> None:
        session.settings.attention = self.kernel
        if session.job.cell.model.source == "factory" and not self.chosen_in(session.model):
            raise Unsupported(
                f"{self.name} sets transformers' attn_implementation, which the module of {session.job.cell.model.id} "
                "does not have"
            )

    def chosen_in(self, module: Any) -> bool:
        """Choose this way in the models of transformers that `module` is or holds; whether there are any."""
        models = [part for part in module.modules() if hasattr(part, "set_attn_implementation")]
        for model in models:
            model.set_attn_implementation(self.implementation)
        return bool(models)

    def kernel(self, shape: AttentionShape) -> Kernel:
        """Attention of this shape, with whatever is the same in every call (a mask) made already."""
        return fused(shape)


class SdpaBackend(AttentionKind):
    """One backend of `scaled_dot_product_attention`; `operators` are the ATen operators that it calls.

    It holds for whatever module calls that function; whether a factory's does is seen when it runs.
    """

    implementation = "sdpa"
    backend: ClassVar[str]
    operators: ClassVar[tuple[str, ...]]

    def chosen_in(self, module: Any) -> bool:
        super().chosen_in(module)
        return True

    def context(self, technique: Technique, session: Session) -> AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self.backend))

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        called = attention_operators(session)
        model = session.job.cell.model
        if model.source == "factory" and not any(name.startswith(ASKED) for name in called):
            raise Unsupported(
                f"{self.name} chooses a backend of scaled_dot_product_attention, which the module of {model.id} "
                "does not call"
            )
        others = [name for name in called if name not in self.operators]
        ok = any(name in called for name in self.operators) and not others
        return Evidence(ok=ok, facts={"attention_operators": dict(called)})


class FlashPackage(AttentionKind):
    """Tri Dao's own flash-attention packages, half precision on CUDA; `namespace` is that of their operators."""

    needs = Needs(devices=("cuda",))
    namespace: ClassVar[str]

    def unsupported(self, cell: Cell, device: DeviceInfo) -> str | None:
        refusal = super().unsupported(cell, device)
        if refusal is None and precision_of(cell) not in ("fp16", "bf16"):
            refusal = f"{self.name} needs fp16 or bf16 in the stack, which has {precision_of(cell) or 'neither'}"
        return refusal

    def evidence(self, technique: Technique, session: Session) -> Evidence:
        """Every attention operator of a call is one of the package's own, not PyTorch's copy of the algorithm."""
        called = attention_operators(session)
        ok = bool(called) and all(name.startswith(f"{self.namespace}::") for name in called)
        return Evidence(ok=ok, facts={"attention_operators": dict(called)})


def needs_gradients(cell: Cell) -> bool:
    """Whether the cell's workload has a backward pass."""
    return workloads()[cell.workload.kind].needs_gradients(cell.workload)


def attention_operators(session: Session) -> Counter[str]:
    """Attention operators of one call, run eagerly: name -> times called, backward ones included.

    ATen's stand without their namespace, those of the flash-attention packages with it, and flex attention, a
    higher-order operator, under its name. The math path decomposes into products and a softmax: without a fused
    operator it is listed under its own name when `scaled_dot_product_attention` was asked for, and as `_softmax` when
    attention was written out.
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
        supports_higher_order_operators = True  # such as flex attention, whose backward pass is another one

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if isinstance(func, torch._ops.HigherOrderOperator):
                if (name := func.name().removesuffix("_backward")) == FLEX:
                    called[FLEX] += 1
                return func(*args, **(kwargs or {}))
            namespace, _, name = func._schema.name.partition("::")
            name = name.removesuffix("_backward")
            if name in ("_softmax", "_safe_softmax"):
                softmax["_softmax"] += 1
            elif namespace.startswith("flash_attn"):
                called[f"{namespace}::{name}"] += 1
            elif name.startswith(ASKED) or "flash_attention" in name:
                called[name] += 1
            elif torch.is_inference_mode_enabled():
                # it hands composite operators over whole: look inside them
                with self:
                    result = func.decompose(*args, **(kwargs or {}))
                if result is not NotImplemented:
                    return result
            return func(*args, **(kwargs or {}))

    assert session.step is not None
    with (
        warnings.catch_warnings(),
        torch.compiler.set_stance("force_eager"),
        Questions(),
        Listener(),  # type: ignore[no-untyped-call]
    ):
        warnings.filterwarnings("ignore", "flex_attention called without", UserWarning)
        session.step.run_short()
    return called or asked or softmax
